//! The CNI plugin's process; all it does is in `node_agent::cni::plugin`.

use std::io::{Write, stdin, stdout};
use std::process::ExitCode;

use node_agent::cni::plugin::{self, Environment};

fn main() -> ExitCode {
    let variable = |name| std::env::var_os(name).unwrap_or_default().to_string_lossy().into_owned();
    let environment = Environment {
        command: variable("CNI_COMMAND"),
        container_id: variable("CNI_CONTAINERID"),
        netns: variable("CNI_NETNS"),
        ifname: variable("CNI_IFNAME"),
        arguments: variable("CNI_ARGS"),
    };
    let outcome = plugin::run(&environment, stdin().lock());
    let written = stdout().write_all(outcome.stdout.as_bytes());
    if outcome.success && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
