//! What kube-proxy does on a node, as nftables rules in the node's namespace: a Service's address leads to one of its
//! ready endpoints of its family at random, for pods and for the node's own processes; a Service without endpoints refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::cluster::{Cluster, Kind};
use crate::node::Node;
use crate::shell;
use crate::stack::{Family, Stack};

/// Keep the node's rules as the API server's objects say, for ever.
pub async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let mut changed = cluster.changed();
    let mut loaded = String::new();
    loop {
        let rules = rules(node.stack(), &cluster.list(Kind::Service), &cluster.list(Kind::EndpointSlice));
        if rules != loaded {
            match load(&node, &rules).await {
                Ok(()) => loaded = rules,
                // Rules fail to load while the lab is taken down.
                Err(error) if node.cgroup().exists() => {
                    tracing::warn!("kube-proxy of {}: {error:#}", node.name())
                }
                Err(_) => {}
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

async fn load(node: &Arc<Node>, rules: &str) -> anyhow::Result<()> {
    let (node, rules) = (node.clone(), rules.to_owned());
    let done = tokio::task::spawn_blocking(move || {
        let mut command = node.command("nft")?;
        command.args(["-f", "-"]);
        shell::capture(command, &rules)?.ok("nft").map(drop)
    });
    done.await?
}

/// Address, protocol and port of a Service, and the endpoints behind it.
type Forwards = BTreeMap<(IpAddr, String, i32), BTreeSet<(IpAddr, i32)>>;

/// The tables of all families; loading them replaces the ones before in one transaction.
fn rules(stack: Stack, services: &[Service], slices: &[EndpointSlice]) -> String {
    stack.families().iter().map(|family| table(*family, services, slices)).collect()
}

fn table(family: Family, services: &[Service], slices: &[EndpointSlice]) -> String {
    let ip = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let mut forwards = Forwards::new();
    for service in services {
        forward(family, service, slices, &mut forwards);
    }
    let (mut to_endpoint, mut refused) = (String::new(), String::new());
    let mut hairpins: BTreeSet<&IpAddr> = BTreeSet::new();
    for ((address, protocol, port), endpoints) in &forwards {
        let matched = format!("{ip} daddr {address} {protocol} dport {port}");
        if endpoints.is_empty() {
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(refused, "    {matched} reject");
            continue;
        }
        let targets: Vec<String> = endpoints
            .iter()
            .enumerate()
            .map(|(index, (to, port))| format!("{index} : {to} . {port}"))
            .collect();
        let map = targets.join(", ");
        let _ = writeln!(
            to_endpoint,
            "    {matched} dnat {ip} to numgen random mod {} map {{ {map} }}",
            endpoints.len()
        );
        hairpins.extend(endpoints.iter().map(|(to, _)| to));
    }
    let hairpins: String = hairpins.iter().fold(String::new(), |mut text, to| {
        let _ = writeln!(text, "    ct status dnat {ip} saddr {to} {ip} daddr {to} masquerade");
        text
    });
    format!(
        "table {ip} lab-services\n\
         delete table {ip} lab-services\n\
         table {ip} lab-services {{\n\
         \x20 chain services {{\n{to_endpoint}  }}\n\
         \x20 chain pods {{\n    type nat hook prerouting priority dstnat\n    jump services\n  }}\n\
         \x20 chain node {{\n    type nat hook output priority -100\n    jump services\n  }}\n\
         \x20 chain hairpin {{\n    type nat hook postrouting priority srcnat\n{hairpins}  }}\n\
         \x20 chain refuse {{\n{refused}  }}\n\
         \x20 chain refuse-pods {{\n    type filter hook forward priority filter\n    jump refuse\n  }}\n\
         \x20 chain refuse-node {{\n    type filter hook output priority filter\n    jump refuse\n  }}\n\
         }}\n"
    )
}

fn forward(family: Family, service: &Service, slices: &[EndpointSlice], forwards: &mut Forwards) {
    let Some(spec) = &service.spec else { return };
    // A headless service has "None", which is no address.
    let mut addresses = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse::<IpAddr>().ok());
    let Some(address) = addresses.find(|ip| Family::of(*ip) == family) else { return };
    let of_service = |slice: &&EndpointSlice| {
        let labels = slice.metadata.labels.as_ref();
        let name = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
        name == service.metadata.name.as_ref() && slice.metadata.namespace == service.metadata.namespace
    };
    for port in spec.ports.iter().flatten() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase();
        let endpoints = forwards.entry((address, protocol, port.port)).or_default();
        for slice in slices.iter().filter(of_service).filter(|slice| slice.address_type == family.as_str()) {
            let mut ports = slice.ports.iter().flatten();
            let name = port.name.as_deref().unwrap_or_default();
            let Some(target) = ports.find(|target| target.name.as_deref().unwrap_or_default() == name) else {
                continue;
            };
            let Some(target) = target.port else { continue };
            let ready = slice.endpoints.iter().filter(|endpoint| ready(endpoint));
            endpoints.extend(
                ready.filter_map(|endpoint| Some((endpoint.addresses.first()?.parse().ok()?, target))),
            );
        }
    }
}

/// Absent means ready, as the EndpointSlice API says.
fn ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:96::7"],
                "ports": [{ "name": "http", "port": 80 }],
            },
        }))
        .expect("a service")
    }

    fn slice(family: &str, address: &str, ready: bool) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": { "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": family,
            "ports": [{ "name": "http", "port": 8080 }],
            "endpoints": [{ "addresses": [address], "conditions": { "ready": ready } }],
        }))
        .expect("a slice")
    }

    fn slices(ready: bool) -> [EndpointSlice; 2] {
        [slice("IPv4", "10.244.1.2", ready), slice("IPv6", "fd00:244:1::2", ready)]
    }

    const TO_V4: &str =
        "ip daddr 10.96.0.7 tcp dport 80 dnat ip to numgen random mod 1 map { 0 : 10.244.1.2 . 8080 }";
    const TO_V6: &str =
        "ip6 daddr fd00:96::7 tcp dport 80 dnat ip6 to numgen random mod 1 map { 0 : fd00:244:1::2 . 8080 }";

    #[test]
    fn a_service_leads_to_its_ready_endpoints_of_the_same_family() {
        for (stack, v4, v6) in [(Stack::V4, true, false), (Stack::V6, false, true), (Stack::Dual, true, true)]
        {
            let rules = rules(stack, &[service()], &slices(true));
            assert_eq!((rules.contains(TO_V4), rules.contains(TO_V6)), (v4, v6), "{rules}");
            let hairpin = "ip saddr 10.244.1.2 ip daddr 10.244.1.2 masquerade";
            assert_eq!(rules.contains(hairpin), v4, "{rules}");
            let hairpin = "ip6 saddr fd00:244:1::2 ip6 daddr fd00:244:1::2 masquerade";
            assert_eq!(rules.contains(hairpin), v6, "{rules}");
        }
    }

    #[test]
    fn a_service_without_ready_endpoints_refuses() {
        let rules = rules(Stack::Dual, &[service()], &slices(false));
        assert!(rules.contains("ip daddr 10.96.0.7 tcp dport 80 reject"), "{rules}");
        assert!(rules.contains("ip6 daddr fd00:96::7 tcp dport 80 reject"), "{rules}");
        assert!(!rules.contains("numgen"), "{rules}");
    }

    #[test]
    fn a_service_of_one_family_has_no_rules_in_the_other() {
        let mut single = service();
        single.spec.as_mut().expect("spec").cluster_ips = Some(vec!["10.96.0.7".to_owned()]);
        let rules = rules(Stack::Dual, &[single], &slices(true));
        assert!(rules.contains(TO_V4) && !rules.contains("ip6 daddr"), "{rules}");
    }

    #[test]
    fn a_headless_service_needs_no_rules() {
        let mut headless = service();
        headless.spec.as_mut().expect("spec").cluster_ips = Some(vec!["None".to_owned()]);
        assert!(!rules(Stack::Dual, &[headless], &slices(true)).contains("dport"));
    }
}
