//! Queries over TCP (RFC 7766): one after the other, each after its length.
//!
//! What is forwarded goes the way of every connection that the pod opens (`outbound`): the server may be a service of the
//! mesh. What is no conversation of questions and answers, such as a zone transfer, goes on as a plain stream.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::addr::{ClientAddr, OrigDst};
use mesh_core::drain::Watch;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::answer::Answer;
use super::message::{self, HEADER, Transport};
use super::{PATIENCE, judge};
use crate::outbound;
use crate::proxy::Pod;
use crate::report::{Direction, Report};
use crate::sockets;

/// Where DNS servers listen.
const PORT: u16 = 53;

/// How long a client may be silent.
const IDLE: Duration = Duration::from_secs(30);

/// Conversations that one pod may have at once; each has room for a message of 64 KiB.
pub const MOST: usize = 128;

/// A longer message is no question, and is not waited for.
const LONGEST_QUESTION: usize = 4096;

/// Between the conversation and what carries it to the server.
const BUFFER: usize = 16 * 1024;

/// For the connection to the server, to notice that it is not needed any more.
const GRACE: Duration = Duration::from_secs(1);

/// Carries one connection that the pod opened; those to a DNS server are conversed with.
pub fn serve(
    pod: Arc<Pod>,
    drain: Watch,
    stream: TcpStream,
    client: SocketAddr,
) -> impl Future<Output = ()> + Send {
    let server = stream.local_addr().ok().filter(|to| to.port() == PORT).map(OrigDst::from);
    async move {
        match server {
            Some(server) => {
                let conversation = Conversation { pod, drain, client: ClientAddr::from(client), server };
                Box::pin(conversation.run(stream)).await;
            }
            None => outbound::serve(pod, drain, stream, client).await,
        }
    }
}

/// One connection of a client.
struct Conversation {
    pod: Arc<Pod>,
    drain: Watch,
    client: ClientAddr,
    server: OrigDst,
}

/// What came of a client's next message.
enum Next {
    /// A whole message.
    Message(Vec<u8>),
    /// The beginning of something else.
    Other(Vec<u8>),
    /// It has nothing more to say.
    End,
}

/// The connection to the server.
struct Link {
    stream: DuplexStream,
    /// Ends with the link.
    carrying: JoinSet<()>,
}

impl Conversation {
    async fn run(self, mut stream: TcpStream) {
        let places = self.pod.dns_streams.try_acquire();
        let occupied = outbound::occupy(&self.pod, self.client, self.server);
        let (Ok(_place), Ok(_occupied)) = (&places, &occupied) else {
            tracing::warn!(uid = %self.pod.uid, "the pod has too many connections to DNS servers");
            return sockets::reset_on_close(&stream);
        };
        let mut link = None;
        let talked = tokio::select! {
            biased;
            () = self.drain.closing() => Err(io::ErrorKind::ConnectionAborted.into()),
            talked = self.talk(&mut stream, &mut link) => talked,
        };
        if let Err(error) = talked {
            tracing::debug!(%error, client = %self.client, server = %self.server, "DNS over TCP");
            sockets::reset_on_close(&stream);
        }
        if let Some(link) = link {
            link.close().await;
        }
    }

    async fn talk(&self, stream: &mut TcpStream, link: &mut Option<Link>) -> io::Result<()> {
        loop {
            let silent = |_| io::Error::from(io::ErrorKind::TimedOut);
            let next = timeout(IDLE, next(stream)).await.map_err(silent)??;
            let query = match next {
                Next::End => return Ok(()),
                Next::Other(begun) => return self.pass_on(stream, link, &begun).await,
                Next::Message(query) if message::is_transfer(&query) => {
                    return self.pass_on(stream, link, &framed(&query)).await;
                }
                Next::Message(query) => query,
            };
            super::turn(&self.pod).await;
            let (answer, labels) = judge(&self.pod, &query, Transport::Tcp);
            let reply = match answer {
                Answer::Drop => None,
                Answer::Reply(reply) => Some(reply),
                Answer::Forward => {
                    let begun = Instant::now();
                    let answered = timeout(PATIENCE, self.ask(link, &query)).await.unwrap_or_default();
                    let took = answered.is_some().then(|| begun.elapsed());
                    self.pod.proxy.metrics.dns.forwarded(&labels, took);
                    if answered.is_none() {
                        // What may still come of it is no answer to the next question.
                        *link = None;
                    }
                    answered.or_else(|| message::failure(&query))
                }
            };
            if let Some(reply) = reply {
                stream.write_all(&framed(&reply)).await?;
            }
        }
    }

