//! The configuration dump: all that the proxy knows, as one JSON object. No private keys, no tokens.

use mesh_core::authz::{Authorization, Rules};
use mesh_core::service::{Service, Vip};
use mesh_core::store::ServiceEntry;
use mesh_core::workload::{Health, Tunnel, Workload};
use serde_json::{Value, json};

use crate::config::Config;
use crate::pods::Listing;
use crate::proxy::Proxy;

/// Takes time in proportion to the mesh; for people, not for polling.
pub fn render(config: &Config, proxy: &Proxy, pods: &Listing) -> String {
    let mesh = &proxy.mesh;
    let mut workloads = mesh.workloads();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    let mut services = mesh.services();
    services.sort_by(|a, b| a.service.key.cmp(&b.service.key));
    let mut policies = mesh.authorizations();
    policies.sort_by(|a, b| a.key.cmp(&b.key));
    let pods: Vec<Value> = pods
        .load()
        .iter()
        .map(|(uid, workload)| json!({ "uid": uid, "workload": workload_json(workload) }))
        .collect();
    let dump = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "config": config_json(config),
        "process": proxy.connections.state(),
        "pods": pods,
        "connections": proxy.connections.dump(),
        "certificates": proxy.certificates.status(),
        "revocationLists": proxy.revocations.status(),
        "workloads": workloads.iter().map(|workload| workload_json(workload)).collect::<Vec<_>>(),
        "services": services.iter().map(|entry| service_json(entry)).collect::<Vec<_>>(),
        "policies": policies.iter().map(|policy| policy_json(policy)).collect::<Vec<_>>(),
    });
    format!("{dump:#}\n")
}

fn config_json(config: &Config) -> Value {
    json!({
        "nodeName": config.node_name,
        "clusterId": config.cluster_id,
        "trustDomain": config.trust_domain.as_str(),
        "network": config.network,
        "runDir": config.run_dir,
        "caAddress": config.ca.ca_address,
        "crlPath": config.crl_path,
    })
}

fn workload_json(workload: &Workload) -> Value {
    let strings = |texts: &[std::sync::Arc<str>]| texts.iter().map(|text| json!(&**text)).collect::<Vec<_>>();
    json!({
        "uid": workload.uid.as_str(),
        "name": &*workload.name,
        "namespace": &*workload.namespace,
        "addresses": workload.addresses,
        "network": workload.network.as_str(),
        "identity": workload.identity.to_string(),
        "protocol": match workload.tunnel { Tunnel::Hbone => "HBONE", Tunnel::Plain => "TCP" },
        "status": match workload.health {
            Health::Healthy => "Healthy",
            Health::Unhealthy => "Unhealthy",
            Health::Draining => "Draining",
        },
        "node": &*workload.node,
        "cluster": &*workload.cluster,
        "workloadName": &*workload.workload_name,
        "workloadType": workload.workload_type.as_str(),
        "canonicalName": &*workload.canonical_name,
        "canonicalRevision": &*workload.canonical_revision,
        "waypoint": workload.waypoint.as_ref().map(|waypoint| waypoint.destination.to_string()),
        "services": workload.services.iter().map(|member| member.service.to_string()).collect::<Vec<_>>(),
        "authorizationPolicies": strings(&workload.authorization_policies),
        "hostNetwork": workload.host_network,
        "shortcut": workload.shortcut,
    })
}

fn policy_json(policy: &Authorization) -> Value {
    let (action, rules, invalid) = match &policy.rules {
        Rules::Allow(rules) => ("ALLOW", rules.len(), None),
        Rules::Deny(rules) => ("DENY", rules.len(), None),
        Rules::Audit(rules) => ("AUDIT", rules.len(), None),
        Rules::Refused(reason) => ("DENY", 0, Some(reason)),
    };
    json!({
        "name": &*policy.key,
        "scope": format!("{:?}", policy.scope),
        "action": action,
        "rules": rules,
        "dryRun": policy.dry_run,
        "invalid": invalid.map(|reason| &**reason),
    })
}

fn service_json(entry: &ServiceEntry) -> Value {
    let Service { key, name, vips, ports, waypoints, .. } = &*entry.service;
    let vips = vips.iter().map(|vip| match vip {
        Vip::Address(address) => address.to_string(),
        Vip::Prefix(network, prefix) => format!("{network}/{prefix}"),
    });
    let endpoints = entry.endpoints();
    json!({
        "name": &**name,
        "namespace": &*key.namespace,
        "hostname": &*key.hostname,
        "vips": vips.collect::<Vec<_>>(),
        "ports": ports.iter().map(|port| (port.port.to_string(), port.target)).collect::<std::collections::BTreeMap<_, _>>(),
        "waypoints": waypoints.iter().map(|(waypoint, _)| waypoint.destination.to_string()).collect::<Vec<_>>(),
        "endpoints": endpoints.iter().map(|endpoint| endpoint.workload.uid.as_str()).collect::<Vec<_>>(),
    })
}
