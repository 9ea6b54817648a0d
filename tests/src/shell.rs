//! External tools of the lab, run to their end.

use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::Context as _;

/// What a program left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// stdout if it went well, else an error with all there is to know.
    pub fn ok(self, what: &str) -> anyhow::Result<String> {
        if self.success() {
            return Ok(self.stdout);
        }
        anyhow::bail!("{what} failed with {}: {}{}", self.code, self.stderr, self.stdout)
    }
}

impl From<std::process::Output> for Output {
    fn from(output: std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Run a tool of the host; its stdout, or an error with its stderr.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> anyhow::Result<String> {
    run_with_input(program, arguments, "")
}

pub fn run_with_input<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    input: &str,
) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    capture(command, input)?.ok(program)
}

/// Run to the end with `input` on stdin.
pub fn capture(mut command: Command, input: &str) -> anyhow::Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {program} (is it installed?)"))?;
    let pipe = child.stdin.take();
    let output = std::thread::scope(|scope| {
        if let Some(mut pipe) = pipe {
            // A child that does not read its input to the end has its reasons; its exit code tells.
            scope.spawn(move || pipe.write_all(input.as_bytes()));
        }
        child.wait_with_output()
    });
    Ok(output.with_context(|| format!("wait for {program}"))?.into())
}
