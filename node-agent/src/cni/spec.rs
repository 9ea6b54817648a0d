//! The words of the CNI specification: versions, verbs, the environment, results and errors.
//!
//! <https://github.com/containernetworking/cni/blob/main/SPEC.md>. Pure; knows nothing of the mesh.

use std::net::IpAddr;

use serde_json::{Value, json};

/// Versions this plugin speaks, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Error codes of the specification, section "Error".
pub const INCOMPATIBLE_VERSION: u32 = 1;
/// CNI_* variables are missing or make no sense.
pub const ENVIRONMENT: u32 = 4;
/// Reading or writing failed.
pub const IO: u32 = 5;
/// Something is not the JSON it should be.
pub const DECODE: u32 = 6;
/// The network configuration is wrong.
pub const CONFIGURATION: u32 = 7;
/// A transient condition: the runtime should try again later.
pub const TRY_AGAIN: u32 = 11;
/// STATUS: ADD cannot be served.
pub const NOT_AVAILABLE: u32 = 50;
/// Codes from 100 on are a plugin's own; ours means that the agent said no.
pub const REFUSED: u32 = 100;

/// What the runtime wants, CNI_COMMAND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A container joins the network.
    Add,
    /// A container leaves it.
    Del,
    /// Is it as ADD left it? From 0.4.0 on.
    Check,
    /// Could ADD be served? From 1.1.0 on.
    Status,
    /// Drop what is not in this list. From 1.1.0 on.
    Gc,
    /// Which versions?
    Version,
}

impl Command {
    /// `None`: no such command.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "ADD" => Some(Self::Add),
            "DEL" => Some(Self::Del),
            "CHECK" => Some(Self::Check),
            "STATUS" => Some(Self::Status),
            "GC" => Some(Self::Gc),
            "VERSION" => Some(Self::Version),
            _ => None,
        }
    }

    /// As in CNI_COMMAND.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }

    /// The first version of the specification that has it.
    pub fn since(self) -> &'static str {
        match self {
            Self::Add | Self::Del | Self::Version => VERSIONS[0],
            Self::Check => "0.4.0",
            Self::Status | Self::Gc => "1.1.0",
        }
    }

    /// Does that version (one of [`VERSIONS`]) have this command?
    pub fn is_in(self, version: &str) -> bool {
        let index = |version| VERSIONS.iter().position(|v| *v == version);
        matches!((index(version), index(self.since())), (Some(has), Some(needs)) if has >= needs)
    }
}

/// An error as the specification wants it on stdout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// See the constants of this module.
    pub code: u32,
    /// One line.
    pub message: String,
    /// Cause and next step.
    pub details: String,
}

impl Failure {
    /// A failure with this code.
    pub fn new(code: u32, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }

    /// The error object; `version` is the request's, as far as it was understood.
    pub fn to_json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code, "msg": self.message, "details": self.details})
    }
}

/// One value of CNI_ARGS (`A=1;B=2`).
pub fn argument<'a>(arguments: &'a str, key: &str) -> Option<&'a str> {
    let pair = |text: &'a str| text.split_once('=');
    arguments.split(';').filter_map(pair).find(|(k, v)| *k == key && !v.is_empty()).map(|(_, v)| v)
}

/// The answer to VERSION.
pub fn version_result(version: &str) -> Value {
    json!({"cniVersion": version, "supportedVersions": VERSIONS})
}

/// The addresses that a result gives to the container, in its order.
///
/// # Errors
/// What is wrong with the result.
pub fn container_addresses(result: &Value) -> Result<Vec<IpAddr>, String> {
    let interfaces = list(result, "interfaces")?;
    let mut addresses = Vec::new();
    for ip in list(result, "ips")? {
        if belongs_to_host(ip, interfaces)? {
            continue;
        }
        let text = ip["address"].as_str().ok_or("an entry of ips has no address")?;
        let address = text.split_once('/').map_or(text, |(address, _)| address);
        addresses.push(address.parse().map_err(|_| format!("{text:?} is no address"))?);
    }
    Ok(addresses)
}

