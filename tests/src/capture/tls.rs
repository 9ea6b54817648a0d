//! TLS hello messages (RFC 8446, section 4.1), as far as the version is concerned.

pub(super) const TLS13: u16 = 0x0304;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;

/// Whether a stream begins with a ClientHello.
pub(super) fn is_client_hello(stream: &[u8]) -> bool {
    stream.first() == Some(&HANDSHAKE) && stream.get(5) == Some(&CLIENT_HELLO)
}

/// The version a ServerHello at the beginning of a stream settles on.
pub(super) fn server_version(stream: &[u8]) -> Option<u16> {
    let mut reader = Reader(stream);
    if reader.byte()? != HANDSHAKE {
        return None;
    }
    // Record version and length, then type and length of the message, then the legacy version.
    reader.skip(4)?;
    if reader.byte()? != SERVER_HELLO {
        return None;
    }
    reader.skip(3)?;
    let legacy = reader.word()?;
    reader.skip(32)?;
    let session = reader.byte()?;
    reader.skip(usize::from(session))?;
    // Cipher suite and compression.
    reader.skip(3)?;
    let Some(length) = reader.word() else { return Some(legacy) };
    let mut extensions = Reader(reader.0.get(..usize::from(length))?);
    while let (Some(kind), Some(length)) = (extensions.word(), extensions.word()) {
        if kind == SUPPORTED_VERSIONS {
            return extensions.word();
        }
        extensions.skip(usize::from(length))?;
    }
    Some(legacy)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn skip(&mut self, count: usize) -> Option<()> {
        self.0 = self.0.get(count..)?;
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.0.first()?;
        self.skip(1)?;
        Some(byte)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from(self.byte()?) << 8 | u16::from(self.byte()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_hello(extensions: &[u8]) -> Vec<u8> {
        let mut hello = vec![HANDSHAKE, 3, 3, 0, 0, SERVER_HELLO, 0, 0, 0, 3, 3];
        hello.extend([0; 32]);
        hello.extend([0, 0x13, 0x02, 0]);
        hello.extend(u16::try_from(extensions.len()).expect("short").to_be_bytes());
        hello.extend(extensions);
        hello
    }

    #[test]
    fn the_version_is_what_the_extension_says() {
        assert_eq!(server_version(&server_hello(&[0, 51, 0, 1, 9, 0, 43, 0, 2, 3, 4])), Some(TLS13));
        assert_eq!(server_version(&server_hello(&[])), Some(0x0303));
        assert_eq!(server_version(b"HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(server_version(&server_hello(&[0, 43, 0, 2, 3, 4])[..30]), None);
    }

    #[test]
    fn a_client_hello_is_known() {
        assert!(is_client_hello(&[22, 3, 1, 2, 0, 1]));
        assert!(!is_client_hello(b"GET / HTTP/1.1"));
    }
}
