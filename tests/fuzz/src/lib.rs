//! One module for each thing that a stranger or a neighbour can send. `run` takes any bytes and must never panic; it
//! also checks what has to be true of whatever comes out. `seeds` are well-formed ones to start from.
//!
//! `cargo xtask fuzz` runs them under libFuzzer, which finds its way by the coverage of this workspace's own code.

pub mod certificate;
pub mod cni;
pub mod connect;
pub mod csr;
pub mod discovery;
pub mod dns;
pub mod objects;
pub mod packet;
pub mod pods;
pub mod xds;

/// One thing to fuzz.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The binary is `fuzz-<name>`.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Bytes to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 10] = [
    Target { name: "certificate", run: certificate::run, seeds: certificate::seeds },
    Target { name: "cni", run: cni::run, seeds: cni::seeds },
    Target { name: "connect", run: connect::run, seeds: connect::seeds },
    Target { name: "csr", run: csr::run, seeds: csr::seeds },
    Target { name: "discovery", run: discovery::run, seeds: discovery::seeds },
    Target { name: "dns", run: dns::run, seeds: dns::seeds },
    Target { name: "objects", run: objects::run, seeds: objects::seeds },
    Target { name: "packet", run: packet::run, seeds: packet::seeds },
    Target { name: "pods", run: pods::run, seeds: pods::seeds },
    Target { name: "xds", run: xds::run, seeds: xds::seeds },
];

#[cfg(test)]
mod tests {
    use super::TARGETS;

    #[test]
    fn every_seed_and_every_cut_of_it_is_taken() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{}", target.name);
            for seed in seeds {
                (target.run)(&seed);
                for cut in 0..seed.len().min(200) {
                    (target.run)(&seed[..cut]);
                }
            }
        }
    }
}
