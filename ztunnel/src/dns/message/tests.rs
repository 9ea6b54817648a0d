//! Against another implementation (hickory-proto): what is read of its messages, and what it reads of ours.

use hickory_proto::op::{Edns as HickoryEdns, Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

fn asked(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.queries.push(Question::query(Name::from_ascii(name).unwrap(), kind));
    message.edns = edns.map(|payload| {
        let mut edns = HickoryEdns::new();
        edns.set_max_payload(payload);
        edns.set_dnssec_ok(true);
        edns
    });
    message.to_vec().unwrap()
}

fn written(query: &[u8], transport: Transport, write: impl FnOnce(&mut Reply)) -> Message {
    let mut reply = Reply::new(&Query::read(query).unwrap(), transport);
    write(&mut reply);
    Message::from_vec(&reply.finish()).unwrap()
}

fn v4(n: usize) -> IpAddr {
    IpAddr::from((0x0a00_0000 + n as u32).to_be_bytes())
}

#[test]
fn ordinary_queries_are_read() {
    for (name, kind, edns) in [
        ("web.shop.svc.cluster.local.", RecordType::A, None),
        ("Example.COM.", RecordType::AAAA, Some(1232)),
        ("_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV, Some(4096)),
        ("a.", RecordType::HTTPS, Some(0)),
    ] {
        let bytes = asked(name, kind, edns);
        let query = Query::read(&bytes).expect(name);
        assert_eq!(query.name, name.trim_end_matches('.').to_ascii_lowercase());
        assert_eq!(query.kind, u16::from(kind));
        let most = edns.map_or(512, |payload| payload.clamp(512, 4096));
        assert_eq!(query.limit(Transport::Udp), usize::from(most), "{name}");
    }
}

#[test]
fn what_is_out_of_the_ordinary_is_nobodys() {
    let good = asked("web.shop.", RecordType::A, Some(1232));
    let plain = asked("web.shop.", RecordType::A, None);
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    for (why, bytes) in [
        ("a response", with(2, 0x80)),
        ("NOTIFY", with(2, 4 << 3)),
        ("truncated", with(2, TC)),
        ("no question", with(5, 0)),
        ("two questions", with(5, 2)),
        ("an answer", with(7, 1)),
        ("an authority, as in IXFR", with(9, 1)),
        ("two additional records", with(11, 2)),
        ("an additional record that is not there", {
            let mut b = plain.clone();
            b[11] = 1;
            b
        }),
        ("bytes behind it", [&plain[..], b"x"].concat()),
        ("a reference in the name", with(12, 0xc0)),
        ("a label of an unknown kind", with(12, 0x40)),
        ("a dot in a label", with(13, b'.')),
        ("another class", with(plain.len() - 1, 3)),
        ("EDNS of another version", with(plain.len() + 6, 1)),
        ("options that are not there", with(good.len() - 1, 1)),
        ("the root", asked(".", RecordType::A, None)),
        ("nothing", Vec::new()),
    ] {
        assert_eq!(Query::read(&bytes), None, "{why}");
    }
    for length in 0..good.len() {
        assert_eq!(Query::read(&good[..length]), None, "{length} bytes");
    }
    assert!(Query::read(&good).is_some());
}

#[test]
fn answers_are_read_by_others() {
    let query = asked("Web.shop.svc.cluster.local.", RecordType::A, Some(1232));
    let reply = written(&query, Transport::Udp, |reply| assert!(reply.address(v4(1), 30)));
    let question = Message::from_vec(&query).unwrap();
    assert_eq!(reply.metadata.id, 0x1234);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    assert_eq!(reply.metadata.op_code, OpCode::Query);
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(reply.metadata.authoritative && reply.metadata.recursion_desired);
    assert!(reply.metadata.recursion_available && !reply.metadata.truncation);
    assert_eq!(reply.queries, question.queries);
    assert_eq!(reply.queries[0].name().to_string(), "Web.shop.svc.cluster.local.", "in the client's case");
    let [record] = &reply.answers[..] else { panic!("{reply}") };
    assert_eq!((record.name.to_string().as_str(), record.ttl), ("Web.shop.svc.cluster.local.", 30));
    assert_eq!((record.dns_class, record.data.to_string().as_str()), (DNSClass::IN, "10.0.0.1"));
    let edns = reply.edns.expect("EDNS");
    assert!(edns.flags().dnssec_ok && edns.max_payload() == 4096 && edns.version() == 0);

    let query = asked("api.example.com.shop.svc.cluster.local.", RecordType::AAAA, None);
    let reply = written(&query, Transport::Udp, |reply| {
        assert!(reply.alias("api.example.com", 30));
        reply.address("2001:2::7".parse().unwrap(), 30);
    });
    let found: Vec<_> =
        reply.answers.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
    let alias = "api.example.com.shop.svc.cluster.local. api.example.com.";
    assert_eq!(found, [alias, "api.example.com. 2001:2::7"]);
    assert!(reply.edns.is_none());
}

#[test]
fn nothing_is_said_so_that_it_can_be_kept() {
    let query = asked("web.shop.svc.cluster.local.", RecordType::AAAA, Some(1232));
    let reply = written(&query, Transport::Udp, |reply| reply.nothing(30));
    assert!(reply.answers.is_empty() && reply.metadata.response_code == ResponseCode::NoError);
    let [record] = &reply.authorities[..] else { panic!("{reply}") };
    let RData::SOA(soa) = &record.data else { panic!("{record}") };
    assert_eq!((record.ttl, soa.minimum), (30, 30));
    assert_eq!(record.name.to_string(), "web.shop.svc.cluster.local.");
    assert_eq!(soa.rname.to_string(), "hostmaster.web.shop.svc.cluster.local.");
}

#[test]
fn what_does_not_fit_is_left_out_and_told() {
    let many = |reply: &mut Reply| (0..5000).for_each(|n| _ = reply.address(v4(n), 30));
    for (edns, transport, longest, cut) in [
        (None, Transport::Udp, 512, true),
        (Some(100), Transport::Udp, 512, true),
        (Some(1232), Transport::Udp, 1232, true),
        (Some(65_535), Transport::Udp, 4096, true),
        (None, Transport::Tcp, 65_535, true),
    ] {
        let query = asked("web.shop.svc.cluster.local.", RecordType::A, edns);
        let mut reply = Reply::new(&Query::read(&query).unwrap(), transport);
        many(&mut reply);
        let bytes = reply.finish();
        assert!(bytes.len() <= longest && bytes.len() + 16 > longest, "{} of {longest}", bytes.len());
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!(reply.metadata.truncation, cut);
        assert_eq!(reply.edns.is_some(), edns.is_some());
    }
    let query = asked("web.shop.svc.cluster.local.", RecordType::A, None);
    let reply = written(&query, Transport::Udp, |reply| (0..20).for_each(|n| _ = reply.address(v4(n), 30)));
    assert!(!reply.metadata.truncation && reply.answers.len() == 20);
}

#[test]
fn locations_come_before_their_addresses_which_may_be_missing() {
    let query = asked("_sql._tcp.db.shop.svc.cluster.local.", RecordType::SRV, Some(1232));
    let location = |n: usize| Location {
        port: 5432,
        host: format!("db-{n}.db.shop.svc.cluster.local"),
        addresses: vec![v4(n)],
    };
    let reply = |transport, count| {
        written(&query, transport, |reply| {
            (0..count).for_each(|n| assert_ne!(reply.location(location(n), 1, 30), Put::NoName))
        })
    };
    let few = reply(Transport::Udp, 5);
    assert_eq!((few.answers.len(), few.additionals.len(), few.metadata.truncation), (5, 5, false));
    for (answer, address) in few.answers.iter().zip(&few.additionals) {
        let RData::SRV(srv) = &answer.data else { panic!("{answer}") };
        assert_eq!((&srv.target, srv.port, address.ttl), (&address.name, 5432, 30));
    }
    let some = reply(Transport::Udp, 21);
    assert_eq!((some.answers.len(), some.metadata.truncation), (21, false), "only addresses are left out");
    assert!(some.additionals.len() < 21);
    let many = reply(Transport::Udp, 100);
    assert!(many.metadata.truncation && many.additionals.is_empty());
    let long = reply(Transport::Tcp, 1000);
    assert_eq!((long.answers.len(), long.metadata.truncation), (1000, false));
    assert!(!long.additionals.is_empty(), "names far behind cannot be referred to");
    let mut reply = Reply::new(&Query::read(&query).unwrap(), Transport::Udp);
    assert_eq!(reply.location(Location { host: "a..b".to_owned(), ..location(0) }, 1, 30), Put::NoName);
}

#[test]
fn failures_are_answers_to_any_query() {
    let query = asked("example.org.", RecordType::TXT, Some(1232));
    let reply = Message::from_vec(&failure(&query).unwrap()).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((reply.metadata.id, reply.queries.len(), reply.edns.is_some()), (0x1234, 1, true));
    assert!(answers(&query, &failure(&query).unwrap()));
    let odd = [&query[..5], &[9], &query[6..]].concat();
    let reply = Message::from_vec(&failure(&odd).unwrap()).unwrap();
    assert_eq!((reply.metadata.response_code, reply.queries.len()), (ResponseCode::ServFail, 0));
    assert_eq!(failure(&failure(&query).unwrap()), None, "not to an answer");
    assert_eq!(failure(b"short"), None);
}

#[test]
fn an_answer_is_one_to_the_same_question() {
    let query = asked("example.org.", RecordType::A, None);
    let response = |name, kind| {
        let mut bytes = asked(name, kind, None);
        bytes[2] |= QR;
        bytes
    };
    let headless = [&response("example.org.", RecordType::A)[..4], &[0; 8]].concat();
    for (why, response, expected) in [
        ("the same", response("example.org.", RecordType::A), true),
        ("in another case", response("eXample.ORG.", RecordType::A), true),
        ("without the question", headless, true),
        ("another name", response("example.com.", RecordType::A), false),
        ("another type", response("example.org.", RecordType::AAAA), false),
        ("the question itself", query.clone(), false),
        ("cut off", response("example.org.", RecordType::A)[..20].to_vec(), false),
        ("nothing", Vec::new(), false),
    ] {
        assert_eq!(answers(&query, &response), expected, "{why}");
    }
}

/// Whatever comes from the network: the place where a fuzzer would be hooked in.
fn digest(bytes: &[u8]) {
    let read = Query::read(bytes);
    if let Some(query) = &read {
        for transport in [Transport::Udp, Transport::Tcp] {
            let mut reply = Reply::new(query, transport);
            reply.alias("other.example.com", 30);
            reply.nothing(30);
            let host = "db-0.db.shop.svc.cluster.local".to_owned();
            reply.location(Location { port: 1, host, addresses: vec![v4(1)] }, 1, 30);
            (0..300).for_each(|n| _ = reply.address(v4(n), 30));
            let reply = reply.finish();
            assert!(reply.len() <= query.limit(transport));
            assert!(answers(bytes, &reply) && id(&reply) == id(bytes));
            Message::from_vec(&reply).expect("others can read what is answered");
        }
        Message::from_vec(bytes).expect("others can read what is read");
    }
    let _ = (is_transfer(bytes), kind(bytes), bytes.len() >= HEADER && asks(bytes));
    if let Some(failure) = failure(bytes) {
        assert!(answers(bytes, &failure));
    }
}

#[test]
fn hostile_bytes_are_only_bytes() {
    let mut random = StdRng::seed_from_u64(53);
    let corpus = [
        asked("web.shop.svc.cluster.local.", RecordType::A, Some(1232)),
        asked(&format!("{}.", vec!["x".repeat(62); 4].join(".")), RecordType::AAAA, None),
        asked("a.", RecordType::AXFR, None),
    ];
    for round in 0..200_000 {
        let mut bytes = corpus[round % corpus.len()].clone();
        for _ in 0..random.random_range(0..6) {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
        }
        bytes.truncate(random.random_range(0..=bytes.len() * 2));
        digest(&bytes);
    }
    for _ in 0..100_000 {
        let mut bytes = vec![0; random.random_range(0..64)];
        random.fill(&mut bytes[..]);
        digest(&bytes);
    }
}
