//! One query to the server over UDP: from a port of its own and with an identifier of our own, both random, so that
//! nobody off the path can guess an answer (RFC 5452).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::{PATIENCE, message};
use crate::sockets::Sockets;

/// A query that may have been lost is repeated once, early enough for the answer to be in time.
const REPEAT: Duration = Duration::from_millis(1500);

/// Room for the longest datagram.
const LONGEST: usize = 65_535;

/// The server's answer, with the identifier of the query.
///
/// # Errors
/// When there is none in time, or the server refuses.
pub(super) async fn exchange(sockets: &dyn Sockets, query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let socket = UdpSocket::from_std(sockets.to_nameserver(server)?.into())?;
    let id = message::id(query).ok_or(io::ErrorKind::InvalidInput)?;
    let (mut asked, own) = (query.to_vec(), rand::random::<u16>().to_be_bytes());
    message::set_id(&mut asked, own);
    let begun = Instant::now();
    for until in [begun + REPEAT, begun + PATIENCE] {
        socket.send(&asked).await?;
        // Counted from the beginning: whoever sends other things does not prolong it.
        if let Ok(answer) = timeout_at(until, answer(&socket, &asked)).await {
            let mut answer = answer?;
            message::set_id(&mut answer, id);
            return Ok(answer);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// The first datagram that is the answer; the socket takes the server's only.
async fn answer(socket: &UdpSocket, asked: &[u8]) -> io::Result<Vec<u8>> {
    loop {
        // No room before there is something: many queries may be under way.
        socket.readable().await?;
        let mut received = Vec::with_capacity(LONGEST);
        match socket.try_recv_buf(&mut received) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        if message::id(&received) == message::id(asked) && message::answers(asked, &received) {
            received.shrink_to_fit();
            return Ok(received);
        }
    }
}
