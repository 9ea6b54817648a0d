//! DNS messages (RFC 1035, RFC 6891), as far as the proxy has to understand them: the header, the one question and
//! whether there is an OPT record; and the few records that it answers with.
//!
//! No DNS library: what is not the mesh's has to go on as it came, so there is nothing to be parsed but what decides
//! whose it is, and the less code hostile bytes meet the better. A query with anything out of the ordinary is nobody's
//! that we know: it is forwarded, and the upstream server says what is wrong with it.

use std::net::IpAddr;

/// Length of the header.
pub const HEADER: usize = 12;
/// Longest UDP message without EDNS (RFC 1035, section 4.2.1).
const PLAIN_UDP: usize = 512;
/// What is offered and used at most with EDNS; answers go over lo, where nothing is fragmented.
const MOST_UDP: u16 = 4096;

/// Type A.
pub const A: u16 = 1;
/// Type SOA.
const SOA: u16 = 6;
/// Type CNAME.
const CNAME: u16 = 5;
/// Type AAAA.
pub const AAAA: u16 = 28;
/// Type SRV (RFC 2782).
pub const SRV: u16 = 33;
/// Type OPT (RFC 6891).
const OPT: u16 = 41;
/// Type IXFR (RFC 1995).
const IXFR: u16 = 251;
/// Type AXFR (RFC 5936).
const AXFR: u16 = 252;
const CLASS_IN: u16 = 1;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const RA: u8 = 0x80;
const CD: u8 = 0x10;
/// RCODE 2: the server could not.
const SERVFAIL: u8 = 2;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    /// The label `request_protocol`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// An ordinary query: one question of class IN, and at most an OPT record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query<'a> {
    /// Header and question, as they came.
    head: &'a [u8],
    /// The name in lower case, without the last dot.
    pub name: String,
    /// Type of the records that are asked for.
    pub kind: u16,
    edns: Option<Edns>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edns {
    /// What the client can take over UDP.
    payload: u16,
    /// DNSSEC OK, to be copied (RFC 3225).
    dnssec: bool,
}

impl<'a> Query<'a> {
    /// Reads a message; none if it is not such a query, or the name has labels that no host name has.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        if !is_query(bytes) || bytes[2] & (OPCODE | TC) != 0 || counts(bytes)[..3] != [1, 0, 0] {
            return None;
        }
        let end = question_end(bytes)?;
        let [kind, class] = words(bytes.get(end - 4..end)?);
        if class != CLASS_IN {
            return None;
        }
        let edns = match (counts(bytes)[3], bytes.get(end..)?) {
            (0, []) => None,
            (1, rest) => Some(Edns::read(rest)?),
            _ => return None,
        };
        let name = host_name(&bytes[HEADER..end - 4])?;
        Some(Self { head: &bytes[..end], name, kind, edns })
    }

    /// How long an answer may be.
    fn limit(&self, transport: Transport) -> usize {
        match (transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => PLAIN_UDP,
            (Transport::Udp, Some(edns)) => usize::from(edns.payload.min(MOST_UDP)).max(PLAIN_UDP),
        }
    }
}

impl Edns {
    /// An OPT record of version 0 that is all there is.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (fixed, options) = bytes.split_at_checked(11)?;
        let [kind, payload] = words(&fixed[1..5]);
        let [flags, length] = words(&fixed[7..11]);
        let version = fixed[6];
        let whole = fixed[0] == 0 && kind == OPT && version == 0 && options.len() == usize::from(length);
        whole.then_some(Self { payload, dnssec: flags & 0x8000 != 0 })
    }
}

/// Whether the bytes have the header of a query. Of nothing else it is known that somebody waits for an answer.
pub fn is_query(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER && bytes[2] & QR == 0
}

/// Whether a TCP stream that begins with a message of this header is a client's that sends questions, each of which has
/// one answer; not so a transfer, which [`is_transfer`] tells, or what is no DNS at all.
pub fn asks(header: &[u8]) -> bool {
    is_query(header) && header[2] & OPCODE == 0 && counts(header)[..2] == [1, 0]
}

/// Whether the answer may be many messages.
pub fn is_transfer(bytes: &[u8]) -> bool {
    kind(bytes).is_some_and(|kind| matches!(kind, AXFR | IXFR))
}

/// The type that a message asks for, if it asks one question.
pub fn kind(bytes: &[u8]) -> Option<u16> {
    let question = question(bytes)?;
    Some(words::<2>(&question[question.len() - 4..])[0])
}

/// The message's identifier.
pub fn id(bytes: &[u8]) -> Option<[u8; 2]> {
    bytes.first_chunk().copied()
}

