//! In-pod routing: what is bound to lo, and what the app answers to the proxy, stays on lo.
//!
//! For each family of the pod's addresses one table with one route, `local default dev lo src <pod address>` (without
//! the source a captured connection would get its destination as its source), and two rules that lead to it: `oif lo`
//! for captured sockets and the proxy's upstream ones, `fwmark` for the app's replies to the proxy. A third one,
//! `iif lo ipproto udp dport 53 fwmark 0`, turns the app's DNS queries back; the proxy's own are marked.
//! Spoken over netlink from inside the namespace: there may be no `ip` binary on the node.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use mesh_ebpf_abi::DNS_PORT;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::IpProtocol;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder, new_connection};

/// lo, in every network namespace.
const LOOPBACK: u32 = 1;

/// The numbers used inside pods. Table and priority can be changed where they collide with a CNI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
#[group(skip)]
pub struct Numbers {
    /// Mark of the proxy's connections to the app; ztunnel and the programs have it built in.
    #[arg(skip = Self::default().mark)]
    pub mark: u32,
    /// Routing table inside pods.
    #[arg(long = "route-table", env = "AMBIT_ROUTE_TABLE", default_value_t = Self::default().table)]
    pub table: u32,
    /// Priority of the first of three rules inside pods.
    #[arg(long = "rule-priority", env = "AMBIT_RULE_PRIORITY", default_value_t = Self::default().priority)]
    pub priority: u32,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { mark: mesh_ebpf_abi::MARK_UPSTREAM, table: 1337, priority: 100 }
    }
}

/// An interface that packets leave by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// Its index.
    pub index: u32,
    /// Whether its frames begin with an Ethernet header.
    pub ethernet: bool,
    /// Of a veth whose other end is in another network namespace, the index that this has there.
    pub peer: Option<u32>,
}

/// Interfaces of a pod that are looked at: who administers its network can make any number of them, and each costs the
/// agent time (the kernel waits for its processors after each program), descriptors and pins.
pub(super) const MAX_INTERFACES: usize = 16;

