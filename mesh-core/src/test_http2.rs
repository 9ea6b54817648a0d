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

const END_STREAM: u8 = 1;
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
    once: fn(&str) -> Vec<u8>,
    /// Whether stream 1 is opened then.
    open: bool,
    /// The n-th time, from 0.
    again: fn(u32, &str) -> Vec<u8>,
    /// Payload of DATA on stream 1 each time; it needs the server's window.
    data: i64,
    /// Payload of DATA on other streams, whose windows are never used up; it needs the connection's.
    of_connection: i64,
    /// Whether each is a request that waits until fewer than the server takes are unanswered.
    pub patient: bool,
    /// Whether the server has to end it.
    pub ends: bool,
}

const PLAIN: Attack = Attack {
    name: "",
    open: false,
    once: |_| Vec::new(),
    again: |_, _| Vec::new(),
    data: 0,
    of_connection: 0,
    patient: false,
    ends: true,
};

/// Asks for what policy denies.
pub const DENIED: Attack = Attack {
    name: "requests that policy denies",
    again: |n, at| ended(request(odd(n), "CONNECT", at, &[])),
    patient: true,
    ends: false,
    ..PLAIN
};

/// Asks an echo server for bytes that it never lets come: it ends by waiting for ever.
pub const STALLED: Attack = Attack {
    name: "a window that never opens",
    // SETTINGS_INITIAL_WINDOW_SIZE.
    once: |_| frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
    open: true,
    again: |_, _| frame(kind::DATA, 0, 1, &[7; 8192]),
    data: 8192,
    ends: false,
    ..PLAIN
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
        once: |_| frame(kind::HEADERS, 0, 1, b"\x02\x07CONNECT"),
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
    Attack {
        name: "one byte on many streams",
        once: |at| {
            // All answers are taken: the largest windows of streams (SETTINGS_INITIAL_WINDOW_SIZE) and connection.
            let streams = frame(kind::SETTINGS, 0, 0, &[0, 4, 0x7F, 0xFF, 0xFF, 0xFF]);
            let connection = frame(kind::WINDOW_UPDATE, 0, 0, &0x7FFF_0000u32.to_be_bytes());
            let requests = (0..STREAMS).flat_map(|n| request(odd(n), "CONNECT", at, &[]));
            [streams, connection].concat().into_iter().chain(requests).collect()
        },
        again: |n, _| frame(kind::DATA, 0, odd(n % STREAMS), b"x"),
        of_connection: 1,
        ends: false,
        ..PLAIN
    },
    Attack {
        name: "requests for another's address",
        again: |n, _| ended(request(odd(n), "CONNECT", "203.0.113.9:80", &[])),
        patient: true,
        ..PLAIN
    },
    Attack {
        name: "requests for no service",
        again: |n, _| ended(request(odd(n), "CONNECT", "nobody.example:80", &[])),
        patient: true,
        ends: false,
        ..PLAIN
    },
];

/// As many as a server takes.
const STREAMS: u32 = 200;

/// A request that has no body.
fn ended(mut request: Vec<u8>) -> Vec<u8> {
    request[4] |= END_STREAM;
    request
}

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
    // With what the window has grown by once it is said.
    let (answers, mut answer) = mpsc::unbounded_channel::<(Vec<u8>, i64)>();
    // Bytes that stream 1 may send, or requests that may be sent.
    let mut initial = 65_535;
    let may = if attack.patient { STREAMS.into() } else { initial };
    let (window, more) = (AtomicI64::new(may), Notify::new());
    let connection = AtomicI64::new(65_535);
    let each = if attack.patient { 1 } else { attack.data };
    let of_connection = attack.data + attack.of_connection;
    let hear = async {
        loop {
            let Ok(heard) = next(&mut reader).await else { return End::Closed };
            match heard {
                (kind::GOAWAY, _, _, payload) => return End::GoAway(number(&payload[4..8])),
                (kind::SETTINGS, 0, _, payload) => {
                    // SETTINGS_INITIAL_WINDOW_SIZE; a change is one of what may still be sent (RFC 9113 6.9.2).
                    let told = payload.chunks(6).find(|setting| setting[..2] == [0, 4]);
                    let now = told.map_or(initial, |setting| number(&setting[2..]).into());
                    let grown = if attack.patient { 0 } else { now - initial };
                    initial = now;
                    let _ = answers.send((frame(kind::SETTINGS, ACK, 0, &[]), grown));
                    more.notify_one();
                }
                (kind::PING, 0, _, payload) => {
                    let _ = answers.send((frame(kind::PING, ACK, 0, &payload), 0));
                    more.notify_one();
                }
                (kind::HEADERS, flags, ..) if attack.patient && flags & END_STREAM != 0 => {
                    window.fetch_add(1, Ordering::SeqCst);
                    more.notify_one();
                }
                (kind::WINDOW_UPDATE, _, 0, payload) => {
                    connection.fetch_add(number(&payload).into(), Ordering::SeqCst);
                    more.notify_one();
                }
                (kind::WINDOW_UPDATE, _, 1, payload) if !attack.patient => {
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
        let (settled, grown) = answer.recv().await.unwrap_or_default();
        window.fetch_add(grown, Ordering::SeqCst);
        writer.write_all(&settled).await?;
        writer.write_all(&(attack.once)(authority)).await?;
        if attack.open {
            writer.write_all(&request(1, "CONNECT", authority, &[])).await?;
        }
        for n in 0..times {
            loop {
                while let Ok((answer, grown)) = answer.try_recv() {
                    window.fetch_add(grown, Ordering::SeqCst);
                    writer.write_all(&answer).await?;
                }
                let has = |window: &AtomicI64, bytes| window.load(Ordering::SeqCst) >= bytes;
                if has(&window, each) && has(&connection, of_connection) {
                    break;
                }
                writer.flush().await?;
                more.notified().await;
            }
            window.fetch_sub(each, Ordering::SeqCst);
            connection.fetch_sub(of_connection, Ordering::SeqCst);
            writer.write_all(&(attack.again)(n, authority)).await?;
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
