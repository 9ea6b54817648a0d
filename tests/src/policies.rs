//! What a decision of policy costs a proxy, by the number of policies in the mesh.

use std::hint::black_box;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_core::authz::{self, Connection, Decision};
use mesh_core::convert::{self, Names};
use mesh_core::proto::security::{self as wire, string_match::MatchType};
use mesh_core::proto::workload;
use mesh_core::store::{self, Reader};

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Decisions that each figure is the mean of.
    #[arg(long, default_value_t = 1_000_000)]
    decisions: u32,
}

/// Policies that are about the pod; each has two rules of two principals and a port.
const OWN: usize = 4;

/// Prints a line for each number: policies about others, and as many rules in the pod's own.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    for count in [10, 1_000, 10_000] {
        let others = measure(&mesh(count, 2)?, config.decisions)?;
        println!("{count} policies of which {OWN} are about the pod: {others:?} a decision");
    }
    for rules in [10, 1_000, 10_000] {
        let own = measure(&mesh(OWN, rules / OWN)?, config.decisions.min(10_000_000 / rules as u32))?;
        println!("{OWN} policies of {rules} rules together, all about the pod: {own:?} a decision");
    }
    Ok(ExitCode::SUCCESS)
}

/// Of a client that none of the rules but the last one matches.
fn measure(mesh: &Reader, decisions: u32) -> anyhow::Result<Duration> {
    let pod = mesh.workload("c//Pod/shop/web").context("the pod")?;
    let (client, target): (SocketAddr, SocketAddr) =
        (([10, 1, 0, 9], 40_000).into(), ([10, 1, 0, 1], 8080).into());
    let connection = Connection {
        peer: Some("spiffe://cluster.local/ns/shop/sa/client".parse()?),
        client: client.into(),
        target: target.into(),
    };
    let decide = || authz::decide(&mesh.policies_of(&pod), &connection);
    anyhow::ensure!(decide() == Decision::Allow, "{:?}", decide());
    let started = Instant::now();
    for _ in 0..decisions {
        black_box(decide());
    }
    Ok(started.elapsed() / decisions.max(1))
}

/// So many policies, of which some are about the pod and have this many rules each.
fn mesh(count: usize, rules: usize) -> anyhow::Result<Reader> {
    let (mut writer, reader) = store::new();
    let mut names = Names::default();
    for i in 0..count.max(OWN) {
        let own = i < OWN;
        let last = i + 1 == OWN;
        let policy = wire::Authorization {
            name: format!("p{i}"),
            namespace: "shop".to_owned(),
            scope: wire::Scope::WorkloadSelector.into(),
            action: wire::Action::Allow.into(),
            rules: (0..if own { rules.max(1) } else { 2 })
                .map(|n| rule(if last && n + 1 == rules.max(1) { "client" } else { "somebody" }, n))
                .collect(),
            ..Default::default()
        };
        writer.put_authorization(convert::authz::convert(&policy, &mut names)?);
    }
    let pod = workload::Workload {
        uid: "c//Pod/shop/web".to_owned(),
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 1, 0, 1]],
        authorization_policies: (0..OWN).map(|i| format!("shop/p{i}")).collect(),
        ..Default::default()
    };
    writer.put_workload(convert::workload::convert(&pod, &mut names)?);
    writer.commit();
    Ok(reader)
}

fn rule(account: &str, number: usize) -> wire::Rule {
    let principal = |name: String| wire::StringMatch {
        match_type: Some(MatchType::Exact(format!("cluster.local/ns/shop/sa/{name}"))),
    };
    let from = wire::Match {
        principals: vec![principal(format!("other-{number}")), principal(account.to_owned())],
        ..Default::default()
    };
    let to = wire::Match { destination_ports: vec![8080], ..Default::default() };
    wire::Rule { clauses: [from, to].map(|one| wire::Clause { matches: vec![one] }).into() }
}
