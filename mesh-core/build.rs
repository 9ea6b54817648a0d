//! Compiles the protos with a compiler written in Rust, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        ["authorization.proto", "ca.proto", "discovery.proto", "pods.proto", "workload.proto"],
        ["proto"],
    )?;
    // Sorted maps: the same resource always has the same bytes, so a digest of them can be its version.
    tonic_prost_build::configure().btree_map(".istio.workload").compile_fds(descriptors)?;
    Ok(())
}
