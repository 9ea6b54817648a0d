//! TCP servers and clients that check every byte and every half-close.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// A listener; on `[::]` for both families, or for IPv4 alone where the kernel has no IPv6.
pub(super) async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let without_v6 = |error: &std::io::Error| error.raw_os_error() == Some(libc::EAFNOSUPPORT);
    let bound = match TcpListener::bind(address).await {
        Err(error) if without_v6(&error) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await,
        bound => bound,
    };
    bound.with_context(|| format!("listen on {address}"))
}

pub(super) async fn echo(listen: SocketAddr, udp: bool) -> anyhow::Result<()> {
    let listener = self::listen(listen).await?;
    if udp {
        // The same address that TCP got.
        let address = listener.local_addr()?;
        let socket = UdpSocket::bind(address).await.with_context(|| format!("bind UDP {address}"))?;
        tokio::spawn(echo_datagrams(socket));
    }
    println!("echo listens on {listen}");
    loop {
        let Ok((mut stream, client)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            let (mut read, mut write) = stream.split();
            let copied = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
            println!("{client}: {copied:?}");
        });
    }
}

async fn echo_datagrams(socket: UdpSocket) {
    let mut buffer = vec![0; 65_536];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    }
}

pub(super) async fn greet(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = self::listen(listen).await?;
    println!("greet listens on {listen}");
    loop {
        let Ok((mut stream, client)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            let mut rest = Vec::new();
            let greeted = async {
                stream.write_all(b"hello\n").await?;
                stream.shutdown().await?;
                stream.read_to_end(&mut rest).await
            };
            let result = greeted.await;
            println!("{client}: {result:?} bytes after the greeting was closed");
        });
    }
}

/// The bytes at a place of the stream that [`send`] sends: no two places nearby look alike.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

pub(super) async fn send(address: &str, bytes: u64, after_eof: bool) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    let (mut read, mut write) = stream.split();
    if after_eof {
        let mut greeting = Vec::new();
        read.read_to_end(&mut greeting).await.context("read up to the server's end")?;
        fill(&mut write, bytes).await?;
        println!(
            "sent {bytes} bytes after the server's end, greeting {:?}",
            String::from_utf8_lossy(&greeting)
        );
        return Ok(());
    }
    let (sent, checked) = tokio::join!(fill(&mut write, bytes), check(&mut read));
    sent?;
    let checked = checked?;
    anyhow::ensure!(checked == bytes, "sent {bytes} bytes, only {checked} came back");
    println!("sent {bytes} bytes, all came back unchanged");
    Ok(())
}

async fn fill(write: &mut (impl AsyncWrite + Unpin), bytes: u64) -> anyhow::Result<()> {
    let mut at = 0;
    let mut chunk = Vec::with_capacity(65_536);
    while at < bytes {
        let end = bytes.min(at + 65_536);
        chunk.clear();
        chunk.extend((at..end).map(pattern));
        write.write_all(&chunk).await.with_context(|| format!("send from byte {at}"))?;
        at = end;
    }
    write.shutdown().await.context("close the sending half")
}

async fn check(read: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<u64> {
    let mut at = 0_u64;
    let mut chunk = vec![0; 65_536];
    loop {
        let length = read.read(&mut chunk).await.with_context(|| format!("read from byte {at}"))?;
        if length == 0 {
            return Ok(at);
        }
        for byte in &chunk[..length] {
            anyhow::ensure!(*byte == pattern(at), "byte {at} came back changed");
            at += 1;
        }
    }
}

pub(super) async fn hold(address: &str, every: Duration) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    println!("connected");
    for round in 0_u64.. {
        let text = format!("round {round:08}\n");
        let mut back = vec![0; text.len()];
        let exchange = async {
            stream.write_all(text.as_bytes()).await?;
            stream.read_exact(&mut back).await
        };
        exchange.await.with_context(|| format!("the connection broke in round {round}"))?;
        anyhow::ensure!(back == text.as_bytes(), "round {round} came back changed");
        println!("ok {round}");
        tokio::time::sleep(every).await;
    }
    Ok(())
}
