//! Edits of CNI configuration files: our entry goes in, everything else keeps its meaning. Text in, text out.

use serde_json::{Map, Value, json};

use crate::cni::plugin::TYPE;
use crate::cni::spec::VERSIONS;

/// Our entry in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the agent listens, as a process of the host sees it.
    pub socket: String,
    /// Namespaces whose pods start without asking the agent.
    pub exclude_namespaces: Vec<String>,
}

/// A configuration that cannot be chained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfiguration {
    /// Not a JSON object.
    #[error("it is not a JSON object: {0}")]
    Json(String),
    /// No plugin to come after.
    #[error("it names no plugin")]
    NoPlugins,
    /// Pods would not start at all if our plugin were called with this version.
    #[error("its cniVersion {found:?} is none that {TYPE} speaks ({})", VERSIONS.join(", "))]
    Version {
        /// As in the file.
        found: String,
    },
}

/// The list with our entry in it; `None` if it is there already. An entry of ours keeps its place, so that two that
/// both want to be the last do not fight.
///
/// # Errors
/// When the text is no list that we can be part of.
pub fn chain(conflist: &str, entry: &Entry) -> Result<Option<String>, InvalidConfiguration> {
    let mut list = object(conflist)?;
    plugins(&mut list)?;
    check_version(&list)?;
    let plugins = plugins(&mut list)?;
    let ours = entry.to_json();
    let mut places = plugins.iter().enumerate().filter(|(_, plugin)| is_ours(plugin)).map(|(index, _)| index);
    let (first, second) = (places.next(), places.next());
    if plugins.iter().all(is_ours) {
        return Err(InvalidConfiguration::NoPlugins);
    }
    match first {
        Some(index) if second.is_none() && plugins[index] == ours => return Ok(None),
        Some(index) => {
            plugins[index] = ours;
            let mut position = 0..;
            plugins.retain(|plugin| position.next() == Some(index) || !is_ours(plugin));
        }
        None => plugins.push(ours),
    }
    Ok(Some(print(list)))
}

/// The list without our entry; `None` if it has none.
///
/// # Errors
/// When the text is no list.
pub fn unchain(conflist: &str) -> Result<Option<String>, InvalidConfiguration> {
    let mut list = object(conflist)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    let changed = plugins.len() != before;
    Ok(changed.then(|| print(list)))
}

/// The list that a single configuration is the same as (libcni does so too), with our entry in it.
///
/// # Errors
/// When the text is no configuration that we can come after.
pub fn convert(conf: &str, entry: &Entry) -> Result<String, InvalidConfiguration> {
    let conf = object(conf)?;
    if conf.get("type").and_then(Value::as_str).is_none_or(|plugin| plugin.is_empty() || plugin == TYPE) {
        return Err(InvalidConfiguration::NoPlugins);
    }
    check_version(&conf)?;
    let mut list = Map::new();
    for field in ["cniVersion", "name"] {
        if let Some(value) = conf.get(field) {
            list.insert(field.to_owned(), value.clone());
        }
    }
    list.insert("plugins".to_owned(), json!([conf, entry.to_json()]));
    Ok(print(list))
}

/// Would a runtime read a file of this name?
pub fn is_configuration(name: &str) -> bool {
    matches!(extension(name), "conf" | "conflist" | "json")
}

/// Is it a list rather than a single configuration?
pub fn is_list(name: &str) -> bool {
    extension(name) == "conflist"
}

/// The name under which the list made from a single configuration is kept: right before it in the order of names, of
/// which runtimes take the first, so that the original can stay as it is.
pub fn derived_name(conf: &str) -> String {
    let stem = conf.rsplit_once('.').map_or(conf, |(stem, _)| stem);
    format!("{stem}{DERIVED}")
}

/// Is it a name that [`derived_name`] makes?
pub fn is_derived(name: &str) -> bool {
    name.ends_with(DERIVED)
}

/// Sorts before `.conf`, `.conflist` and `.json`.
const DERIVED: &str = ".ambit.conflist";

