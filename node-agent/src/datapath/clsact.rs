//! Programs on an interface where the kernel has no tcx: filters (cls_bpf, direct action) of its clsact qdisc.
//!
//! A filter belongs to the interface, not to a descriptor or a pin: it goes on without agent and bpffs, and nothing but
//! netlink from inside its network namespace takes it off. Priority and handle are the same for every agent, so the next
//! one finds the filter and puts its own program into it: the kernel swaps them at once (cls_bpf_change()).
//! All calls are about the calling thread's network namespace.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::bpf;
use super::rules::{self, kernel, talk, unless};

/// Before all others: a filter whose verdict ends the chain must not decide without ours. Of one priority the kernel asks
/// the filter first that came last, so ours comes again where it is not the first.
const PRIORITY: u16 = 1;
/// Ours among the filters of that priority ("ambt").
const HANDLE: u32 = 0x616d_6274;
/// Ours while that one changes its place.
const MOVING: u32 = HANDLE + 1;
const ETH_P_ALL: u16 = 3;
const KIND: &str = "clsact";

/// Which packets of an interface a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Those that come in.
    Ingress,
    /// Those that leave.
    Egress,
}

/// Makes sure that our filter is there, is asked first, and runs `program`; `name` is for people (`tc filter show`).
/// Nothing is changed where that is so, so that whoever watches for changes hears no echo.
///
/// # Errors
/// `Unsupported` when the interface has an ingress qdisc of another kind, which would take the filter and run it on the
/// wrong side; or as of RTM_NEWQDISC and RTM_NEWTFILTER.
pub(super) fn attach(interface: u32, side: Side, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32),
        TcFilterBpfOption::ProgName(name.to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let id = TcOption::Bpf(TcFilterBpfOption::ProgId(bpf::id(program)?));
    let options: Vec<_> = options.into_iter().map(TcOption::Bpf).collect();
    let make = |handle| {
        let mut filter = filter(interface, side, handle);
        filter.attributes =
            vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned()), TcAttribute::Options(options.clone())];
        RouteNetlinkMessage::NewTrafficFilter(filter)
    };
    let remove = |handle| RouteNetlinkMessage::DelTrafficFilter(filter(interface, side, handle));
    talk(async |handle| {
        make_qdisc(&handle, interface).await?;
        let there = asked(filters(&handle, interface, side).await?);
        let is = |one: &TcMessage, handle| is_ours(one, interface, side, handle);
        let runs_it =
            |attribute: &TcAttribute| matches!(attribute, TcAttribute::Options(all) if all.contains(&id));
        let ours = there.iter().position(|one| is(one, HANDLE));
        let moving = there.iter().any(|one| is(one, MOVING));
        let behind = ours.is_some_and(|place| place > 0);
        if behind {
            // Never without one that is asked first.
            unless(request(&handle, remove(MOVING), 0).await, libc::ENOENT)?;
            request(&handle, make(MOVING), NLM_F_CREATE).await?;
            unless(request(&handle, remove(HANDLE), 0).await, libc::ENOENT)?;
        }
        let right = ours.is_some_and(|place| there[place].attributes.iter().any(runs_it));
        if behind || !right {
            request(&handle, make(HANDLE), NLM_F_CREATE).await?;
        }
        // Also what was left when this was not finished.
        if behind || moving {
            unless(request(&handle, remove(MOVING), 0).await, libc::ENOENT)
        } else {
            Ok(())
        }
    })
}

/// Makes sure that an interface has a clsact qdisc.
async fn make_qdisc(handle: &Handle, interface: u32) -> io::Result<()> {
    if ingress_kind(handle, interface).await?.as_deref() == Some(KIND) {
        return Ok(());
    }
    let mut qdisc = qdisc(interface);
    qdisc.attributes.push(TcAttribute::Kind(KIND.to_owned()));
    let made = request(handle, RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL);
    unless(made.await, libc::EEXIST)?;
    match ingress_kind(handle, interface).await? {
        Some(kind) if kind == KIND => Ok(()),
        other => {
            let kind = other.unwrap_or_default();
            let error = format!("interface {interface} has a qdisc {kind:?} in the place of clsact");
            Err(io::Error::new(io::ErrorKind::Unsupported, error))
        }
    }
}