/// How long an address may be under duplicate address detection (RFC 4862: a second after its random start).
const DETECTION: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// Whether the calling thread's network namespace has the address, once duplicate address detection is through with
/// it: before, the kernel takes it for no route's source.
///
/// # Errors
/// When netlink fails.
pub(super) fn has(address: IpAddr) -> io::Result<bool> {
    let patience = Instant::now() + DETECTION;
    loop {
        let found = talk(async |handle| {
            let all: Vec<_> = handle.address().get().execute().try_collect().await.map_err(kernel)?;
            let this = AddressAttribute::Address(address);
            Ok(all.iter().find(|one| one.attributes.contains(&this)).map(|one| one.header.flags))
        })?;
        let Some(flags) = found else { return Ok(false) };
        if flags.contains(AddressHeaderFlags::Dadfailed) {
            return Ok(false);
        }
        if !flags.contains(AddressHeaderFlags::Tentative) || flags.contains(AddressHeaderFlags::Optimistic) {
            return Ok(true);
        }
        if Instant::now() >= patience {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
}

/// What there is for one of a pod's addresses.
#[derive(Debug)]
pub(super) struct There {
    /// The address itself.
    pub address: bool,
    /// What is gone of what `add` made, in words.
    pub missing: Vec<&'static str>,
    /// What `capture_dns` makes.
    pub dns: bool,
}

/// What there is in the calling thread's network namespace: interfaces, and for each of these addresses what is made for
/// it. All in one conversation: this is asked again and again.
///
/// # Errors
/// When netlink fails.
pub(super) fn look(numbers: Numbers, addresses: &[IpAddr]) -> io::Result<(Interfaces, Vec<There>)> {
    talk(async |handle| {
        let interfaces = interfaces_of(&handle).await?;
        let all: Vec<_> = handle.address().get().execute().try_collect().await.map_err(kernel)?;
        let mut found = Vec::new();
        for address in addresses {
            let this = AddressAttribute::Address(*address);
            let known = all.iter().any(|one| one.attributes.contains(&this));
            found.push(there(&handle, numbers, *address, known).await?);
        }
        Ok((interfaces, found))
    })
}

async fn there(handle: &Handle, numbers: Numbers, ip: IpAddr, address: bool) -> io::Result<There> {
    let wanted = route(numbers, ip);
    let mut dump = RouteMessage::default();
    dump.header.address_family = wanted.header.address_family;
    let routes: Vec<_> = handle.route().get(dump).execute().try_collect().await.map_err(kernel)?;
    let found = rules_of(handle, ip).await?;
    let same = |one: &RouteMessage| {
        one.header.kind == wanted.header.kind && has_all(&one.attributes, &wanted.attributes)
    };
    let [lo, mark] = rules(numbers, ip);
    let made = [
        ("route to lo", routes.iter().any(same)),
        ("rule for lo", is_there(&lo, &found)),
        ("rule for the proxy's mark", is_there(&mark, &found)),
    ];
    Ok(There {
        address,
        missing: made.into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect(),
        dns: is_there(&queries(numbers, ip), &found),
    })
}

async fn rules_of(handle: &Handle, address: IpAddr) -> io::Result<Vec<RuleMessage>> {
    let version = if address.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 };
    handle.rule().get(version).execute().try_collect().await.map_err(kernel)
}

fn is_there(rule: &RuleMessage, among: &[RuleMessage]) -> bool {
    // The kernel does not tell a mark that is zero.
    let told = |one: &&RuleAttribute| **one != RuleAttribute::FwMark(0);
    let wanted: Vec<_> = rule.attributes.iter().filter(told).cloned().collect();
    among.iter().any(|one| one.header.action == rule.header.action && has_all(&one.attributes, &wanted))
}

fn has_all<T: PartialEq>(among: &[T], wanted: &[T]) -> bool {
    wanted.iter().all(|one| among.contains(one))
}

/// Adds the rules and the routes of the addresses' families in the calling thread's network namespace; what is there
/// already is left. Captured connections get the address of their family as their source.
///
/// # Errors
/// When the kernel refuses; of that family, what this call added is removed.
pub(super) fn add(numbers: Numbers, addresses: &[IpAddr]) -> io::Result<()> {
    talk(async move |handle| {
        for address in addresses {
            if let Err(error) = add_one(&handle, numbers, *address).await {
                // The first error says what is wrong.
                let _ = remove_one(&handle, numbers, *address).await;
                return Err(error);
            }
        }
        Ok(())
    })
}

async fn add_one(handle: &Handle, numbers: Numbers, address: IpAddr) -> io::Result<()> {
    existing_is_fine(handle.route().add(route(numbers, address)).replace().execute().await)?;
    for rule in rules(numbers, address) {
        let mut request = handle.rule().add();
        *request.message_mut() = rule;
        existing_is_fine(request.execute().await)?;
    }
    Ok(())
}

/// Removes the rules and the routes of the addresses' families; what is gone already is fine.
///
/// # Errors
/// When the kernel refuses; the others are removed.
pub(super) fn remove(numbers: Numbers, addresses: &[IpAddr]) -> io::Result<()> {
    talk(async move |handle| {
        let mut result = Ok(());
        for address in addresses {
            result = result.and(remove_one(&handle, numbers, *address).await);
        }
        result
    })
}

async fn remove_one(handle: &Handle, numbers: Numbers, address: IpAddr) -> io::Result<()> {
    let mut result = Ok(());
    for rule in rules(numbers, address) {
        result = result.and(missing_is_fine(handle.rule().del(rule).execute().await));
    }
    result.and(missing_is_fine(handle.route().del(route(numbers, address)).execute().await))
}

/// Has the app's DNS queries of the addresses' families turned back to lo, in the calling thread's network namespace, or
/// no longer.
///
/// # Errors
/// The first one; the others are done.
pub(super) fn capture_dns(numbers: Numbers, addresses: &[IpAddr], captured: bool) -> io::Result<()> {
    talk(async move |handle| {
        let mut result = Ok(());
        for address in addresses {
            let queries = queries(numbers, *address);
            result = result.and(if captured {
                let mut request = handle.rule().add();
                *request.message_mut() = queries;
                existing_is_fine(request.execute().await)
            } else {
                missing_is_fine(handle.rule().del(queries).execute().await)
            });
        }
        result
    })
}

/// The interfaces but lo of a network namespace.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    /// Those that are looked at: the oldest, as kernels tell of them since 6.7.
    pub seen: Vec<Interface>,
    /// There are more.
    pub more: bool,
}

