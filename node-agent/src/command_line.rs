//! Command line of the node agent: which role, with which settings.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mesh_core::{limits, telemetry};

use crate::{app, ca, cni, config};

/// Ambit's node agent: puts the pods of a node into the mesh. Its other role is the mesh's certificate authority.
#[derive(Debug, Parser)]
#[command(name = "node-agent", version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve this node: watch the API server, configure its ztunnel, capture its pods' traffic
    Run(Box<Settings<config::Config>>),
    /// Be the mesh's certificate authority: sign the workloads' certificates
    Ca(Settings<ca::Config>),
    /// Take mesh-cni out of this node's CNI configuration, so that new pods start without the agent; to be run on each
    /// node after the node-agent DaemonSet is deleted, since a running agent puts it back
    Uninstall(Settings<cni::install::Config>),
}

/// A role's settings, and those that every role has.
#[derive(Debug, clap::Args)]
struct Settings<T: clap::Args> {
    #[command(flatten)]
    role: T,
    #[command(flatten)]
    logs: telemetry::Config,
}

/// Does what the process's command line says.
pub fn run() -> ExitCode {
    let result = match Arguments::parse().role {
        Role::Run(settings) => {
            let Settings { role, logs } = *settings;
            start(&logs, || app::run(role))
        }
        Role::Ca(Settings { role, logs }) => start(&logs, || app::run_ca(role)),
        Role::Uninstall(Settings { role, logs }) => start(&logs, || app::uninstall(&role)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where the logs are read, also when they are JSON; on standard error when they are not set up.
            tracing::error!("{error:#}");
            eprintln!("node-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(logs: &telemetry::Config, role: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let _levels = telemetry::init(logs)?;
    // Each pod takes some thirty: its links, its network namespace, its listeners.
    limits::raise_descriptors();
    role()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn uninstall_gives_the_node_its_cni_configuration_back() {
        let node = std::env::temp_dir().join(format!("ambit-uninstall-{}", std::process::id()));
        let (conf, bin) = (node.join("net.d"), node.join("bin"));
        let (list, binary) = (conf.join("10-a.conflist"), node.join("mesh-cni"));
        std::fs::create_dir_all(&conf).unwrap();
        let read = || -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(&list).unwrap()).unwrap()
        };
        std::fs::write(&list, r#"{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "a"}]}"#).unwrap();
        std::fs::write(&binary, "binary").unwrap();
        let before = read();
        let line = ["node-agent", "uninstall", "--cni-conf-dir", conf.to_str().unwrap()];
        let line = line.into_iter().chain(["--cni-bin-dir", bin.to_str().unwrap()]);
        let Role::Uninstall(settings) = Arguments::try_parse_from(line).unwrap().role else { panic!() };
        let installer = cni::install::Installer::new(&settings.role, binary, "cni.sock".as_ref(), Vec::new());
        installer.once().unwrap();
        assert_ne!(read(), before);
        app::uninstall(&settings.role).unwrap();
        assert_eq!(read(), before);
        assert!(!bin.join("mesh-cni").exists());
        std::fs::remove_dir_all(&node).unwrap();
    }

    /// ztunnel has it built in: an agent with another one would cut its pods off.
    #[test]
    fn the_upstream_mark_cannot_be_changed() {
        let run = ["node-agent", "run", "--node-name", "n"];
        Arguments::try_parse_from(run).unwrap();
        Arguments::try_parse_from(run.into_iter().chain(["--upstream-mark", "7"])).unwrap_err();
    }
}