/// Gives the message another identifier.
pub fn set_id(bytes: &mut [u8], id: [u8; 2]) {
    if let Some(place) = bytes.first_chunk_mut() {
        *place = id;
    }
}

/// Whether a message is the answer to this query, identifiers apart: a response, to the same question. A server that
/// could not read the question may leave it out.
pub fn answers(query: &[u8], response: &[u8]) -> bool {
    if response.len() < HEADER || response[2] & QR == 0 {
        return false;
    }
    match (question(query), counts(response)[0]) {
        (None, _) | (Some(_), 0) => true,
        (Some(asked), _) => question(response).is_some_and(|about| about.eq_ignore_ascii_case(asked)),
    }
}

/// The answer that there is none: SERVFAIL. Nothing to what is no query.
pub fn failure(query: &[u8]) -> Option<Vec<u8>> {
    if !is_query(query) {
        return None;
    }
    let end = HEADER + question(query).map_or(0, <[u8]>::len);
    let mut bytes = query[..end].to_vec();
    let edns = Query::read(query).and_then(|query| query.edns);
    finish(&mut bytes, 0, SERVFAIL, [u16::from(end > HEADER), 0, 0], 0, edns);
    Some(bytes)
}

/// A record's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner(u16);

/// Where the question's name is in every message.
const QUESTION: Owner = Owner(HEADER as u16);

/// An answer that is being written. What does not fit is left out, and the client told (TC).
#[derive(Debug)]
pub struct Reply {
    bytes: Vec<u8>,
    edns: Option<Edns>,
    limit: usize,
    /// Whose addresses these are: the question's name, or that of the alias.
    owner: Owner,
    counts: [u16; 3],
    truncated: bool,
    /// Hosts whose names are in the message, for how long their addresses are good, and these.
    hosts: Vec<(Owner, u32, Vec<IpAddr>)>,
}

/// Where a service, or one pod of it, is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The port.
    pub port: u16,
    /// The host's name.
    pub host: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is in the message.
    Whole,
    /// There is no room for it, and the client is told.
    NoRoom,
    /// There is no such name.
    NoName,
}

impl Reply {
    /// Nothing is in it yet.
    pub fn new(query: &Query<'_>, transport: Transport) -> Self {
        let opt = if query.edns.is_some() { 11 } else { 0 };
        let limit = query.limit(transport) - opt;
        let (bytes, owner) = (query.head.to_vec(), QUESTION);
        let hosts = Vec::new();
        Self { bytes, edns: query.edns, limit, owner, counts: [1, 0, 0], truncated: false, hosts }
    }

    /// What was asked for is another name of `target`, which the rest is about. False if there is no such name.
    pub fn alias(&mut self, target: &str, ttl: u32) -> bool {
        let Some(name) = wire_name(target) else { return false };
        let Some(at) = self.record(self.owner, CNAME, ttl, &name) else { return false };
        self.counts[1] += 1;
        self.owner = Owner(at);
        true
    }

    /// An address. False if there is no room for it.
    pub fn address(&mut self, ip: IpAddr, ttl: u32) -> bool {
        let written = match ip {
            IpAddr::V4(ip) => self.record(self.owner, A, ttl, &ip.octets()),
            IpAddr::V6(ip) => self.record(self.owner, AAAA, ttl, &ip.octets()),
        };
        match written {
            Some(_) => self.counts[1] += 1,
            None => self.truncated = true,
        }
        !self.truncated
    }

    /// A place of the service, all of which are equal.
    pub fn location(&mut self, location: Location, weight: u16, ttl: u32) -> Put {
        let Some(name) = wire_name(&location.host) else { return Put::NoName };
        let mut data = Vec::with_capacity(6 + name.len());
        for word in [0, weight, location.port] {
            data.extend(word.to_be_bytes());
        }
        let before = data.len();
        data.extend(name);
        match self.record(self.owner, SRV, ttl, &data) {
            Some(at) => {
                self.counts[1] += 1;
                self.hosts.push((Owner(at.saturating_add(before as u16)), ttl, location.addresses));
            }
            None => {
                self.truncated = true;
                return Put::NoRoom;
            }
        }
        Put::Whole
    }

    /// That the name has no record of the type, for so many seconds (RFC 2308): the name's own zone says so.
    pub fn nothing(&mut self, ttl: u32) {
        let owner = pointer(self.owner);
        let mut data = owner.to_vec();
        data.extend(b"\x0ahostmaster");
        data.extend(owner);
        for number in [1, 7200, 1800, 86_400, ttl] {
            data.extend(u32::to_be_bytes(number));
        }
        if self.record(self.owner, SOA, ttl, &data).is_some() {
            self.counts[2] += 1;
        }
    }

