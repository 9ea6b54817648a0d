//! Policies thrown together at random, decided as they are compiled and by a reference that is slow and plain.

use super::*;

/// The same throws for the same seed (the multiplier is Knuth's).
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.below(sides) == 0
    }

    /// Few, often none.
    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = if self.one_in(2) { 0 } else { self.below(most + 1) };
        (0..count).map(|_| make(self)).collect()
    }
}

const NAMES: [&str; 3] = ["a", "ab", "b"];
const PORTS: [u16; 3] = [80, 81, 443];

fn name(dice: &mut Dice) -> &'static str {
    NAMES[dice.below(NAMES.len())]
}

/// Of an address below 10.0.0.0/30, or a prefix of several.
fn address(dice: &mut Dice) -> wire::Address {
    prefix(&[10, 0, 0, dice.below(4) as u8], [0, 30, 31, 32][dice.below(4)])
}

fn pattern(dice: &mut Dice, texts: &[String]) -> wire::StringMatch {
    let text = texts[dice.below(texts.len())].clone();
    let cut = dice.below(text.len() + 1);
    let match_type = match dice.below(4) {
        0 => MatchType::Prefix(text[..cut].to_owned()),
        1 => MatchType::Suffix(text[cut..].to_owned()),
        2 => MatchType::Presence(wire::Presence {}),
        _ => MatchType::Exact(text),
    };
    wire::StringMatch { match_type: Some(match_type) }
}

fn one_match(dice: &mut Dice) -> wire::Match {
    let namespaces: Vec<String> = NAMES.map(str::to_owned).into();
    let principals: Vec<String> =
        NAMES.iter().flat_map(|ns| NAMES.map(|sa| format!("td/ns/{ns}/sa/{sa}"))).collect();
    let account = |dice: &mut Dice| account(name(dice), name(dice));
    let port = |dice: &mut Dice| u32::from(PORTS[dice.below(PORTS.len())]);
    wire::Match {
        namespaces: dice.some(2, |dice| pattern(dice, &namespaces)),
        not_namespaces: dice.some(1, |dice| pattern(dice, &namespaces)),
        principals: dice.some(2, |dice| pattern(dice, &principals)),
        not_principals: dice.some(1, |dice| pattern(dice, &principals)),
        service_accounts: dice.some(2, account),
        not_service_accounts: dice.some(1, account),
        source_ips: dice.some(2, address),
        not_source_ips: dice.some(1, address),
        destination_ips: dice.some(2, address),
        not_destination_ips: dice.some(1, address),
        destination_ports: dice.some(2, port),
        not_destination_ports: dice.some(1, port),
        extensions: Vec::new(),
    }
}

fn authorization(dice: &mut Dice, number: usize) -> wire::Authorization {
    let clause = |dice: &mut Dice| dice.some(3, one_match);
    let rule = |dice: &mut Dice| self::rule(dice.some(2, clause));
    let action = if dice.one_in(2) { wire::Action::Allow } else { wire::Action::Deny };
    let dry_run = dice.one_in(5);
    wire::Authorization { dry_run, ..policy(&number.to_string(), action, dice.some(3, rule)) }
}

/// Who asks, in texts and numbers.
#[derive(Debug)]
struct Who {
    /// Namespace and service account.
    peer: Option<(&'static str, &'static str)>,
    source: u32,
    destination: u32,
    port: u16,
}

impl Who {
    fn connection(&self) -> Connection {
        let peer = self.peer.map(|(ns, sa)| format!("spiffe://td/ns/{ns}/sa/{sa}").parse().unwrap());
        let ip = |number: u32| std::net::Ipv4Addr::from(number);
        let (client, target) = ((ip(self.source), 999).into(), (ip(self.destination), self.port).into());
        let (client, target): (std::net::SocketAddr, std::net::SocketAddr) = (client, target);
        Connection { peer, client: client.into(), target: target.into() }
    }
}

