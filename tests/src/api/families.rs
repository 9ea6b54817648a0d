//! IP families of Services: which ones a Service gets (`ipFamilies`, `ipFamilyPolicy`), as `initIPFamilyFields` of
//! `k8s.io/kubernetes/pkg/registry/core/service/storage/alloc.go` decides, and what is wrong with what was asked for.
//! Addresses are given out in `admission`.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::meta::{items, text};
use crate::stack::{Family, Stack};

/// Faults found: field path and what is wrong.
pub(super) type Faults = Vec<(String, String)>;

const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";

/// Fills in what the user left out of a Service's families, in a cluster with these families.
pub(super) fn complete(spec: &mut Value, cluster: Stack) -> Result<Vec<Family>, Faults> {
    let addresses = addresses(spec);
    check(spec, &addresses)?;
    let headless = addresses.first().is_some_and(|first| first == "None");
    let selectorless = items_of_map(&spec["selector"]) == 0;
    // Whoever makes the endpoints of such a Service may have them of any family, whatever the cluster has.
    let anything = headless && selectorless;
    let policy = match text(spec, "/ipFamilyPolicy") {
        "" if anything => REQUIRE,
        "" => SINGLE,
        given => given,
    }
    .to_owned();
    let mut families: Vec<Family> = items(spec, "/ipFamilies").filter_map(family).collect();
    let inferred = addresses.iter().skip(families.len()).filter_map(|ip| ip.parse().ok()).map(Family::of);
    families.extend(inferred.collect::<Vec<_>>());
    if families.is_empty() {
        families.push(cluster.primary());
    }
    for (index, family) in families.iter().enumerate() {
        if !anything && !cluster.has(*family) {
            let why = format!("Invalid value: \"{}\": not configured on this cluster", family.as_str());
            return Err(vec![(format!("spec.ipFamilies[{index}]"), why)]);
        }
    }
    let dual = anything || cluster == Stack::Dual;
    let refuse = |why: &str| {
        Err(vec![("spec.ipFamilyPolicy".to_owned(), format!("Invalid value: \"{policy}\": {why}"))])
    };
    match policy.as_str() {
        SINGLE if families.len() > 1 => {
            return refuse(
                "must be RequireDualStack or PreferDualStack when multiple 'ipFamilies' are specified",
            );
        }
        REQUIRE if !dual => return refuse("this cluster is not configured for dual-stack services"),
        PREFER | REQUIRE if dual && families.len() == 1 => families.push(families[0].other()),
        _ => {}
    }
    spec["ipFamilyPolicy"] = policy.into();
    spec["ipFamilies"] = families.iter().map(|family| family.as_str()).collect();
    Ok(families)
}

/// Takes over from the Service as it was what an update does not say; a policy that became single gives up the second
/// family (`trimFieldsForDualStackDowngrade`).
pub(super) fn keep(old: &Value, new: &mut Value) -> Result<(), Faults> {
    for field in ["ipFamilyPolicy", "ipFamilies", "clusterIPs"] {
        if new[field].is_null() || new[field].as_array().is_some_and(Vec::is_empty) {
            new[field] = old[field].clone();
        }
    }
    let (before, after) = (text(old, "/ipFamilyPolicy"), text(new, "/ipFamilyPolicy"));
    if after == SINGLE && before != SINGLE {
        for field in ["ipFamilies", "clusterIPs"] {
            if new[field] == old[field]
                && let Some(list) = new[field].as_array_mut()
            {
                list.truncate(1);
            }
        }
    }
    let (was, is) = (text(old, "/ipFamilies/0"), text(new, "/ipFamilies/0"));
    if was != is && !was.is_empty() {
        let why = format!("Invalid value: {}: may not change once set", new["ipFamilies"]);
        return Err(vec![("spec.ipFamilies[0]".to_owned(), why)]);
    }
    Ok(())
}

