//! Runs CNI plugins as a container runtime does: the node's first network configuration, each plugin given the result
//! of the one before, the other way round on deletion (CNI spec 1.0, section 3). Further networks that a pod asks for are
//! attached after that, as Multus does.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::node::Node;
use crate::shell;
use crate::stack::Family;

const CONFIGURATIONS: &str = "/etc/cni/net.d";
/// Networks that pods ask for, each in a file of its name.
const NETWORKS: &str = "/etc/cni/networks.d";
const PLUGINS: &str = "/opt/cni/bin";
const RESULTS: &str = "/var/lib/cni/results";
const INTERFACE: &str = "eth0";
/// Annotation of a pod that asks for a certain address, as IPAM plugins of several networks have one.
pub const ADDRESS: &str = "lab.ambit/address";
/// Annotation of a pod that gets addresses of these families only, as from a pool that is chosen for it.
pub const FAMILIES: &str = "lab.ambit/families";

/// Annotation of a pod that asks for further networks, by their names, as `k8s.v1.cni.cncf.io/networks` does.
pub const FURTHER: &str = "lab.ambit/networks";
/// The one further network that there is.
pub const SECOND: &str = "second";

/// One pod's attachment to the node's network.
#[derive(Clone, Debug)]
pub struct Attachment {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// The sandbox's.
    pub container_id: String,
    /// The pod's network namespace as the node's processes see it.
    pub netns: PathBuf,
    /// The address that the pod asks for.
    pub address: Option<Ipv4Addr>,
    /// The families of its addresses; those of the node unless they are fewer here.
    pub families: Vec<Family>,
    /// Further networks, by name; they get the interfaces `net1`, `net2` and so on.
    pub further: Vec<String>,
}

impl Attachment {
    /// What a Pod's annotation [`FAMILIES`] asks for, e.g. `IPv4`; else all.
    #[must_use]
    pub fn families(annotations: Option<&BTreeMap<String, String>>) -> Vec<Family> {
        let asked = annotations.and_then(|annotations| annotations.get(FAMILIES));
        let asked: Vec<Family> =
            asked.iter().flat_map(|text| text.split(',')).filter_map(Family::named).collect();
        if asked.is_empty() { Family::ALL.to_vec() } else { asked }
    }

    /// What a Pod's annotation [`FURTHER`] asks for.
    #[must_use]
    pub fn further(annotations: Option<&BTreeMap<String, String>>) -> Vec<String> {
        let asked = annotations.and_then(|annotations| annotations.get(FURTHER));
        asked.iter().flat_map(|text| text.split(',')).map(str::to_owned).collect()
    }

    /// Each interface with its network; none is the node's own.
    fn interfaces(&self) -> Vec<(String, Option<&str>)> {
        let further =
            (1..).zip(&self.further).map(|(number, name)| (format!("net{number}"), Some(name.as_str())));
        [(INTERFACE.to_owned(), None)].into_iter().chain(further).collect()
    }
}

/// What was configured at ADD: DEL uses the same, whatever the node's configuration has become (as libcni's cache).
#[derive(serde::Serialize, serde::Deserialize)]
struct Cached {
    configuration: Value,
    result: Value,
}

/// What an ADD came to.
#[derive(Clone, Debug)]
pub struct Added {
    /// Of `eth0`.
    pub addresses: Vec<IpAddr>,
    /// How long the mesh's plugin took, where it is one of them.
    pub enrolment: Option<Duration>,
}

/// Set up `lo`, `eth0`, and the interfaces of further networks.
pub fn add(node: &Node, attachment: &Attachment) -> anyhow::Result<Added> {
    let loopback = json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" });
    call(node, "ADD", "lo", attachment, &loopback)?;
    let added: Vec<Added> = attachment
        .interfaces()
        .iter()
        .map(|(interface, network)| attach(node, attachment, interface, *network))
        .collect::<anyhow::Result<_>>()?;
    added.into_iter().next().context("no interface")
}

