//! The few parts of DER (X.690 10) that certificates and their revocation lists are told apart by. Lengths and tags are
//! taken as they are, without a look at what the parts mean: what is read here was or will be verified elsewhere.

/// Tags (X.680 8.4).
pub(super) const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0]` EXPLICIT.
const CONTEXT_0: u8 = 0xa0;

/// Bytes that are read from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Tag and content of the next part, and the part as a whole.
    fn part(&mut self) -> Option<(u8, &'a [u8], &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // In so many bytes; none of the files read here is longer than these can say.
            0x81..=0x84 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        let whole = self.0.get(..self.0.len() - rest.len())?;
        self.0 = rest;
        Some((tag, content, whole))
    }

    fn next(&mut self, wanted: u8) -> Option<&'a [u8]> {
        self.part().and_then(|(tag, content, _)| (tag == wanted).then_some(content))
    }

    /// The next part if it has one of these tags; else nothing is read.
    fn optional(&mut self, wanted: &[u8]) -> Option<&'a [u8]> {
        self.0.first().filter(|tag| wanted.contains(tag))?;
        self.part().map(|(_, content, _)| content)
    }

    /// Content of a BIT STRING of whole bytes.
    fn bits(&mut self) -> Option<&'a [u8]> {
        let (unused, bytes) = self.next(BIT_STRING)?.split_first()?;
        (*unused == 0).then_some(bytes)
    }

    fn serial(&mut self) -> Option<&'a [u8]> {
        let bytes = self.next(INTEGER)?;
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        bytes.get(zeros..)
    }
}

/// What certificates and lists have in common (RFC 5280 4.1.1, 5.1.1).
pub(super) struct Signed<'a> {
    /// What is signed, with its tag.
    pub(super) whole: &'a [u8],
    /// The same without.
    pub(super) content: &'a [u8],
    /// Content of the AlgorithmIdentifier.
    pub(super) algorithm: &'a [u8],
    pub(super) signature: &'a [u8],
}

impl<'a> Signed<'a> {
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let mut parts = Reader(Reader(der).next(SEQUENCE)?);
        let (_, content, whole) = parts.part()?;
        Some(Self { whole, content, algorithm: parts.next(SEQUENCE)?, signature: parts.bits()? })
    }
}

/// Of a certificate (RFC 5280 4.1); all are the contents of their parts, the serial number without leading zeros.
pub(super) struct Certificate<'a> {
    pub(super) serial: &'a [u8],
    pub(super) issuer: &'a [u8],
    pub(super) subject: &'a [u8],
    pub(super) key: &'a [u8],
}

impl<'a> Certificate<'a> {
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let mut parts = Reader(Signed::read(der)?.content);
        let _version = parts.optional(&[CONTEXT_0]);
        let serial = parts.serial()?;
        let _algorithm = parts.next(SEQUENCE)?;
        let issuer = parts.next(SEQUENCE)?;
        let _validity = parts.next(SEQUENCE)?;
        Some(Self { serial, issuer, subject: parts.next(SEQUENCE)?, key: parts.next(SEQUENCE)? })
    }
}

/// Of a revocation list (RFC 5280 5.1).
pub(super) struct List<'a> {
    pub(super) issuer: &'a [u8],
    /// Without leading zeros.
    pub(super) serials: Vec<&'a [u8]>,
}

impl<'a> List<'a> {
    pub(super) fn read(content: &'a [u8]) -> Option<Self> {
        const TIME: [u8; 2] = [UTC_TIME, GENERALIZED_TIME];
        let mut parts = Reader(content);
        let _version = parts.optional(&[INTEGER]);
        let _algorithm = parts.next(SEQUENCE)?;
        let issuer = parts.next(SEQUENCE)?;
        let (_this_update, _next_update) = (parts.optional(&TIME)?, parts.optional(&TIME));
        let mut entries = Reader(parts.optional(&[SEQUENCE]).unwrap_or_default());
        let _extensions = parts.optional(&[CONTEXT_0]);
        let mut serials = Vec::new();
        while !entries.0.is_empty() {
            serials.push(Reader(entries.next(SEQUENCE)?).serial()?);
        }
        parts.0.is_empty().then_some(Self { issuer, serials })
    }
}

/// Content of the AlgorithmIdentifier, and the key, of the content of a SubjectPublicKeyInfo.
pub(super) fn public_key(content: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut parts = Reader(content);
    Some((parts.next(SEQUENCE)?, parts.bits()?))
}
