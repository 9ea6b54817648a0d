//! The `traceparent` header (W3C trace context, version 00).

use std::fmt;

/// One connection's place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// Never 0.
    pub trace_id: u128,
    /// Never 0.
    pub parent_id: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl TraceParent {
    /// A new trace, not sampled.
    pub fn random() -> Self {
        Self { trace_id: rand::random::<u128>().max(1), parent_id: rand::random::<u64>().max(1), flags: 0 }
    }

    /// None when it is not of version 00's form: the connection then starts a trace of its own.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let mut parts = header.split('-');
        let ("00", trace_id, parent_id, flags, None) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next())
        else {
            return None;
        };
        let hex = |text: &str, digits: usize| {
            let digit = |c: u8| c.is_ascii_digit() || matches!(c, b'a'..=b'f');
            let right = text.len() == digits && text.bytes().all(digit);
            right.then(|| u128::from_str_radix(text, 16).ok()).flatten()
        };
        let trace_id = hex(trace_id, 32).filter(|id| *id != 0)?;
        let parent_id = u64::try_from(hex(parent_id, 16)?).ok().filter(|id| *id != 0)?;
        Some(Self { trace_id, parent_id, flags: u8::try_from(hex(flags, 2)?).ok()? })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.parent_id, self.flags)
    }
}