fn attach(
    node: &Node,
    attachment: &Attachment,
    interface: &str,
    network: Option<&str>,
) -> anyhow::Result<Added> {
    let configuration = limited(configuration(node, network)?, &attachment.families);
    let (mut result, mut enrolment) = (None, None);
    for plugin in plugins(&configuration) {
        let request = request(&configuration, plugin, result.as_ref());
        let began = Instant::now();
        result = Some(call(node, "ADD", interface, attachment, &request)?);
        if plugin["type"] == node_agent::cni::plugin::TYPE {
            enrolment = Some(began.elapsed());
        }
    }
    let result = result.context("the network configuration has no plugins")?;
    let addresses = addresses(&result);
    anyhow::ensure!(!addresses.is_empty(), "no address in the plugins' result: {result}");
    let cache = cache(node, attachment, interface);
    fs::create_dir_all(cache.parent().unwrap_or(Path::new("/")))?;
    fs::write(cache, serde_json::to_vec(&Cached { configuration, result })?)?;
    Ok(Added { addresses, enrolment })
}

/// Take it down again; also after an ADD that failed half-way. The first error is returned after all were tried.
pub fn delete(node: &Node, attachment: &Attachment) -> anyhow::Result<()> {
    let mut first = Ok(());
    for (interface, network) in attachment.interfaces().iter().rev() {
        let done = detach(node, attachment, interface, *network);
        first = first.and(done);
    }
    first
}

fn detach(
    node: &Node,
    attachment: &Attachment,
    interface: &str,
    network: Option<&str>,
) -> anyhow::Result<()> {
    let path = cache(node, attachment, interface);
    let cached: Option<Cached> = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let (configuration, result) = match cached {
        Some(cached) => (cached.configuration, Some(cached.result)),
        None => (configuration(node, network)?, None),
    };
    let mut first = Ok(());
    for plugin in plugins(&configuration).into_iter().rev() {
        let request = request(&configuration, plugin, result.as_ref());
        let done = call(node, "DEL", interface, attachment, &request).map(drop);
        first = first.and(done);
    }
    let _ = fs::remove_file(path);
    first
}

/// A network's configuration: of the node's own the first by file name, as container runtimes choose it. A single plugin
/// becomes a list of one.
fn configuration(node: &Node, network: Option<&str>) -> anyhow::Result<Value> {
    let file = match network {
        Some(name) => node.path(NETWORKS).join(format!("{name}.conflist")),
        None => first_configuration(&node.path(CONFIGURATIONS))?,
    };
    let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("parse {}", file.display()))?;
    if value.get("plugins").is_some() {
        return Ok(value);
    }
    Ok(json!({ "cniVersion": value["cniVersion"], "name": value["name"], "plugins": [value] }))
}

fn first_configuration(directory: &Path) -> anyhow::Result<PathBuf> {
    let known = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| ["conf", "conflist", "json"].contains(&extension))
    };
    let files = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path())).filter(known);
    files.min().with_context(|| format!("no network configuration in {}", directory.display()))
}

/// The configuration without the ranges, and the routes, of other families.
fn limited(mut configuration: Value, families: &[Family]) -> Value {
    let of_family = |prefix: &Value| {
        let address = prefix.as_str().and_then(|prefix| prefix.split('/').next()?.parse().ok());
        address.is_some_and(|address| families.contains(&Family::of(address)))
    };
    for plugin in configuration["plugins"].as_array_mut().into_iter().flatten() {
        let Some(ipam) = plugin.get_mut("ipam") else { continue };
        if let Some(ranges) = ipam["ranges"].as_array_mut() {
            ranges.retain(|range| of_family(&range[0]["subnet"]));
        }
        if let Some(routes) = ipam["routes"].as_array_mut() {
            routes.retain(|route| of_family(&route["dst"]));
        }
    }
    configuration
}

fn plugins(configuration: &Value) -> Vec<&Value> {
    configuration["plugins"].as_array().map(|list| list.iter().collect()).unwrap_or_default()
}

