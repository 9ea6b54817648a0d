//! What ztunnel keeps in memory for a connection on which nothing happens: a bound, so that it does not creep up, and with
//! `--nocapture` what it is and of which allocations.
//!
//! Counted by an allocator that rounds as the product's does, on the test's own thread: that is where the ztunnel of a
//! `#[tokio::test]` runs, so what other tests do in the meantime does not matter.

#![allow(unsafe_code, reason = "an allocator is one")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::near;
use crate::world::{APP, CLIENT, SERVER, World};

/// Connections before and after; four full tunnels then.
const BEFORE: usize = 100;
const AFTER: usize = 400;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    /// Allocations by size, in steps of 16 bytes.
    static BY_SIZE: [Cell<isize>; SIZES] = const { [const { Cell::new(0) }; SIZES] };
}
const SIZES: usize = 4096;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

impl Counting {
    fn count(size: usize, sign: isize) {
        let bytes = isize::try_from(size_class(size)).unwrap_or(0);
        // A thread that ends counts no more.
        let _ = LIVE.try_with(|live| live.set(live.get() + sign * bytes));
        let _ = BY_SIZE.try_with(|by_size| {
            if let Some(count) = by_size.get(size.div_ceil(16)) {
                count.set(count.get() + sign);
            }
        });
    }
}

/// What jemalloc takes for a request: four sizes for each doubling.
fn size_class(size: usize) -> usize {
    match size {
        0..=128 => size.next_multiple_of(16),
        _ => size.next_multiple_of(size.next_power_of_two() / 8),
    }
}

// SAFETY: every call is the system allocator's; counting touches no memory but its own thread's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size(), 1);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        Self::count(layout.size(), -1);
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Bytes for each connection of the client to the server's application, both ends of the way together; and how many
/// allocations of which sizes (rounded up to 16) they are.
async fn held(world: &World) -> (usize, String) {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let application = TcpListener::bind((world.pod_ip(SERVER), APP)).await.unwrap();
    let mut open = Vec::with_capacity(2 * AFTER);
    let mut before = (0, [0; SIZES]);
    let sizes = || BY_SIZE.with(|by_size| std::array::from_fn(|size| by_size[size].get()));
    while open.len() < 2 * AFTER {
        if open.len() == 2 * BEFORE {
            before = (LIVE.get(), sizes());
        }
        let mut client = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        let (mut server, _) = application.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        server.write_all(b"y").await.unwrap();
        client.read_u8().await.unwrap();
        // Off the runtime: what is counted is ztunnel's.
        open.extend([client.into_std().unwrap(), server.into_std().unwrap()]);
    }
    let connections = (AFTER - BEFORE) as isize;
    let after: [isize; SIZES] = sizes();
    let more = (0..SIZES).map(|size| (size, after[size] - before.1[size]));
    let often = more.filter(|(_, count)| *count >= connections / 2);
    let often =
        often.map(|(size, count)| format!("{:.1} of {}", count as f64 / connections as f64, size * 16));
    let bytes = (LIVE.get() - before.0) / connections;
    (usize::try_from(bytes).unwrap(), often.collect::<Vec<_>>().join(", "))
}

fn within(most: usize, (bytes, sizes): (usize, String)) {
    println!("{bytes} bytes: {sizes}");
    assert!(bytes <= most, "{bytes} bytes instead of at most {most}: {sizes}");
}

#[tokio::test]
async fn an_idle_connection_through_a_tunnel_at_both_ends_together() {
    let world = World::new().await;
    within(7_500, Box::pin(held(&world)).await);
}

#[tokio::test]
async fn an_idle_connection_on_one_node() {
    let world = near::near_with(&[]).await;
    within(3_500, Box::pin(held(&world)).await);
}
