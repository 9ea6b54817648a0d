//! In-pod routing: what is bound to lo, and what the app answers to the proxy, stays on lo.
//!
//! One table with one route, `local default dev lo src <pod address>` (without the source a captured connection
//! would get its destination as its source), and two rules that lead to it: `oif lo` for captured sockets and the
//! proxy's upstream ones, `fwmark` for the app's replies to the proxy.
//! Spoken over netlink from inside the namespace: there may be no `ip` binary on the node.

use std::io;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{LinkFlags, LinkLayerType};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, RouteMessageBuilder, new_connection};

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
    /// Priority of the first of two rules inside pods.
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
}

/// Adds rules and route in the calling thread's network namespace; what is there already is left.
///
/// # Errors
/// When the kernel refuses; what this call added is removed.
pub(super) fn add(numbers: Numbers, address: Ipv4Addr) -> io::Result<()> {
    let result = talk(async move |handle| {
        let route = route(numbers, address);
        existing_is_fine(handle.route().add(route).replace().execute().await)?;
        for rule in rules(numbers) {
            let mut request = handle.rule().add();
            *request.message_mut() = rule;
            existing_is_fine(request.execute().await)?;
        }
        Ok(())
    });
    result.inspect_err(|_| {
        // The first error says what is wrong.
        let _ = remove(numbers, address);
    })
}

/// Removes rules and route; what is gone already is fine.
///
/// # Errors
/// When the kernel refuses; the others are removed.
pub(super) fn remove(numbers: Numbers, address: Ipv4Addr) -> io::Result<()> {
    talk(async move |handle| {
        let mut result = Ok(());
        for rule in rules(numbers) {
            result = result.and(missing_is_fine(handle.rule().del(rule).execute().await));
        }
        result.and(missing_is_fine(handle.route().del(route(numbers, address)).execute().await))
    })
}

/// The interfaces but lo of the calling thread's network namespace.
///
/// # Errors
/// When netlink fails.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    talk(async |handle| {
        let links: Vec<_> = handle.link().get().execute().try_collect().await.map_err(kernel)?;
        Ok(links
            .iter()
            .filter(|link| !link.header.flags.contains(LinkFlags::Loopback))
            .map(|link| Interface {
                index: link.header.index,
                ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            })
            .collect())
    })
}

fn route(numbers: Numbers, address: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .table_id(numbers.table)
        .output_interface(LOOPBACK)
        .pref_source(address)
        .build()
}

fn rules(numbers: Numbers) -> [RuleMessage; 2] {
    let rule = |priority, selector| {
        let mut rule = RuleMessage::default();
        rule.header.family = AddressFamily::Inet;
        rule.header.action = RuleAction::ToTable;
        rule.attributes =
            vec![RuleAttribute::Priority(priority), RuleAttribute::Table(numbers.table), selector];
        rule
    };
    [
        rule(numbers.priority, RuleAttribute::Oifname("lo".to_owned())),
        rule(numbers.priority + 1, RuleAttribute::FwMark(numbers.mark)),
    ]
}

/// One netlink conversation, in the calling thread's network namespace.
fn talk<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
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

fn missing_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    unless(unless(result.map_err(kernel), libc::ENOENT), libc::ESRCH)
}

fn unless(result: io::Result<()>, errno: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

fn kernel(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
