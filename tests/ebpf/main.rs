//! The kernel programs by themselves: each loads, and BPF_PROG_TEST_RUN says what the guard and sk_lookup answer.
//!
//! What a test run cannot do is in `tests/netns`: the connect hooks have none, and sk_lookup's refuses an interface,
//! so that no packet can come in on lo.

mod guard;
mod object;
mod steer;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::Program;
use mesh_ebpf_abi::program;

/// Every program passes this kernel's verifier. LLVM merging two reads of a context into one at a variable offset
/// shows here: "dereference of modified ctx ptr".
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_kernel_takes_every_program() -> Result<()> {
    load_all(object::open(0)?, 20_000)
}

/// What logs is several times as long, and run by developers only: nobody else would notice that it does not load.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_kernel_takes_every_program_that_logs() -> Result<()> {
    let object = object::open_logging()?;
    anyhow::ensure!(object.map("AYA_LOGS").is_some(), "it does not log");
    load_all(object, 1_000_000)
}

/// `most` instructions may be verified for each: the verifier gives up at a million, and an older one, which merges less,
/// must be far from that as well.
fn load_all(mut object: Ebpf, most: u32) -> Result<()> {
    for name in [
        program::CONNECT4,
        program::CONNECT6,
        program::RESTORE4,
        program::RESTORE6,
        program::STEER,
        program::GUARD,
        program::GUARD_L3,
        program::GUARD_NODE,
        program::REFUSE,
        program::REFUSE_L3,
        program::OLDER,
        program::INHERIT,
        program::GROWN,
        program::PROBES,
        program::BYSTANDERS,
    ] {
        let program = object.program_mut(name).with_context(|| format!("no program {name}"))?;
        match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::Iter(program) => program.load("tcp", &aya::Btf::from_sys_fs()?),
            _ => anyhow::bail!("{name} is of another kind"),
        }
        .with_context(|| name.to_owned())?;
        assert!(name.len() <= 15, "the kernel cuts {name}");
        let info = program.info()?;
        let verified = info.verified_instruction_count().unwrap_or(0);
        println!("{name}: {verified} instructions verified, {} bytes", info.size_translated().unwrap_or(0));
        assert!(verified < most, "{name}: {verified} instructions verified");
    }
    assert_eq!(object.programs().count(), 15, "a program that this test does not know");
    Ok(())
}
