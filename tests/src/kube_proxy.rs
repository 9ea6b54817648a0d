//! What kube-proxy does on a node, as nftables rules in the node's namespace: a Service's address leads to one of its
//! ready endpoints at random, for pods and for the node's own processes; a Service without endpoints refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::cluster::{Cluster, Kind};
use crate::node::Node;
use crate::shell;

/// Keep the node's rules as the API server's objects say, for ever.
pub async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let mut changed = cluster.changed();
    let mut loaded = String::new();
    loop {
        let rules = rules(&cluster.list(Kind::Service), &cluster.list(Kind::EndpointSlice));
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
type Forwards = BTreeMap<(String, String, i32), BTreeSet<(String, i32)>>;

/// The whole table; loading it replaces the one before in one transaction.
fn rules(services: &[Service], slices: &[EndpointSlice]) -> String {
    let mut forwards = Forwards::new();
    for service in services {
        forward(service, slices, &mut forwards);
    }
    let (mut to_endpoint, mut refused, mut hairpins) = (String::new(), String::new(), BTreeSet::new());
    for ((address, protocol, port), endpoints) in &forwards {
        let matched = format!("ip daddr {address} {protocol} dport {port}");
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
            "    {matched} dnat ip to numgen random mod {} map {{ {map} }}",
            endpoints.len()
        );
        hairpins.extend(endpoints.iter().map(|(to, _)| to));
    }
    let hairpins: String = hairpins.iter().fold(String::new(), |mut text, to| {
        let _ = writeln!(text, "    ct status dnat ip saddr {to} ip daddr {to} masquerade");
        text
    });
    format!(
        "table ip lab-services\n\
         delete table ip lab-services\n\
         table ip lab-services {{\n\
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

fn forward(service: &Service, slices: &[EndpointSlice], forwards: &mut Forwards) {
    let Some(spec) = &service.spec else { return };
    let address = spec.cluster_ip.as_deref().unwrap_or_default();
    if address.is_empty() || address == "None" {
        return;
    }
    let of_service = |slice: &&EndpointSlice| {
        let labels = slice.metadata.labels.as_ref();
        let name = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
        name == service.metadata.name.as_ref() && slice.metadata.namespace == service.metadata.namespace
    };
    for port in spec.ports.iter().flatten() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase();
        let key = (address.to_owned(), protocol, port.port);
        let endpoints = forwards.entry(key).or_default();
        for slice in slices.iter().filter(of_service) {
            let mut ports = slice.ports.iter().flatten();
            let name = port.name.as_deref().unwrap_or_default();
            let Some(target) = ports.find(|target| target.name.as_deref().unwrap_or_default() == name) else {
                continue;
            };
            let Some(target) = target.port else { continue };
            let ready = slice.endpoints.iter().filter(|endpoint| ready(endpoint));
            endpoints
                .extend(ready.filter_map(|endpoint| Some((endpoint.addresses.first()?.clone(), target))));
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
            "spec": { "clusterIP": "10.96.0.7", "ports": [{ "name": "http", "port": 80 }] },
        }))
        .expect("a service")
    }

    fn slice(ready: bool) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": { "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 8080 }],
            "endpoints": [{ "addresses": ["10.244.1.2"], "conditions": { "ready": ready } }],
        }))
        .expect("a slice")
    }

    #[test]
    fn a_service_leads_to_its_ready_endpoints() {
        let rules = rules(&[service()], &[slice(true)]);
        let expect =
            "ip daddr 10.96.0.7 tcp dport 80 dnat ip to numgen random mod 1 map { 0 : 10.244.1.2 . 8080 }";
        assert!(rules.contains(expect), "{rules}");
        assert!(rules.contains("ip saddr 10.244.1.2 ip daddr 10.244.1.2 masquerade"), "{rules}");
    }

    #[test]
    fn a_service_without_ready_endpoints_refuses() {
        let rules = rules(&[service()], &[slice(false)]);
        assert!(rules.contains("ip daddr 10.96.0.7 tcp dport 80 reject"), "{rules}");
        assert!(!rules.contains("numgen"), "{rules}");
    }

    #[test]
    fn a_headless_service_needs_no_rules() {
        let mut headless = service();
        headless.spec.as_mut().expect("spec").cluster_ip = Some("None".to_owned());
        assert!(!rules(&[headless], &[slice(true)]).contains("dport"));
    }
}
