use super::*;

/// What a client's bytes are taken for; they come one by one.
async fn first(bytes: &[u8]) -> io::Result<Next> {
    let (mut client, mut proxy) = tokio::io::duplex(1);
    let sending = async {
        // Whoever has read enough hangs up.
        let _ = client.write_all(bytes).await;
        drop(client);
    };
    let (next, ()) = tokio::join!(
        async move {
            let next = next(&mut proxy).await;
            drop(proxy);
            next
        },
        sending
    );
    next
}

/// A query for the root's addresses, 17 bytes.
const QUERY: [u8; 17] = [0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];

#[tokio::test]
async fn questions_are_told_from_everything_else_by_their_headers() {
    let long = [&4097_u16.to_be_bytes()[..], &QUERY].concat();
    let notify = [&framed(&QUERY)[..4], &[4 << 3], &framed(&QUERY)[5..]].concat();
    let response = [&framed(&QUERY)[..4], &[0x80], &framed(&QUERY)[5..]].concat();
    for (why, bytes, other) in [
        ("TLS", &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdefghijklmnop"[..], true),
        ("HTTP", b"GET / HTTP/1.1\r\nhost: example.org\r\n\r\n", true),
        ("shorter than a header", b"\x00\x0b0123456789", true),
        ("longer than a question", &long, true),
        ("NOTIFY", &notify, true),
        ("a response", &response, true),
        ("the end after a few bytes", b"\x00\x11\x00", true),
        ("a question", &framed(&QUERY), false),
    ] {
        match first(bytes).await.expect(why) {
            Next::Other(begun) => assert!(other && bytes.starts_with(&begun), "{why}: {begun:?}"),
            Next::Message(message) => assert!(!other && message == QUERY, "{why}"),
            Next::End => panic!("{why}"),
        }
    }
    assert!(matches!(first(b"").await, Ok(Next::End)));
    assert!(first(&framed(&QUERY)[..16]).await.is_err(), "the end within a question");
}