/// Takes our filter off one side of an interface, and the qdisc with the last filter on it: an empty one does nothing.
/// What is gone already is fine.
///
/// # Errors
/// As of RTM_DELTFILTER and RTM_DELQDISC.
pub(super) fn detach(interface: u32, side: Side) -> io::Result<()> {
    talk(async |handle| {
        if ingress_kind(&handle, interface).await?.as_deref() != Some(KIND) {
            return Ok(());
        }
        for number in [HANDLE, MOVING] {
            let removal = RouteNetlinkMessage::DelTrafficFilter(filter(interface, side, number));
            unless(request(&handle, removal, 0).await, libc::ENOENT)?;
        }
        for side in [Side::Ingress, Side::Egress] {
            if !filters(&handle, interface, side).await?.is_empty() {
                return Ok(());
            }
        }
        unless(
            request(&handle, RouteNetlinkMessage::DelQueueDiscipline(qdisc(interface)), 0).await,
            libc::ENOENT,
        )
    })
}

/// Takes our filters off these interfaces, which pins tell of, and all others that are looked at.
///
/// # Errors
/// The first one; the others are taken off.
pub(super) fn detach_all(pinned: &BTreeSet<u32>) -> io::Result<()> {
    let seen: BTreeSet<u32> =
        rules::interfaces()?.seen.into_iter().map(|interface| interface.index).collect();
    let mut result = Ok(());
    for interface in pinned.union(&seen) {
        for side in [Side::Egress, Side::Ingress] {
            result = result.and(detach(*interface, side));
        }
    }
    result
}

/// Whether the kernel takes the program so, by doing it in a network namespace that nobody else sees.
///
/// # Errors
/// As of [`attach`], when it cannot; or when the namespace cannot be made.
pub(super) fn probe(program: BorrowedFd<'_>) -> io::Result<()> {
    const LOOPBACK: u32 = 1;
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            attach(LOOPBACK, Side::Egress, program, "probe")
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn qdisc(interface: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface as i32);
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.header.parent = TcHandle::CLSACT;
    message
}

fn filter(interface: u32, side: Side, handle: u32) -> TcMessage {
    let minor = match side {
        Side::Ingress => TcHandle::MIN_INGRESS,
        Side::Egress => TcHandle::MIN_EGRESS,
    };
    let mut message = TcMessage::with_index(interface as i32);
    message.header.handle = handle.into();
    message.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
    message
}

fn is_ours(one: &TcMessage, interface: u32, side: Side, handle: u32) -> bool {
    let ours = filter(interface, side, handle).header;
    one.header.handle == ours.handle && one.header.info == ours.info
}

/// Those that packets meet, in that order: each priority has an entry beside its filters, and packets begin with chain 0.
fn asked(mut filters: Vec<TcMessage>) -> Vec<TcMessage> {
    let later = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Chain(chain) if *chain != 0);
    filters.retain(|one| one.header.handle != TcHandle::UNSPEC && !one.attributes.iter().any(later));
    filters
}

/// All filters on one side of an interface that has a clsact qdisc.
async fn filters(handle: &Handle, interface: u32, side: Side) -> io::Result<Vec<TcMessage>> {
    let filters = handle.traffic_filter(interface as i32).get();
    let filters = match side {
        Side::Ingress => filters.ingress(),
        Side::Egress => filters.egress(),
    };
    filters.execute().try_collect().await.map_err(kernel)
}

/// Kind of the qdisc in the place that clsact has.
async fn ingress_kind(handle: &Handle, interface: u32) -> io::Result<Option<String>> {
    let all: Vec<_> = handle.qdisc().get().execute().try_collect().await.map_err(kernel)?;
    let here = |qdisc: &&TcMessage| {
        qdisc.header.index == interface as i32 && qdisc.header.parent == TcHandle::CLSACT
    };
    let kind = |attribute: &TcAttribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    };
    Ok(all.iter().find(here).and_then(|qdisc| qdisc.attributes.iter().find_map(kind)))
}

/// One request and its acknowledgement.
async fn request(handle: &Handle, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.clone().request(message).map_err(kernel)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}