/// `clusterIPs`, or the one address of clients that know no other field; empty where one is to be chosen.
pub(super) fn addresses(spec: &Value) -> Vec<String> {
    let listed: Vec<String> =
        items(spec, "/clusterIPs").filter_map(|ip| Some(ip.as_str()?.to_owned())).collect();
    let single = text(spec, "/clusterIP");
    if listed.is_empty() && !single.is_empty() { vec![single.to_owned()] } else { listed }
}

fn family(name: &Value) -> Option<Family> {
    Family::named(name.as_str()?)
}

fn items_of_map(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

/// What is wrong whatever the cluster is like.
fn check(spec: &Value, addresses: &[String]) -> Result<(), Faults> {
    let mut faults = Faults::new();
    let mut fault = |field: String, why: String| faults.push((field, why));
    let policy = text(spec, "/ipFamilyPolicy");
    if !["", SINGLE, PREFER, REQUIRE].contains(&policy) {
        let supported = "\"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"";
        let why = format!("Unsupported value: \"{policy}\": supported values: {supported}");
        fault("spec.ipFamilyPolicy".to_owned(), why);
    }
    let names: Vec<&Value> = items(spec, "/ipFamilies").collect();
    for (index, name) in names.iter().enumerate() {
        let at = format!("spec.ipFamilies[{index}]");
        if family(name).is_none() {
            fault(at, format!("Unsupported value: {name}: supported values: \"IPv4\", \"IPv6\""));
        } else if names[..index].contains(name) {
            fault(at, format!("Duplicate value: {name}"));
        }
    }
    let invalid = |why: &str| format!("Invalid value: {}: {why}", json!(addresses));
    let given = text(spec, "/clusterIP");
    if !given.is_empty() && addresses.first().is_some_and(|first| first != given) {
        fault("spec.clusterIPs".to_owned(), invalid("first value must match `clusterIP`"));
    }
    if addresses.len() > 2 {
        fault("spec.clusterIPs".to_owned(), invalid("may only hold up to 2 values"));
    }
    let mut seen: Vec<Family> = Vec::new();
    for (index, address) in addresses.iter().enumerate().filter(|(_, address)| !address.is_empty()) {
        let at = format!("spec.clusterIPs[{index}]");
        if address == "None" {
            if addresses.len() > 1 {
                fault("spec.clusterIPs".to_owned(), invalid("'None' must be the first and only value"));
            }
            continue;
        }
        let Ok(parsed) = address.parse::<IpAddr>() else {
            fault(
                at,
                format!(
                    "Invalid value: \"{address}\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
                ),
            );
            continue;
        };
        let is = Family::of(parsed);
        if seen.contains(&is) {
            fault(
                "spec.clusterIPs".to_owned(),
                invalid("may specify no more than one IP for each IP family"),
            );
        }
        seen.push(is);
        if let Some(said) = names.get(index).and_then(|name| family(name)).filter(|said| *said != is) {
            let why = format!("expected an {} value as indicated by `ipFamilies[{index}]`", said.as_str());
            fault(at, format!("Invalid value: \"{address}\": {why}"));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Policy and families that a Service gets, or the first fault.
    fn completed(mut spec: Value, cluster: Stack) -> String {
        match complete(&mut spec, cluster) {
            Ok(families) => {
                let names: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
                assert_eq!(spec["ipFamilies"], json!(names));
                format!("{} {}", text(&spec, "/ipFamilyPolicy"), names.join(","))
            }
            Err(faults) => format!("{}: {}", faults[0].0, faults[0].1),
        }
    }

    #[test]
    fn what_a_service_gets() {
        let selector = json!({ "app": "web" });
        let with = |fields: Value| {
            let mut spec = json!({ "selector": selector });
            spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            spec
        };
        for (fields, v4, v6, dual) in [
            (json!({}), "SingleStack IPv4", "SingleStack IPv6", "SingleStack IPv4"),
            (
                json!({ "ipFamilyPolicy": PREFER }),
                "PreferDualStack IPv4",
                "PreferDualStack IPv6",
                "PreferDualStack IPv4,IPv6",
            ),
            (
                json!({ "ipFamilyPolicy": REQUIRE }),
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for \
                 dual-stack services",
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for \
                 dual-stack services",
                "RequireDualStack IPv4,IPv6",
            ),
            (
                json!({ "ipFamilies": ["IPv6"] }),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
                "SingleStack IPv6",
                "SingleStack IPv6",
            ),
            (
                json!({ "ipFamilies": ["IPv6"], "ipFamilyPolicy": PREFER }),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
                "PreferDualStack IPv6",
                "PreferDualStack IPv6,IPv4",
            ),
            (json!({ "clusterIP": "None" }), "SingleStack IPv4", "SingleStack IPv6", "SingleStack IPv4"),
        ] {
            for (cluster, expect) in [(Stack::V4, v4), (Stack::V6, v6), (Stack::Dual, dual)] {
                assert_eq!(completed(with(fields.clone()), cluster), expect, "{fields} in {cluster:?}");
            }
        }
        let headless = json!({ "clusterIP": "None" });
        assert_eq!(completed(headless, Stack::V4), "RequireDualStack IPv4,IPv6", "endpoints made by others");
    }

    #[test]
    fn addresses_tell_families() {
        for (spec, expect) in [
            (json!({ "clusterIP": "fd00:96::7" }), "SingleStack IPv6"),
            (
                json!({ "clusterIPs": ["fd00:96::7", "10.96.0.7"], "ipFamilyPolicy": PREFER }),
                "PreferDualStack IPv6,IPv4",
            ),
            (
                json!({ "clusterIPs": ["fd00:96::7", "10.96.0.7"] }),
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be RequireDualStack or \
                 PreferDualStack when multiple 'ipFamilies' are specified",
            ),
        ] {
            assert_eq!(completed(spec.clone(), Stack::Dual), expect, "{spec}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (spec, field, why) in [
            (json!({ "ipFamilyPolicy": "Both" }), "spec.ipFamilyPolicy", "Unsupported value"),
            (json!({ "ipFamilies": ["IPv5"] }), "spec.ipFamilies[0]", "Unsupported value"),
            (json!({ "ipFamilies": ["IPv4", "IPv4"] }), "spec.ipFamilies[1]", "Duplicate value"),
            (json!({ "clusterIPs": ["10.96.0.7", "10.96.0.8"] }), "spec.clusterIPs", "no more than one IP"),
            (json!({ "clusterIPs": ["10.96.0.7", "None"] }), "spec.clusterIPs", "first and only"),
            (
                json!({ "clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.7"] }),
                "spec.clusterIPs",
                "first value",
            ),
            (json!({ "clusterIP": "nonsense" }), "spec.clusterIPs[0]", "valid IP address"),
            (
                json!({ "clusterIP": "10.96.0.7", "ipFamilies": ["IPv6"] }),
                "spec.clusterIPs[0]",
                "expected an IPv6 value",
            ),
        ] {
            let fault = completed(spec.clone(), Stack::Dual);
            assert!(fault.starts_with(&format!("{field}: ")) && fault.contains(why), "{spec}: {fault}");
        }
    }

    #[test]
    fn updates() {
        let old = json!({
            "ipFamilyPolicy": PREFER, "ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.96.0.7", "fd00:96::7"],
        });
        let kept = |mut new: Value| keep(&old, &mut new).map(|()| new);
        assert_eq!(kept(json!({})), Ok(old.clone()), "what is not said stays");
        let mut single = old.clone();
        single["ipFamilyPolicy"] = SINGLE.into();
        let expect = json!({ "ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv4"], "clusterIPs": ["10.96.0.7"] });
        assert_eq!(kept(single), Ok(expect));
        let faults = kept(json!({ "ipFamilies": ["IPv6", "IPv4"] })).expect_err("another first family");
        assert_eq!(faults[0].0, "spec.ipFamilies[0]");
    }
}
