//! Which address the proxy connects from on a client's behalf.
//!
//! The client's own, so that the far side sees who it is. A service may be dialled in one IP family and its endpoint be
//! reached in the other, though, and a packet has two addresses of one family. Then it is another address of the same
//! client; who has none of that family cannot be shown.

use std::net::IpAddr;

use mesh_core::addr::{ClientAddr, Target};

/// Where to connect to `target` from: `client`, or the first of its further addresses, `others`, that is of the
/// target's family. None: there is no such address.
pub fn address(client: ClientAddr, target: Target, others: &[IpAddr]) -> Option<ClientAddr> {
    let fits = |ip: &IpAddr| ip.is_ipv4() == target.ip().is_ipv4();
    if fits(&client.ip()) {
        return Some(client);
    }
    let other = others.iter().copied().find(fits)?;
    Some(ClientAddr::from((other, client.port())))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn the_clients_own_address_of_the_targets_family() {
        for (client, target, others, expect) in [
            ("10.0.0.1:1", "10.0.0.2:80", "10.0.0.9,fd00::1", Some("10.0.0.1:1")),
            ("[fd00::1]:1", "[fd00::2]:80", "10.0.0.1,fd00::9", Some("[fd00::1]:1")),
            ("10.0.0.1:1", "[fd00::2]:80", "10.0.0.1,fd00::1,fd00::9", Some("[fd00::1]:1")),
            ("[fd00::1]:1", "10.0.0.2:80", "fd00::1,10.0.0.1", Some("10.0.0.1:1")),
            ("[::ffff:10.0.0.1]:1", "10.0.0.2:80", "", Some("10.0.0.1:1")),
            ("10.0.0.1:1", "[fd00::2]:80", "10.0.0.1", None),
            ("[fd00::1]:1", "10.0.0.2:80", "", None),
        ] {
            let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
            let others: Vec<IpAddr> =
                others.split(',').filter(|ip| !ip.is_empty()).map(|ip| ip.parse().unwrap()).collect();
            let found = address(parse(client).into(), parse(target).into(), &others);
            assert_eq!(found.map(|found| found.to_string()).as_deref(), expect, "{client} to {target}");
        }
    }
}
