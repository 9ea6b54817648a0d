//! Answers the agent's canaries, which prove that what a pod opens and what comes to it reaches this process.
//!
//! **Invariant:** a canary is answered and closed, and nothing else comes of it: no policy is asked, no way is opened,
//! nothing is counted or logged. So it does not matter who sends it.

use std::net::SocketAddr;

use mesh_ebpf_abi::canary::{self, ANSWER};
use socket2::SockRef;
use tokio::net::TcpStream;

/// Answers a connection if it is a canary's; whether it was.
pub fn answered(stream: &TcpStream, client: SocketAddr) -> bool {
    let outbound = || stream.local_addr().is_ok_and(|to| is_canary(to) && to.port() == canary::PORT);
    let canary = is_canary(client) || outbound();
    if canary {
        // Few bytes on a new connection: there is room. A canary that is gone has given up.
        let _ = SockRef::from(stream).send(&ANSWER);
    }
    canary
}

/// Whether an address is one that nobody but a canary has.
pub fn is_canary(at: SocketAddr) -> bool {
    at.ip().to_canonical() == canary::ip(at.ip().to_canonical().is_ipv4())
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn canaries_are_answered_and_nobody_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for (client, expect) in [
            ("192.0.2.1:40000", true),
            ("[::ffff:192.0.2.1]:40000", true),
            ("[2001:db8::1]:40000", true),
            ("192.0.2.2:40000", false),
            ("[2001:db8::2]:40000", false),
        ] {
            let mut peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            accepted.set_nonblocking(true).unwrap();
            let accepted = TcpStream::from_std(accepted).unwrap();
            assert_eq!(answered(&accepted, client.parse().unwrap()), expect, "{client}");
            drop(accepted);
            let mut heard = Vec::new();
            let end = peer.read_to_end(&mut heard);
            assert!(end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
            assert_eq!(heard == ANSWER, expect, "{client}: {heard:?}");
        }
    }
}
