//! `ambit-example`: the program in the example pods, the kubelet's prober, and the client of the suites.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

pub mod ask;
pub mod dial;
pub mod http;
mod latency;
mod ping;
mod serve;
mod stream;

/// Small servers and clients for the examples and the end-to-end suite.
#[derive(Debug, Parser)]
#[command(name = "ambit-example", version)]
pub struct Example {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Answer HTTP/1.1 with who was asked by whom, after calling others.
    Serve(serve::Config),
    /// Send back what comes, over TCP and on request UDP.
    Echo {
        #[arg(long)]
        listen: SocketAddr,
        /// Echo datagrams too.
        #[arg(long)]
        udp: bool,
    },
    /// Greet, close the sending half, then count what comes until the client closes too.
    Greet {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Print what a URL answers.
    Get { url: String },
    /// Exit with 0 if `http://…` answers with success or `tcp://host:port` accepts.
    Probe { target: String },
    /// Send bytes to an echo server, close the sending half, check what comes back.
    Send {
        address: String,
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
        /// Begin only when the server has closed its sending half.
        #[arg(long)]
        after_eof: bool,
    },
    /// Keep one connection to an echo server busy; a line of output for each round trip.
    Hold {
        address: String,
        #[arg(long, default_value_t = 100)]
        every_ms: u64,
    },
    /// Open connections to echo servers, one after the other, until told to stop; then tell how they ended, as one
    /// JSON object.
    Dial {
        /// Taken in turns.
        #[arg(required = true)]
        addresses: Vec<String>,
        /// So many at a time.
        #[arg(long, default_value_t = 1)]
        parallel: usize,
        /// Between two connections, and between the round trips of one.
        #[arg(long, default_value_t = 10)]
        every_ms: u64,
        /// Go on with round trips on each connection for as long, then end it in order.
        #[arg(long, default_value_t = 0)]
        last_ms: u64,
        /// Of each round trip.
        #[arg(long, default_value_t = 4)]
        bytes: usize,
    },
    /// Call several services in turns until told to stop; then tell, as one JSON object, who answered.
    Ask {
        /// `name=url`: what has to call itself `name` in its answer.
        #[arg(required = true)]
        targets: Vec<String>,
        /// So many at a time.
        #[arg(long, default_value_t = 1)]
        parallel: usize,
    },
    /// Measure new connections to an echo server, in microseconds, as one JSON object.
    Latency {
        address: String,
        #[arg(long, default_value_t = 500)]
        count: usize,
    },
    /// Measure how soon it is known that nobody listens on a port, in microseconds, as one JSON object.
    Refused {
        address: String,
        #[arg(long, default_value_t = 500)]
        count: usize,
    },
    /// Open connections to an echo server and keep them, idle.
    Park {
        address: String,
        #[arg(long, default_value_t = 1000)]
        count: usize,
    },
    /// Ping an IPv4 address once and wait for the echo.
    Ping { address: Ipv4Addr },
    /// Send a datagram to an echo server and print what comes back.
    Datagram { address: String, text: String },
    /// Do nothing until told to stop.
    Idle,
}

impl Example {
    pub async fn run(self) -> anyhow::Result<()> {
        let stop = CancellationToken::new();
        // What counts something comes to its own end when it is told to stop, the rest is dropped.
        let counts = matches!(self.act, Act::Dial { .. } | Act::Ask { .. });
        let told = stop.clone();
        let work = async move {
            match self.act {
                Act::Serve(config) => serve::run(config).await,
                Act::Echo { listen, udp } => stream::echo(listen, udp).await,
                Act::Greet { listen } => stream::greet(listen).await,
                Act::Get { url } => {
                    let answer = http::get(&url, &[], Duration::from_secs(10)).await?;
                    println!("{}", answer.body);
                    anyhow::ensure!(answer.success(), "{url} answered {}", answer.status);
                    Ok(())
                }
                Act::Probe { target } => dial::probe(&target).await,
                Act::Send { address, bytes, after_eof } => stream::send(&address, bytes, after_eof).await,
                Act::Hold { address, every_ms } => {
                    stream::hold(&address, Duration::from_millis(every_ms)).await
                }
                Act::Dial { addresses, parallel, every_ms, last_ms, bytes } => {
                    let [every, last] = [every_ms, last_ms].map(Duration::from_millis);
                    dial::run(addresses, parallel, dial::Manner { every, last, bytes }, &told).await
                }
                Act::Ask { targets, parallel } => ask::run(&targets, parallel, &told).await,
                Act::Latency { address, count } => latency::connects(&address, count).await,
                Act::Refused { address, count } => latency::refusals(&address, count).await,
                Act::Park { address, count } => latency::idle_connections(&address, count).await,
                Act::Ping { address } => ping::once(address),
                Act::Datagram { address, text } => dial::datagram(&address, &text).await,
                Act::Idle => std::future::pending().await,
            }
        };
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::pin!(work);
        tokio::select! {
            result = &mut work => return result,
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        stop.cancel();
        if counts { work.await } else { Ok(()) }
    }
}
