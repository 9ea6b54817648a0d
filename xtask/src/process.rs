//! Runs children, shows how long they took, and ends them when the task itself is told to end.
//!
//! **Invariant:** no child outlives an interrupted task: each runs in a process group of its own, which gets every
//! SIGINT, SIGTERM and SIGHUP that the task gets.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static STATE: Mutex<State> = Mutex::new(State { child: None, signal: None });

/// What the signal thread and the task share; the lock is held across a spawn, so that no child is ever unknown.
struct State {
    child: Option<Pid>,
    signal: Option<i32>,
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signal that ended this task, if one did.
pub(crate) fn interrupted() -> Option<u8> {
    state().signal.and_then(|signal| u8::try_from(signal).ok())
}

/// From now on signals reach the running child; with no child they end the task.
pub(crate) fn forward_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
    thread::spawn(move || {
        for number in signals.forever() {
            let mut state = state();
            state.signal = Some(number);
            match (state.child, Signal::try_from(number)) {
                // A group that is already gone needs no signal.
                (Some(group), Ok(signal)) => drop(killpg(group, signal)),
                _ => std::process::exit(128 + number),
            }
        }
    });
    Ok(())
}

/// Runs to the end with this task's output; an exit code other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let child = spawn(command)?;
    expect_success(command, wait(child)?)
}

/// Runs to the end, calling `line` with each line of standard output after printing it; standard error passes through.
pub(crate) fn run_lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<ExitStatus> {
    let mut child = spawn(command.stdout(Stdio::piped()))?;
    let output = child.stdout.take().context("no standard output")?;
    for text in BufReader::new(output).lines() {
        let text = text.context("unreadable output")?;
        println!("{text}");
        line(&text);
    }
    wait(child)
}

/// Standard output of a quick command; nothing if it cannot be run or fails.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs one step, printing what it is before and how long it took after.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let started = Instant::now();
    let result = work();
    let outcome = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("    {outcome}: {name} ({})", seconds(started.elapsed()));
    result.with_context(|| name.to_owned())
}

/// "83.4 s".
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The command as one would type it, without its environment.
pub(crate) fn shown(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

fn spawn(command: &mut Command) -> Result<Child> {
    let mut state = state();
    if state.signal.is_some() {
        bail!("interrupted");
    }
    let child = command
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    state.child = Some(Pid::from_raw(i32::try_from(child.id()).context("process id out of range")?));
    Ok(child)
}

fn wait(mut child: Child) -> Result<ExitStatus> {
    let status = child.wait().context("cannot wait for the child")?;
    let mut state = state();
    state.child = None;
    if state.signal.is_some() {
        bail!("interrupted");
    }
    Ok(status)
}

fn expect_success(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{}`: {status}", shown(command));
    }
    Ok(())
}