    /// The server's answer. One that has closed a connection which was idle is dialled again.
    async fn ask(&self, link: &mut Option<Link>, query: &[u8]) -> Option<Vec<u8>> {
        if let Some(open) = link
            && let Ok(answer) = open.ask(query).await
        {
            return Some(answer);
        }
        *link = self.open().await;
        link.as_mut()?.ask(query).await.ok()
    }

    /// Both ways without looking, after what was read already; by a connection of its own, since the server may have closed
    /// the one for questions.
    async fn pass_on(&self, stream: &mut TcpStream, link: &mut Option<Link>, begun: &[u8]) -> io::Result<()> {
        *link = self.open().await;
        let open = link.as_mut().ok_or(io::ErrorKind::ConnectionRefused)?;
        open.stream.write_all(begun).await?;
        tokio::io::copy_bidirectional(stream, &mut open.stream).await?;
        Ok(())
    }

    /// A connection to the server as the application's own would be; none if there is no way, which has been told.
    async fn open(&self) -> Option<Link> {
        let mut report = Report::new(&self.pod, Direction::Outbound, self.client);
        let reached = outbound::reach(&self.pod, self.server, self.client, &mut report);
        match Box::pin(reached).await {
            Ok(upstream) => {
                let (stream, far) = tokio::io::duplex(BUFFER);
                let mut carrying = JoinSet::new();
                carrying.spawn(upstream.carry(far, (), report, self.drain.clone()));
                Some(Link { stream, carrying })
            }
            Err(error) => {
                report.finish(&Err(error));
                None
            }
        }
    }
}

impl Link {
    async fn ask(&mut self, query: &[u8]) -> io::Result<Vec<u8>> {
        self.stream.write_all(&framed(query)).await?;
        loop {
            let mut answer = vec![0; usize::from(self.stream.read_u16().await?)];
            self.stream.read_exact(&mut answer).await?;
            if message::id(&answer) == message::id(query) && message::answers(query, &answer) {
                return Ok(answer);
            }
        }
    }

    /// The server has to notice, so that the connection is told of as one that ended.
    async fn close(self) {
        let Self { stream, mut carrying } = self;
        drop(stream);
        let _ = timeout(GRACE, carrying.join_next()).await;
    }
}

/// The next message, as soon as its header says that it is one.
async fn next(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<Next> {
    let mut begun = vec![0; 2 + HEADER];
    let mut filled = 0;
    while filled < begun.len() {
        match stream.read(&mut begun[filled..]).await? {
            0 if filled == 0 => return Ok(Next::End),
            0 => {
                begun.truncate(filled);
                return Ok(Next::Other(begun));
            }
            read => filled += read,
        }
        let length = usize::from(u16::from_be_bytes([begun[0], begun[1]]));
        if filled >= 2 && !(HEADER..=LONGEST_QUESTION).contains(&length) {
            begun.truncate(filled);
            return Ok(Next::Other(begun));
        }
    }
    if !message::asks(&begun[2..]) {
        return Ok(Next::Other(begun));
    }
    let length = usize::from(u16::from_be_bytes([begun[0], begun[1]]));
    let mut message = begun.split_off(2);
    message.resize(length, 0);
    stream.read_exact(&mut message[HEADER..]).await?;
    Ok(Next::Message(message))
}

/// A message after its length.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend(&message[..usize::from(length)]);
    framed
}

#[cfg(test)]
mod tests;
