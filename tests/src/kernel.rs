//! What the kernel under test has, for tests about what not every kernel has.

use std::io::{self, Write as _};

/// Whether the kernel's own types have this name, such as that of a parameter which came with a feature (BTF).
pub fn names(name: &str) -> io::Result<bool> {
    let types = std::fs::read("/sys/kernel/btf/vmlinux")?;
    let wanted = [b"\0", name.as_bytes(), b"\0"].concat();
    Ok(types.windows(wanted.len()).any(|window| window == wanted))
}

/// Says that a test proves nothing here, and why: past the test runner, which keeps to itself what a test that passes says.
pub fn skipped(test: &str, lacks: &str) {
    // Whoever closed it does not want to know.
    let _ = writeln!(io::stderr(), "skipped: {test}: the kernel lacks {lacks}");
}