/// What one plugin reads on stdin.
fn request(configuration: &Value, plugin: &Value, previous: Option<&Value>) -> Value {
    let mut request = plugin.clone();
    request["cniVersion"] = configuration["cniVersion"].clone();
    request["name"] = configuration["name"].clone();
    if let Some(previous) = previous {
        request["prevResult"] = previous.clone();
    }
    request
}

fn call(
    node: &Node,
    verb: &str,
    interface: &str,
    attachment: &Attachment,
    request: &Value,
) -> anyhow::Result<Value> {
    let kind = request["type"].as_str().context("a plugin without a type")?;
    let Attachment { namespace, name, uid, container_id, netns, address, .. } = attachment;
    let address = address.filter(|_| interface == INTERFACE).map(requested).unwrap_or_default();
    let mut command = node.command(&format!("{PLUGINS}/{kind}"))?;
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", container_id)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", interface)
        .env("CNI_PATH", PLUGINS)
        .env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
                 K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid}{address}"
            ),
        );
    let output = shell::capture(command, &request.to_string())?;
    if output.success() {
        return Ok(serde_json::from_str(&output.stdout).unwrap_or(Value::Null));
    }
    // An error object on stdout, see section 5 of the CNI specification.
    let error: Value = serde_json::from_str(&output.stdout).unwrap_or(Value::Null);
    match error["msg"].as_str() {
        Some(message) => {
            let details = error["details"].as_str().unwrap_or_default();
            anyhow::bail!("plugin {kind} failed ({verb}): {message} {details}")
        }
        None => anyhow::bail!(
            "plugin {kind} failed ({verb}) with exit code {}: {}{}",
            output.code,
            output.stdout,
            output.stderr
        ),
    }
}

/// What host-local and bridge take for a request. The same address comes with the same hardware address: its neighbours
/// remember that for half a minute, and would send there what is for the next pod of the address.
fn requested(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!(";IP={address};MAC=0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

fn cache(node: &Node, attachment: &Attachment, interface: &str) -> PathBuf {
    node.path(RESULTS).join(format!("{}-{interface}.json", attachment.container_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_gets_name_version_and_previous_result() {
        let configuration =
            json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "a", "x": 1 }] });
        let plugin = &configuration["plugins"][0];
        let previous = json!({ "ips": [{ "address": "10.244.1.5/24" }] });
        let first = request(&configuration, plugin, None);
        assert_eq!(first, json!({ "cniVersion": "1.0.0", "name": "net", "type": "a", "x": 1 }));
        let second = request(&configuration, plugin, Some(&previous));
        assert_eq!(second["prevResult"], previous);
    }

    #[test]
    fn an_address_that_is_asked_for_has_its_own_hardware_address() {
        assert_eq!(requested(Ipv4Addr::new(10, 244, 2, 250)), ";IP=10.244.2.250;MAC=0a:58:0a:f4:02:fa");
    }

    #[test]
    fn ranges_and_routes_of_the_families_asked_for() {
        let both = json!({ "plugins": [{ "ipam": {
            "ranges": [[{ "subnet": "10.244.1.0/24" }], [{ "subnet": "fd00:244:1::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        } }, { "type": "mesh-cni" }] });
        let asked = |text: &str| {
            let annotations = BTreeMap::from([(FAMILIES.to_owned(), text.to_owned())]);
            limited(both.clone(), &Attachment::families(Some(&annotations)))
        };
        let ipam = &asked("IPv6")["plugins"][0]["ipam"];
        assert_eq!(ipam["ranges"], json!([[{ "subnet": "fd00:244:1::/64" }]]));
        assert_eq!(ipam["routes"], json!([{ "dst": "::/0" }]));
        assert_eq!(asked("IPv4,IPv6"), both);
        assert_eq!(limited(both.clone(), &Attachment::families(None)), both);
    }

    #[test]
    fn addresses_come_without_their_prefix() {
        let result = json!({ "ips": [{ "address": "10.244.1.5/24" }, { "address": "fd00::5/64" }, {}] });
        assert_eq!(
            addresses(&result),
            ["10.244.1.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().expect("literal"))
        );
    }
}
