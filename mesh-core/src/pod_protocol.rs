//! Versions of the pod protocol (`proto/pods.proto`): which there are, and what came with which.

use std::ops::RangeInclusive;

/// The versions that this build knows. Either side may be one behind the other, so that either is upgraded first.
pub const VERSIONS: RangeInclusive<u32> = 2..=3;

/// From here on a ztunnel that is to end hears when it has a successor, and serves until then.
pub const SUCCESSORS: u32 = 3;

/// From here on a ztunnel tells of certificates that are not renewed.
pub const EXPIRY: u32 = 3;

/// Which of the versions a daemon speaks.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Highest version of the pod protocol, between agent and ztunnel, that is spoken
    #[arg(
        long = "pod-protocol", env = "AMBIT_POD_PROTOCOL", default_value_t = *VERSIONS.end(),
        value_parser = clap::value_parser!(u32).range(i64::from(*VERSIONS.start())..=i64::from(*VERSIONS.end()))
    )]
    pub highest: u32,
}

impl Config {
    /// From the oldest one to the highest that is spoken.
    pub fn versions(&self) -> RangeInclusive<u32> {
        *VERSIONS.start()..=self.highest
    }
}

impl Default for Config {
    fn default() -> Self {
        Self { highest: *VERSIONS.end() }
    }
}

/// The highest version that both sides speak.
pub fn agree(ours: &RangeInclusive<u32>, theirs: &RangeInclusive<u32>) -> Option<u32> {
    let highest = *ours.end().min(theirs.end());
    (ours.contains(&highest) && theirs.contains(&highest)).then_some(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_is_spoken() {
        for (ours, theirs, expect) in [
            (2..=3, 2..=3, Some(3)),
            (2..=3, 2..=2, Some(2)),
            (2..=2, 2..=3, Some(2)),
            (2..=3, 3..=9, Some(3)),
            (2..=3, 1..=2, Some(2)),
            (2..=3, 4..=9, None),
            (2..=3, 0..=1, None),
        ] {
            assert_eq!(agree(&ours, &theirs), expect, "{ours:?} and {theirs:?}");
        }
    }
}
