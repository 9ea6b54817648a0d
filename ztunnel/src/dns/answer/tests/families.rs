//! What a client is told of IP families that it does not have.

use super::*;

/// A made-up address of each family would have clients try what the kernel has no way to.
#[test]
fn a_client_is_told_of_a_host_what_it_can_use() {
    let mesh = mesh(|mesh| {
        mesh.put_service(service("shop", "both.example", &["240.240.0.1", "2001:2::1"]));
        mesh.put_service(service("shop", "v6.example", &["2001:2::2"]));
        mesh.put_service(service("shop", "web.shop.svc.cluster.local", &["10.96.0.7", "fd00:96::7"]));
    });
    let network = Network::default();
    for (own, name, v4, v6) in [
        (&["10.0.0.1", "fd00::1"][..], "both.example.", 1, 1),
        (&["10.0.0.1"], "both.example.", 1, 0),
        (&["fd00::1"], "both.example.", 0, 1),
        (&[], "both.example.", 1, 1),
        // It learns that there is such a host.
        (&["10.0.0.1"], "v6.example.", 0, 1),
        // As the cluster's DNS has it.
        (&["10.0.0.1"], "web.shop.svc.cluster.local.", 1, 1),
    ] {
        let addresses: Vec<IpAddr> = own.iter().map(|ip| ip.parse().unwrap()).collect();
        let client = Client { namespace: "shop", network: &network, addresses: &addresses };
        for (kind, count) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
            let zone = Zone::from("cluster.local");
            let reply = answer(&mesh, &zone, client, &query(name, kind), Transport::Udp, 0);
            let Answer::Reply(reply) = reply else { panic!("{own:?} {name} {kind}") };
            let reply = Message::from_vec(&reply).unwrap();
            assert_eq!(
                (reply.answers.len(), reply.authorities.len()),
                (count, 1 - count),
                "{own:?} {name} {kind}"
            );
        }
    }
}
