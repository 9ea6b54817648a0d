//! Embeds the kernel programs that `cargo xtask ebpf` built, or nothing: then the agent says so when it starts.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

const VARIABLE: &str = "AMBIT_EBPF_OBJECT";
/// The feature `other-layout`.
const OTHER: &str = "CARGO_FEATURE_OTHER_LAYOUT";

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("no OUT_DIR"))?);
    let object = match env::var_os(VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => {
            default_object(&out, if env::var_os(OTHER).is_some() { "mesh-ebpf-other" } else { "mesh-ebpf" })
        }
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = if object.is_file() { fs::read(&object)? } else { Vec::new() };
    fs::write(out.join("mesh-ebpf"), bytes)
}

/// In `ebpf` of the target directory: OUT_DIR is `<target>[/<triple>]/<profile>/build/<package>/out`.
fn default_object(out: &Path, name: &str) -> PathBuf {
    let candidates = || out.ancestors().skip(4).map(|dir| dir.join("ebpf").join(name));
    candidates()
        .take(2)
        .find(|object| object.is_file())
        .unwrap_or_else(|| candidates().next().unwrap_or_default())
}