/// A DENY that matches denies; then, if there is an ALLOW, one has to match (`wire.md`, and Istio's ztunnel).
fn allowed(policies: &[wire::Authorization], who: &Who) -> bool {
    let in_force = |action: wire::Action| {
        policies.iter().filter(move |policy| policy.action() == action && !policy.dry_run).collect::<Vec<_>>()
    };
    let (denies, allows) = (in_force(wire::Action::Deny), in_force(wire::Action::Allow));
    let matches = |policy: &&wire::Authorization| policy.rules.iter().any(|rule| rule_matches(rule, who));
    !denies.iter().any(matches) && (allows.is_empty() || allows.iter().any(matches))
}

fn rule_matches(rule: &wire::Rule, who: &Who) -> bool {
    for clause in &rule.clauses {
        if clause.matches.is_empty() {
            continue;
        }
        let said = |one: &&wire::Match| **one != wire::Match::default();
        if !clause.matches.iter().filter(said).any(|one| match_matches(one, who)) {
            return false;
        }
    }
    true
}

fn match_matches(one: &wire::Match, who: &Who) -> bool {
    let namespace = who.peer.map(|(ns, _)| ns.to_owned());
    let principal = who.peer.map(|(ns, sa)| format!("td/ns/{ns}/sa/{sa}"));
    let is = |text: &Option<String>, pattern: &wire::StringMatch| {
        text.as_ref().is_some_and(|text| match pattern.match_type.as_ref().unwrap() {
            MatchType::Exact(wanted) => text == wanted,
            MatchType::Prefix(start) => text.strip_prefix(start.as_str()).is_some(),
            MatchType::Suffix(end) => text.strip_suffix(end.as_str()).is_some(),
            MatchType::Presence(_) => true,
        })
    };
    let is_account =
        |one: &wire::ServiceAccountMatch| who.peer == Some((&*one.namespace, &*one.service_account));
    let within = |ip: u32, prefix: &wire::Address| {
        let network = u32::from_be_bytes(prefix.address.clone().try_into().unwrap());
        prefix.length == 0 || (ip ^ network) >> (32 - prefix.length) == 0
    };
    [
        given(&one.namespaces, &one.not_namespaces, |text| is(&namespace, text)),
        given(&one.principals, &one.not_principals, |text| is(&principal, text)),
        given(&one.service_accounts, &one.not_service_accounts, is_account),
        given(&one.source_ips, &one.not_source_ips, |prefix| within(who.source, prefix)),
        given(&one.destination_ips, &one.not_destination_ips, |prefix| within(who.destination, prefix)),
        given(&one.destination_ports, &one.not_destination_ports, |port| *port == u32::from(who.port)),
    ]
    .iter()
    .all(|holds| *holds)
}

fn given<T>(any: &[T], none: &[T], is: impl Fn(&T) -> bool) -> bool {
    let excluded = none.iter().any(&is);
    let wanted = any.is_empty() || any.iter().any(&is);
    wanted && !excluded
}

#[test]
fn decides_as_the_reference_does() {
    let (mut let_in, mut refused) = (0, 0);
    for seed in 0..20_000 {
        let mut dice = Dice(seed);
        let policies: Vec<_> = (0..dice.below(4)).map(|number| authorization(&mut dice, number)).collect();
        let compiled = applying(&policies);
        for _ in 0..4 {
            let peer = (!dice.one_in(4)).then(|| (name(&mut dice), name(&mut dice)));
            let ip = |dice: &mut Dice| 0x0a00_0000 + dice.below(4) as u32;
            let (source, destination) = (ip(&mut dice), ip(&mut dice));
            let who = Who { peer, source, destination, port: PORTS[dice.below(PORTS.len())] };
            let decision = decide(&compiled, &who.connection());
            let expect = allowed(&policies, &who);
            assert_eq!(
                decision == Decision::Allow,
                expect,
                "seed {seed}: {who:?}, {policies:#?}: {decision:?}"
            );
            *(if expect { &mut let_in } else { &mut refused }) += 1;
        }
    }
    assert!(let_in > 20_000 && refused > 20_000, "{let_in} let in and {refused} refused prove little");
}