impl Entry {
    fn to_json(&self) -> Value {
        json!({"type": TYPE, "socket": self.socket, "excludeNamespaces": self.exclude_namespaces})
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == TYPE
}

fn object(text: &str) -> Result<Map<String, Value>, InvalidConfiguration> {
    serde_json::from_str(text).map_err(|error| InvalidConfiguration::Json(error.to_string()))
}

fn plugins(list: &mut Map<String, Value>) -> Result<&mut Vec<Value>, InvalidConfiguration> {
    match list.get_mut("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => Ok(plugins),
        _ => Err(InvalidConfiguration::NoPlugins),
    }
}

fn check_version(configuration: &Map<String, Value>) -> Result<(), InvalidConfiguration> {
    let version = configuration.get("cniVersion").unwrap_or(&Value::Null);
    match version.as_str() {
        Some(version) if VERSIONS.contains(&version) => Ok(()),
        Some(version) => Err(InvalidConfiguration::Version { found: version.to_owned() }),
        None => Err(InvalidConfiguration::Version { found: version.to_string() }),
    }
}

fn print(list: Map<String, Value>) -> String {
    format!("{:#}\n", Value::Object(list))
}

fn extension(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, extension)| extension)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry { socket: "/run/ambit/cni.sock".into(), exclude_namespaces: vec!["kube-system".into()] }
    }

    fn parse(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    const BRIDGE: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "disableCheck": true, "big": 18446744073709551615,
        "plugins": [{"type": "bridge", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}]]}},
                    {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

    #[test]
    fn chaining_adds_one_entry_and_nothing_else() {
        let chained = chain(BRIDGE, &entry()).unwrap().unwrap();
        let mut expect = parse(BRIDGE);
        expect["plugins"].as_array_mut().unwrap().push(entry().to_json());
        assert_eq!(parse(&chained), expect);
        assert_eq!(chain(&chained, &entry()), Ok(None), "idempotent");
        assert_eq!(parse(&unchain(&chained).unwrap().unwrap()), parse(BRIDGE), "undone");
        assert_eq!(unchain(BRIDGE), Ok(None));
    }

    #[test]
    fn an_old_entry_is_replaced_where_it_stands() {
        let list =
            |plugins: Value| json!({"cniVersion": "0.3.1", "name": "x", "plugins": plugins}).to_string();
        let old = json!({"type": TYPE, "socket": "/old"});
        let (first, last) = (json!({"type": "ptp"}), json!({"type": "other-mesh"}));
        let new = entry().to_json();
        for (before, after) in [
            (json!([first, old, last]), json!([first, new, last])),
            (json!([first, old, last, new]), json!([first, new, last])),
            (json!([first, new, new]), json!([first, new])),
        ] {
            let chained = chain(&list(before.clone()), &entry()).unwrap().unwrap();
            assert_eq!(parse(&chained)["plugins"], after, "{before}");
        }
        let there = list(json!([first, new, last]));
        assert_eq!(chain(&there, &entry()), Ok(None), "stays in the middle");
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let conf = r#"{"cniVersion": "0.4.0", "name": "pods", "type": "calico", "mtu": 1450}"#;
        let list = parse(&convert(conf, &entry()).unwrap());
        let expect = json!({
            "cniVersion": "0.4.0", "name": "pods", "plugins": [parse(conf), entry().to_json()],
        });
        assert_eq!(list, expect);
    }

    #[test]
    fn refuses_what_it_would_break() {
        let version = |version| InvalidConfiguration::Version { found: String::from(version) };
        for (text, expect) in [
            (r#"{"cniVersion": "0.2.0", "plugins": [{"type": "a"}]}"#, version("0.2.0")),
            (r#"{"cniVersion": "9.0.0", "plugins": [{"type": "a"}]}"#, version("9.0.0")),
            (r#"{"plugins": [{"type": "a"}]}"#, version("null")),
            (r#"{"cniVersion": 1, "plugins": [{"type": "a"}]}"#, version("1")),
            (r#"{"cniVersion": "1.0.0", "plugins": []}"#, InvalidConfiguration::NoPlugins),
            (r#"{"cniVersion": "1.0.0", "plugins": {}}"#, InvalidConfiguration::NoPlugins),
            (
                r#"{"cniVersion": "1.0.0", "plugins": [{"type": "mesh-cni"}]}"#,
                InvalidConfiguration::NoPlugins,
            ),
            (r#"{"cniVersion": "1.0.0"}"#, InvalidConfiguration::NoPlugins),
        ] {
            assert_eq!(chain(text, &entry()), Err(expect), "{text}");
        }
        for text in ["", "[]", "{", "null", "\u{feff}{}"] {
            assert!(matches!(chain(text, &entry()), Err(InvalidConfiguration::Json(_))), "{text:?}");
            assert!(matches!(convert(text, &entry()), Err(InvalidConfiguration::Json(_))), "{text:?}");
        }
        let no_type = r#"{"cniVersion": "1.0.0", "name": "x"}"#;
        assert_eq!(convert(no_type, &entry()), Err(InvalidConfiguration::NoPlugins));
        let only_ours = r#"{"cniVersion": "1.0.0", "name": "n", "type": "mesh-cni"}"#;
        assert_eq!(convert(only_ours, &entry()), Err(InvalidConfiguration::NoPlugins));
    }

    #[test]
    fn a_derived_list_wins_over_its_original() {
        for conf in ["10-calico.conf", "10-flannel.json", "noext.conf", "a.b.conf"] {
            let derived = derived_name(conf);
            assert!(derived.as_str() < conf && is_derived(&derived) && is_list(&derived), "{derived} {conf}");
            assert!(is_configuration(conf) && !is_list(conf));
        }
        for other in [".10-x.conflist.tmp", "readme", "conf", "10-x.conf.bak"] {
            assert!(!is_configuration(other), "{other}");
        }
    }
}
