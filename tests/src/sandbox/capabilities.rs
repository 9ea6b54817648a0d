//! Sets of Linux capabilities, by the names that a Pod's securityContext uses.

use super::enter;

/// A set of capabilities; bit numbers as in `linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

/// A name that is no capability.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no capability is called {0:?}; write it as in capabilities(7), without CAP_")]
pub struct UnknownCapability(pub String);

impl Capabilities {
    /// What a container runtime gives a container that asks for nothing (containerd's and CRI-O's default set).
    #[must_use]
    pub fn container_default() -> Self {
        const NAMES: [&str; 14] = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ];
        Self(NAMES.iter().filter_map(|name| number(name)).fold(0, |set, bit| set | 1 << bit))
    }

    /// All that this process could hand on.
    pub fn own() -> std::io::Result<Self> {
        Ok(Self(enter::own_capabilities()?))
    }

    /// `drop` first, then `add`, as the container runtimes do; `ALL` is a name in both.
    pub fn adjusted<'a>(
        self,
        drop: impl IntoIterator<Item = &'a str>,
        add: impl IntoIterator<Item = &'a str>,
        all: Self,
    ) -> Result<Self, UnknownCapability> {
        let mut bits = self.0;
        for name in drop {
            bits &= !mask(name, all)?;
        }
        for name in add {
            bits |= mask(name, all)?;
        }
        Ok(Self(bits & all.0))
    }

    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }
}

fn mask(name: &str, all: Capabilities) -> Result<u64, UnknownCapability> {
    if name.eq_ignore_ascii_case("ALL") {
        return Ok(all.0);
    }
    let short = name.strip_prefix("CAP_").unwrap_or(name);
    number(short).map(|bit| 1 << bit).ok_or_else(|| UnknownCapability(name.to_owned()))
}

fn number(name: &str) -> Option<usize> {
    IN_ORDER.iter().position(|known| *known == name)
}

/// `linux/capability.h`, from CAP_CHOWN = 0.
const IN_ORDER: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Capabilities {
        Capabilities((1 << IN_ORDER.len()) - 1)
    }

    #[test]
    fn drop_then_add_as_a_runtime_does() {
        let check = |drop: &[&str], add: &[&str], expect: u64| {
            let set = Capabilities::container_default()
                .adjusted(drop.iter().copied(), add.iter().copied(), all())
                .expect("known names");
            assert_eq!(set.bits(), expect, "drop {drop:?} add {add:?}");
        };
        check(&["ALL"], &[], 0);
        check(&["ALL"], &["NET_ADMIN"], 1 << 12);
        check(&["ALL"], &["CAP_BPF"], 1 << 39);
        check(&[], &["ALL"], all().bits());
        check(&[], &[], Capabilities::container_default().bits());
    }

    #[test]
    fn an_unknown_name_is_told() {
        let result = Capabilities(0).adjusted([], ["NET_EVERYTHING"], all());
        assert_eq!(result, Err(UnknownCapability("NET_EVERYTHING".to_owned())));
    }

    #[test]
    fn what_the_lab_lacks_cannot_be_given() {
        let set = Capabilities(0).adjusted([], ["BPF", "KILL"], Capabilities(1 << 5));
        assert_eq!(set, Ok(Capabilities(1 << 5)));
    }
}
