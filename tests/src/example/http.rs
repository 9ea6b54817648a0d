//! An HTTP/1.1 client for one request on one connection.

use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// An answer that was read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    #[must_use]
    pub fn success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// GET a `http://host[:port]/path`.
pub async fn get(url: &str, headers: &[(String, String)], timeout: Duration) -> anyhow::Result<Answer> {
    let exchange = async {
        let rest = url.strip_prefix("http://").context("only http:// is spoken here")?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let address = with_port(host);
        let mut stream =
            TcpStream::connect(&address).await.with_context(|| format!("connect to {address}"))?;
        let mut request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await.context("send the request")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.context("read the answer")?;
        parse(&answer)
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .with_context(|| format!("{url}: no answer within {timeout:?}"))?
}

/// `host`, `host:port`, `[address]` or `[address]:port`, where the colons in brackets are an IPv6 address's.
fn with_port(host: &str) -> String {
    let after = host.rsplit_once(']').map_or(host, |(_, after)| after);
    if after.contains(':') { host.to_owned() } else { format!("{host}:80") }
}

/// The servers asked here send no chunks; a body ends with its connection.
fn parse(bytes: &[u8]) -> anyhow::Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("the connection ended before an answer")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(Answer { status: status.context("no status in the answer")?, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_urls() {
        for (host, expect) in [
            ("web", "web:80"),
            ("web:8080", "web:8080"),
            ("[fd00::1]", "[fd00::1]:80"),
            ("[fd00::1]:8080", "[fd00::1]:8080"),
        ] {
            assert_eq!(with_port(host), expect);
        }
    }

    #[test]
    fn answers_and_half_answers() {
        let answer =
            parse(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno").expect("whole");
        assert_eq!((answer.status, answer.body.as_str(), answer.success()), (503, "no", false));
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_err());
        assert!(parse(b"").is_err());
    }
}
