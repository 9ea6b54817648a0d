//! A DNS query of a pod, and what a server answers. The first byte says how the query came.

use std::cell::OnceCell;

use hickory_proto::op::{Message, MessageType};
use mesh_core::addr::Network;
use mesh_core::store::Reader;
use ztunnel::dns::answer::{Answer, Client, answer};
use ztunnel::dns::message::{self, Query, Transport};
use ztunnel::dns::names::Zone;

use crate::xds;

thread_local! {
    static MESH: OnceCell<Reader> = const { OnceCell::new() };
}

/// What is taken for an ordinary query is one to another reader, too; and answers fit, and are about it.
pub fn run(data: &[u8]) {
    let Some((first, bytes)) = data.split_first() else { return };
    let transport = if first % 2 == 0 { Transport::Udp } else { Transport::Tcp };
    let query = Query::read(bytes);
    let other = Message::from_vec(bytes);
    // Of the options of an OPT record we need nothing, so nothing is wrong with them.
    let with_options = bytes.get(11).is_some_and(|additional| *additional == 1);
    assert!(query.is_none() || other.is_ok() || with_options, "we read what hickory does not");
    if let (Some(query), Ok(other)) = (&query, other) {
        assert_eq!(other.queries.len(), 1);
        let labels: Vec<Vec<u8>> = other.queries[0].name().iter().map(<[u8]>::to_ascii_lowercase).collect();
        assert_eq!(labels.join(&b'.'), query.name.as_bytes());
        assert_eq!(u16::from(other.queries[0].query_type()), query.kind);
    }
    let said = MESH.with(|mesh| {
        let (network, zone) = (Network::default(), Zone::from("cluster.local"));
        let client = Client { namespace: "shop", network: &network, addresses: &[] };
        answer(mesh.get_or_init(xds::world), &zone, client, bytes, transport, usize::from(first / 2))
    });
    if let Answer::Reply(reply) = &said {
        assert!(query.is_some(), "an answer to what is no query");
        check(bytes, reply, transport);
    }
    if let Some(failure) = message::failure(bytes) {
        assert!(message::answers(bytes, &failure) && failure.len() <= bytes.len() + 16);
    }
    forwarded(bytes);
}

fn check(query: &[u8], reply: &[u8], transport: Transport) {
    assert!(message::answers(query, reply));
    assert_eq!(message::id(query), message::id(reply));
    let most = if transport == Transport::Udp { 4096 } else { usize::from(u16::MAX) };
    assert!(reply.len() <= most, "{} bytes", reply.len());
    let read = Message::from_vec(reply).expect("hickory reads our answer");
    assert_eq!(read.metadata.message_type, MessageType::Response);
}

/// Half of the bytes are a query that was forwarded, the others what came back.
fn forwarded(bytes: &[u8]) {
    let (query, response) = bytes.split_at(bytes.len() / 2);
    let _ = (message::answers(query, response), message::is_transfer(query), message::asks(query));
    let mut copy = response.to_vec();
    message::set_id(&mut copy, [7, 7]);
    assert_eq!(copy.len(), response.len());
    assert!(copy.get(2..) == response.get(2..));
}

/// Queries of each type that we answer, with and without EDNS, for each kind of service.
pub fn seeds() -> Vec<Vec<u8>> {
    let names = [
        "web.shop.svc.cluster.local",
        "db-0.db.shop.svc.cluster.local",
        "_sql._tcp.db.shop.svc.cluster.local",
        "web",
        "api.example.com",
    ];
    let kinds = [message::A, message::AAAA, message::SRV];
    let mut seeds = Vec::new();
    for (number, name) in names.iter().enumerate() {
        for (more, kind) in kinds.iter().enumerate() {
            let edns = (number + more) % 2 == 1;
            let mut bytes =
                vec![u8::from(more == 2), 0x12, 0x34, 0x01, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
            for label in name.split('.') {
                bytes.push(label.len() as u8);
                bytes.extend(label.as_bytes());
            }
            bytes.push(0);
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0, 1]);
            if edns {
                bytes.extend([0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]);
            }
            seeds.push(bytes);
        }
    }
    seeds
}
