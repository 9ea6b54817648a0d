//! Every developer task, one file each: `cargo xtask --help`.
//!
//! **Invariant:** a task needs nothing but the Rust toolchain, gcc, Debian's packages and the crate registry, and may be
//! run twice, after an interruption, and beside what an earlier run left.

mod deny;
mod ebpf;
mod fuzz;
mod kubectl;
mod lab;
mod process;
mod pypi;
mod qemu;
mod setup;
mod test;
mod tidy;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

use crate::workspace::Workspace;

/// Developer tasks of Ambit.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Bring up a two-node mesh in the lab, run the demo, tear it down. Needs root.
    Demo(lab::Demo),
    /// Formatting, lints, unit, eBPF and end-to-end suites. Needs root for the suites that touch the kernel.
    Test(test::Args),
    /// Measure pods in the mesh against the same pods outside of it. Needs root.
    Bench(lab::Bench),
    /// Run the eBPF and network namespace suites on Debian 12's own kernel, in a virtual machine. Needs root.
    Qemu(qemu::Args),
    /// Fuzz what strangers and neighbours can send.
    Fuzz(fuzz::Args),
    /// Build the kernel programs into target/ebpf/mesh-ebpf.
    Ebpf(ebpf::Args),
    /// Install the Debian packages and tools that the other tasks need.
    Setup,
    /// Check the house rules that no compiler knows: who imports whom, lengths, names shared with the manifests.
    Tidy,
    /// Check dependencies: bans, licences, sources.
    Deny,
}

fn main() -> ExitCode {
    match dispatch(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::from(process::interrupted().map_or(1, |signal| 128_u8.saturating_add(signal)))
        }
    }
}

fn dispatch(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    process::forward_signals()?;
    match task {
        Task::Demo(args) => lab::demo(&workspace, &args),
        Task::Bench(args) => lab::bench(&workspace, &args),
        Task::Test(args) => test::run(&workspace, &args),
        Task::Qemu(args) => qemu::run(&workspace, &args),
        Task::Fuzz(args) => fuzz::run(&workspace, &args),
        Task::Ebpf(args) => ebpf::run(&workspace, &args),
        Task::Setup => setup::run(&workspace),
        Task::Tidy => tidy::run(&workspace),
        Task::Deny => deny::run(&workspace),
    }
}
