//! TCP sockets as all connections of the mesh have them.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockAddr, SockRef, Socket, TcpKeepalive};
use tokio::net::TcpStream;

const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_PROBES: u32 = 9;

/// No Nagle, keepalive 180 s / 180 s / 9 probes (as Istio's). Set on a listener, its connections inherit it.
///
/// # Errors
/// When the socket is closed.
pub fn tune<'a>(socket: impl Into<SockRef<'a>>) -> io::Result<()> {
    let socket = socket.into();
    socket.set_tcp_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Connects a nonblocking socket. Whoever is reached over lo has answered before connect(2) returns, though that cannot
/// say so yet: asking a second time spares the way through the reactor.
///
/// # Errors
/// When the far side does not answer or refuses.
pub async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    let to = SockAddr::from(to);
    let under_way = [libc::EINPROGRESS, libc::EALREADY].map(Some);
    let mut connected = socket.connect(&to);
    if connected.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINPROGRESS)) {
        connected = socket.connect(&to);
    }
    match connected {
        Ok(()) => TcpStream::from_std(socket.into()),
        Err(error) if under_way.contains(&error.raw_os_error()) => {
            let stream = TcpStream::from_std(socket.into())?;
            stream.writable().await?;
            match stream.take_error()? {
                Some(error) => Err(error),
                None => Ok(stream),
            }
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Type};
    use tokio::net::TcpListener;

    use super::*;

    fn socket() -> Socket {
        Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap()
    }

    #[tokio::test]
    async fn accepted_connections_are_as_their_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tune(&listener).unwrap();
        let _client = connect(socket(), listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), KEEPALIVE);
        assert_eq!(accepted.tcp_keepalive_interval().unwrap(), KEEPALIVE);
        assert_eq!(accepted.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
    }

    #[tokio::test]
    async fn connects_to_who_answers_and_tells_who_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stream = connect(socket(), address).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
        drop(listener);
        let refused = connect(socket(), address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    /// A full accept queue swallows the handshake: it is waited for.
    #[tokio::test]
    async fn waits_for_who_answers_later() {
        let listening = socket();
        listening.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        listening.listen(0).unwrap();
        let listener = TcpListener::from_std(listening.into()).unwrap();
        let address = listener.local_addr().unwrap();
        let first = connect(socket(), address).await.unwrap();
        let mut late = std::pin::pin!(connect(socket(), address));
        assert!(futures_util::poll!(late.as_mut()).is_pending(), "there is room for one only");
        listener.accept().await.unwrap();
        late.await.unwrap();
        drop(first);
    }
}