/// The interfaces but lo of the calling thread's network namespace, so many of them at most.
///
/// # Errors
/// When netlink fails.
pub(super) fn interfaces() -> io::Result<Interfaces> {
    talk(async |handle| interfaces_of(&handle).await)
}

async fn interfaces_of(handle: &Handle) -> io::Result<Interfaces> {
    let (mut links, mut found) = (handle.link().get().execute(), Interfaces::default());
    while let Some(link) = links.try_next().await.map_err(kernel)? {
        if link.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        if found.seen.len() == MAX_INTERFACES {
            found.more = true;
            break;
        }
        found.seen.push(Interface {
            index: link.header.index,
            ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            peer: peer(&link).map(|(index, _)| index),
        });
    }
    Ok(found)
}

/// Index of a veth's other end in another network namespace, and the number that this has here.
pub(super) fn peer(link: &LinkMessage) -> Option<(u32, i32)> {
    let all = &link.attributes;
    let of_kind = |one: &LinkAttribute| match one {
        LinkAttribute::LinkInfo(info) => info.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    };
    let index = |one: &LinkAttribute| match one {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    };
    let netns = |one: &LinkAttribute| match one {
        LinkAttribute::LinkNetNsId(id) => Some(*id),
        _ => None,
    };
    all.iter().any(of_kind).then(|| Some((all.iter().find_map(index)?, all.iter().find_map(netns)?)))?
}

fn route(numbers: Numbers, address: IpAddr) -> RouteMessage {
    let mut route = match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new().pref_source(address).build(),
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new().pref_source(address).build(),
    };
    (route.header.kind, route.header.scope) = (RouteType::Local, RouteScope::Host);
    route.header.table = RouteHeader::RT_TABLE_UNSPEC;
    route.attributes.extend([RouteAttribute::Table(numbers.table), RouteAttribute::Oif(LOOPBACK)]);
    route
}

fn rules(numbers: Numbers, address: IpAddr) -> [RuleMessage; 2] {
    [
        rule(numbers, address, 0, [RuleAttribute::Oifname("lo".to_owned())]),
        rule(numbers, address, 1, [RuleAttribute::FwMark(numbers.mark)]),
    ]
}

/// `iif lo` is what is sent from here. Without it the kernel would look at the ports of what comes in as well, ask the
/// rules where an answer to it went, and drop what a DNS server sends as if it came from the pod (reverse path filter).
/// Without a mask, no mark would be any mark.
fn queries(numbers: Numbers, address: IpAddr) -> RuleMessage {
    let port = RulePortRange { start: DNS_PORT, end: DNS_PORT };
    let selectors = [
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::IpProtocol(IpProtocol::Udp),
        RuleAttribute::DestinationPortRange(port),
        RuleAttribute::FwMark(0),
        RuleAttribute::FwMask(u32::MAX),
    ];
    rule(numbers, address, 2, selectors)
}

fn rule(
    numbers: Numbers,
    address: IpAddr,
    place: u32,
    selectors: impl IntoIterator<Item = RuleAttribute>,
) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    rule.header.action = RuleAction::ToTable;
    rule.attributes =
        vec![RuleAttribute::Priority(numbers.priority + place), RuleAttribute::Table(numbers.table)];
    rule.attributes.extend(selectors);
    rule
}

/// One netlink conversation, in the calling thread's network namespace.
///
/// # Errors
/// As of `work`, and when there is no netlink.
pub(super) fn talk<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection()?;
        tokio::select! {
            result = work(handle) => result,
            () = connection => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    })
}

fn existing_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    unless(result.map_err(kernel), libc::EEXIST)
}

/// So is a family that the kernel does not have.
fn missing_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    let missing = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
    missing.into_iter().fold(result.map_err(kernel), unless)
}

/// `result`, but that one error is fine.
///
/// # Errors
/// Any other.
pub(super) fn unless(result: io::Result<()>, errno: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

/// What the kernel answered.
pub(super) fn kernel(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