    /// Everything, with the right counts.
    pub fn finish(mut self) -> Vec<u8> {
        let flags = if self.truncated { AA | TC } else { AA };
        let additional = self.additional();
        finish(&mut self.bytes, flags, 0, self.counts, additional, self.edns);
        self.bytes
    }

    /// Writes the hosts' addresses, as far as there is room: what is left out the client can ask for. How many.
    fn additional(&mut self) -> u16 {
        let mut written = 0;
        // Further behind names cannot be referred to.
        for (owner, ttl, addresses) in std::mem::take(&mut self.hosts) {
            if owner.0 >= 0x4000 {
                break;
            }
            for ip in addresses {
                let record = match ip {
                    IpAddr::V4(ip) => self.record(owner, A, ttl, &ip.octets()),
                    IpAddr::V6(ip) => self.record(owner, AAAA, ttl, &ip.octets()),
                };
                written += u16::from(record.is_some());
            }
        }
        written
    }

    /// Where its data begins; none if it does not fit.
    fn record(&mut self, owner: Owner, kind: u16, ttl: u32, data: &[u8]) -> Option<u16> {
        let length = u16::try_from(data.len()).ok()?;
        let at = self.bytes.len() + 12;
        if self.truncated || at + data.len() > self.limit {
            return None;
        }
        self.bytes.extend(pointer(owner));
        for word in [kind, CLASS_IN] {
            self.bytes.extend(word.to_be_bytes());
        }
        self.bytes.extend(ttl.to_be_bytes());
        self.bytes.extend(length.to_be_bytes());
        self.bytes.extend(data);
        u16::try_from(at).ok()
    }
}

/// Header of an answer and, where the client has EDNS, its OPT record.
fn finish(
    bytes: &mut Vec<u8>,
    flags: u8,
    code: u8,
    [questions, answers, authorities]: [u16; 3],
    additional: u16,
    edns: Option<Edns>,
) {
    if let Some(edns) = edns {
        bytes.push(0);
        for word in [OPT, MOST_UDP, 0, if edns.dnssec { 0x8000 } else { 0 }, 0] {
            bytes.extend(word.to_be_bytes());
        }
    }
    bytes[2] = QR | flags | (bytes[2] & (OPCODE | RD));
    bytes[3] = RA | code | (bytes[3] & CD);
    let additional = additional + u16::from(edns.is_some());
    for (place, count) in
        bytes[4..HEADER].chunks_exact_mut(2).zip([questions, answers, authorities, additional])
    {
        place.copy_from_slice(&count.to_be_bytes());
    }
}

/// A reference to a name in the message (RFC 1035, section 4.1.4).
fn pointer(Owner(at): Owner) -> [u8; 2] {
    (0xc000 | at).to_be_bytes()
}

/// The sections' counts. The bytes are a header at least.
fn counts(bytes: &[u8]) -> [u16; 4] {
    words(&bytes[4..HEADER])
}

/// The first words of `bytes`, which has as many.
fn words<const N: usize>(bytes: &[u8]) -> [u16; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(2)) {
        *word = u16::from_be_bytes([bytes[0], bytes[1]]);
    }
    words
}

/// The one question of a message, name, type and class; none if there is none, or more, or it cannot be read.
fn question(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.len() < HEADER || counts(bytes)[0] != 1 {
        return None;
    }
    Some(&bytes[HEADER..question_end(bytes)?])
}

/// Where the first question ends. Its name has no references: there is nothing before it to refer to.
fn question_end(bytes: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match usize::from(*bytes.get(at)?) {
            0 => break,
            length if length < 64 => at += 1 + length,
            _ => return None,
        }
    }
    let end = at + 5;
    (end <= bytes.len() && at + 1 - HEADER <= 255).then_some(end)
}

/// A name as text, if it has only labels as host names and services have them.
fn host_name(mut wire: &[u8]) -> Option<String> {
    let mut name = String::with_capacity(wire.len());
    while let Some((length, rest)) = wire.split_first()
        && *length > 0
    {
        let (label, rest) = rest.split_at_checked(usize::from(*length))?;
        if !name.is_empty() {
            name.push('.');
        }
        for byte in label {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(*byte)),
                b'A'..=b'Z' => name.push(char::from(byte.to_ascii_lowercase())),
                _ => return None,
            }
        }
        wire = rest;
    }
    (!name.is_empty()).then_some(name)
}

/// A name as in messages; none for what cannot be one.
fn wire_name(name: &str) -> Option<Vec<u8>> {
    let mut wire = Vec::with_capacity(name.len() + 2);
    for label in name.split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..64).contains(length))?;
        wire.push(length);
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    (wire.len() <= 255).then_some(wire)
}

#[cfg(test)]
mod tests;
