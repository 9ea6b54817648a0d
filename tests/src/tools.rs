//! Programs that `cargo xtask setup` fetches for the lab.

use std::path::{Path, PathBuf};

/// Where they are.
#[must_use]
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")
}

/// kubectl: the one that was fetched, if there is none on the PATH.
#[must_use]
pub fn kubectl() -> PathBuf {
    let fetched = directory().join("bin/kubectl");
    let on_path = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join("kubectl").is_file())
    });
    if on_path || !fetched.is_file() { PathBuf::from("kubectl") } else { fetched }
}