/// A result may also list interfaces of the host, such as a bridge: those have no sandbox.
fn belongs_to_host(ip: &Value, interfaces: &[Value]) -> Result<bool, String> {
    if ip["interface"].is_null() {
        return Ok(false);
    }
    let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
    let interface = index.and_then(|index| interfaces.get(index));
    let interface =
        interface.ok_or_else(|| format!("ips names interface {}, which is not there", ip["interface"]))?;
    Ok(interface["sandbox"].as_str().unwrap_or_default().is_empty())
}

fn list<'a>(value: &'a Value, field: &str) -> Result<&'a [Value], String> {
    match &value[field] {
        Value::Null => Ok(&[]),
        Value::Array(list) => Ok(list),
        _ => Err(format!("{field} is not a list")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_versions() {
        for (command, versions) in [
            ("ADD", &VERSIONS[..]),
            ("DEL", &VERSIONS[..]),
            ("VERSION", &VERSIONS[..]),
            ("CHECK", &["0.4.0", "1.0.0", "1.1.0"][..]),
            ("STATUS", &["1.1.0"][..]),
            ("GC", &["1.1.0"][..]),
        ] {
            let parsed = Command::parse(command).unwrap();
            assert_eq!(parsed.name(), command);
            let has: Vec<_> = VERSIONS.into_iter().filter(|version| parsed.is_in(version)).collect();
            assert_eq!(has, versions, "{command}");
        }
        assert!(!Command::Add.is_in("0.2.0") && Command::parse("add").is_none());
    }

    #[test]
    fn arguments_are_found_by_whole_key() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=a=b;EMPTY=;X_K8S_POD_UID=no;lone";
        for (key, value) in [
            ("K8S_POD_NAMESPACE", Some("ns")),
            ("K8S_POD_NAME", Some("a=b")),
            ("K8S_POD_UID", None),
            ("EMPTY", None),
            ("lone", None),
        ] {
            assert_eq!(argument(text, key), value, "{key}");
        }
        assert_eq!(argument("", "A"), None);
    }

    #[test]
    fn addresses_of_the_container_only() {
        // As the bridge plugin of 1.1.0 prints it: bridge and veth of the host, then the pod's end.
        let bridge = json!({
            "interfaces": [
                {"name": "cni0", "mac": "0a:58:0a:f4:01:01"},
                {"name": "veth1", "mac": "0a:58:0a:f4:01:03", "sandbox": ""},
                {"name": "eth0", "mac": "0a:58:0a:f4:01:02", "sandbox": "/run/netns/cni-1"},
            ],
            "ips": [
                {"interface": 2, "address": "10.244.1.2/24", "gateway": "10.244.1.1"},
                {"interface": 0, "address": "10.244.1.1/24"},
                {"interface": 2, "address": "fd00:1::2/64"},
            ],
        });
        // 0.3.1 has a version in each entry, and a plugin may name no interface at all.
        let old = json!({"ips": [{"version": "4", "address": "10.1.0.9/16"}]});
        for (result, expect) in [
            (bridge, Ok(&["10.244.1.2", "fd00:1::2"][..])),
            (old, Ok(&["10.1.0.9"][..])),
            (json!({}), Ok(&[][..])),
            (json!({"ips": 1}), Err("ips is not a list")),
            (json!({"ips": [{}]}), Err("no address")),
            (json!({"ips": [{"address": "10.1/24"}]}), Err("10.1/24")),
            (json!({"ips": [{"address": "10.1.0.9/16", "interface": 3}]}), Err("interface 3")),
            (json!({"ips": [{"address": "10.1.0.9/16", "interface": -1}]}), Err("interface -1")),
        ] {
            match (container_addresses(&result), expect) {
                (Ok(found), Ok(expect)) => {
                    assert_eq!(found.iter().map(IpAddr::to_string).collect::<Vec<_>>(), expect);
                }
                (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
                (found, _) => panic!("{result}: {found:?}"),
            }
        }
    }
}
