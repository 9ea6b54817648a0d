//! What the guard costs each packet, by the kernel's own statistics of a running program (BPF_ENABLE_STATS), and what a
//! proof of capture costs: printed, and far from what anybody would notice.

use std::io::Write as _;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use mesh_tests::kernel;
use mesh_tests::raw_bpf::{self, Kind};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use node_agent::datapath::Datapath;

use crate::captured::wrong;
use crate::family::over_both;
use crate::packets::{SYN, segment, send_many_raw};
use crate::proxy::Proxy;
use crate::world::{PATIENCE, PORT, World, into_stream, proxy_socket};

/// Packets of each kind.
const PACKETS: u64 = 20_000;
/// Times an empty program's cost that are too many.
const TOO_MUCH: f64 = 30.0;

/// Nanoseconds of each run that some work causes, and how many it does.
fn cost(guard: &Path, work: impl FnOnce() -> Result<()>) -> Result<(f64, u64)> {
    let before = raw_bpf::spent(guard)?;
    work()?;
    let after = raw_bpf::spent(guard)?;
    let (runs, nanoseconds) = (after.runs - before.runs, after.nanoseconds - before.nanoseconds);
    ensure!(runs > 0, "the guard was asked nothing");
    #[expect(clippy::cast_precision_loss, reason = "of a few seconds")]
    let each = nanoseconds as f64 / runs as f64;
    Ok((each, runs))
}

fn guard(world: &World) -> Result<PathBuf> {
    let pins = world.pod_pins(&world.a);
    let mut names = std::fs::read_dir(&pins)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name = names.find(|name| name.starts_with("guard-")).context("no guard")?;
    Ok(pins.join(name))
}

/// Segments of one flagged connection, as the proxy's are: the kernel passes many of them in one packet.
fn send_data(world: &World, datapath: &Datapath) -> Result<()> {
    let app = world.b.serve()?;
    let mut proxied = world.a.run(|| {
        let socket = proxy_socket(datapath, world.family.domain())?;
        socket.set_tcp_nodelay(true)?;
        socket.connect_timeout(&world.b.at(PORT).into(), PATIENCE)?;
        Ok(into_stream(socket))
    })?;
    let (mut served, _) = app.accept()?;
    std::thread::scope(|scope| {
        let read = scope.spawn(move || std::io::copy(&mut served, &mut std::io::sink()));
        for _ in 0..PACKETS {
            proxied.write_all(&[1; 1000])?;
        }
        drop(proxied);
        let bytes = read.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(bytes == PACKETS * 1000, "{bytes} bytes came");
        Ok(())
    })
}

fn send_datagrams(world: &World) -> Result<()> {
    // Somebody is there, or the kernel would say that nobody is instead of sending.
    let _there = world.b.run(|| Ok(UdpSocket::bind(world.family.anywhere(9))?))?;
    world.a.run(|| {
        let socket = UdpSocket::bind(world.family.anywhere(0))?;
        socket.connect(world.b.at(9))?;
        for _ in 0..PACKETS {
            socket.send(b"datagram")?;
        }
        Ok(())
    })
}

/// Of a socket that is neither flagged nor older.
fn send_dropped(world: &World) -> Result<()> {
    send_many_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), PACKETS)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_guard_costs_little() -> Result<()> {
    if !kernel::names("tcx_link_attach")? {
        kernel::skipped("the_guard_costs_little", "tcx (Linux 6.6), whose links tell what they run");
        return Ok(());
    }
    over_both(|world| {
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let guard = guard(world)?;
        let _kept = enable_stats(Stats::RunTime)?;
        let (data, segments) = cost(&guard, || send_data(world, &datapath))?;
        let (udp, datagrams) = cost(&guard, || send_datagrams(world))?;
        let (dropped, drops) = cost(&guard, || send_dropped(world))?;
        ensure!(datagrams >= PACKETS && drops >= PACKETS, "{datagrams} datagrams, {drops} dropped");
        // A program of two instructions: what is left is the measurement's own time.
        raw_bpf::replace_by_one_that_passes_all(&guard, Kind::Tcx)?;
        let (nothing, _) = cost(&guard, || send_datagrams(world))?;
        println!(
            "guard over {:?}, ns for each packet: data of the proxy {data:.0} ({segments} packets), UDP {udp:.0}, \
             dropped {dropped:.0}; an empty program takes {nothing:.0}",
            world.family
        );
        for each in [data, udp, dropped] {
            ensure!(each < TOO_MUCH * nothing, "{each} ns");
        }
        Ok(())
    })
}

/// Of one pod with both families, by this process and the ztunnel in it, which answers: there is one each five seconds.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_proof_of_capture_costs_little() -> Result<()> {
    const PROOFS: u32 = 100;
    const TOO_LONG: Duration = Duration::from_millis(10);
    let spent = || -> Result<Duration> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        let times = [usage.user_time(), usage.system_time()];
        Ok(Duration::from_micros(times.map(|time| time.num_microseconds() as u64).iter().sum()))
    };
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    for answers in [true, false] {
        wrong(&datapath, &world.a, answers)?;
        let (before, begin) = (spent()?, Instant::now());
        for _ in 0..PROOFS {
            ensure!(wrong(&datapath, &world.a, answers)?.is_empty());
        }
        let each = (spent()? - before) / PROOFS;
        let with = if answers { "with all canaries, and ztunnel's answers" } else { "without a ztunnel" };
        let wall = begin.elapsed() / PROOFS;
        println!("a proof {with}: {} us of CPU, over {} us", each.as_micros(), wall.as_micros());
        ensure!(each < TOO_LONG, "{each:?}");
    }
    Ok(())
}
