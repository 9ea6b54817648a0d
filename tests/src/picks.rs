//! What the choice of an endpoint costs a proxy, by the number of endpoints that the service has.

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_core::addr::OrigDst;
use mesh_core::convert::{self, Names};
use mesh_core::proto::workload::{self as wire, load_balancing::Mode, load_balancing::Scope};
use mesh_core::store::{self, Reader};

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Choices that each figure is the mean of.
    #[arg(long, default_value_t = 1_000_000)]
    picks: u32,
}

/// How a service chooses.
struct Way {
    name: &'static str,
    weighted: bool,
    mode: Mode,
    scopes: &'static [Scope],
}

const WAYS: [Way; 3] = [
    Way { name: "any", weighted: false, mode: Mode::UnspecifiedMode, scopes: &[] },
    Way { name: "any, by capacity", weighted: true, mode: Mode::UnspecifiedMode, scopes: &[] },
    Way {
        name: "the nearest of 4 scopes, by capacity",
        weighted: true,
        mode: Mode::Failover,
        scopes: &[Scope::Network, Scope::Region, Scope::Zone, Scope::Node],
    },
];

/// Prints a line for each way and number.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    for way in WAYS {
        for count in [10, 1_000, 10_000] {
            let (each, first) = measure(&way, count, config.picks)?;
            println!(
                "{}: {count} endpoints: {each:?} a choice, the first after a change {first:?}",
                way.name
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(way: &Way, count: u32, picks: u32) -> anyhow::Result<(Duration, Duration)> {
    let mesh = mesh(way, count)?;
    let entry = mesh.service("shop", "web").context("the service")?;
    let client = mesh.workload("c//Pod/shop/0").context("the client")?;
    let dst = OrigDst::from(SocketAddr::from(([10, 96, 0, 1], 80)));
    let started = Instant::now();
    entry.pick(&client, dst, 0)?;
    let first = started.elapsed();
    let started = Instant::now();
    for i in 0..picks as usize {
        black_box(entry.pick(&client, dst, i.wrapping_mul(0x9E37_79B9_7F4A_7C15))?);
    }
    Ok((started.elapsed() / picks.max(1), first))
}

/// One service and its endpoints on five nodes; the client is one of them.
fn mesh(way: &Way, count: u32) -> anyhow::Result<Reader> {
    let (mut writer, reader) = store::new();
    let mut names = Names::default();
    for i in 0..count {
        let IpAddr::V4(ip) = IpAddr::from((0x0A01_0000 + i).to_be_bytes()) else { continue };
        let workload = wire::Workload {
            uid: format!("c//Pod/shop/{i}"),
            name: format!("{i}"),
            namespace: "shop".to_owned(),
            addresses: vec![ip.octets().to_vec()],
            node: format!("n{}", i % 5),
            capacity: way.weighted.then_some(1 + i % 7),
            services: [("shop/web".to_owned(), wire::PortList::default())].into(),
            ..Default::default()
        };
        writer.put_workload(convert::workload::convert(&workload, &mut names)?);
    }
    let balancing = wire::LoadBalancing {
        routing_preference: way.scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: way.mode.into(),
        ..Default::default()
    };
    let service = wire::Service {
        namespace: "shop".to_owned(),
        hostname: "web".to_owned(),
        ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        load_balancing: Some(balancing),
        ..Default::default()
    };
    writer.put_service(convert::service::convert(&service, &mut names)?);
    writer.commit();
    Ok(reader)
}
