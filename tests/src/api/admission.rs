//! Admission: what a new object gets or is refused because of other objects in the cluster. Namespaces must be
//! there, pods get their service account and its token volume, services get addresses and node ports.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::cluster::{Cluster, Deletion, Write};
use super::kinds::Kind;
use super::status::Status;
use super::{families, meta};
use crate::fabric;
use crate::stack::Family;

const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;
/// Where pods find their token.
const TOKEN_DIRECTORY: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Lifetime of the default token in seconds, as the real server sets it.
const TOKEN_SECONDS: u64 = 3607;

impl Cluster {
    /// A namespaced object needs a namespace that is not being deleted.
    pub(super) fn check_namespace(&self, kind: &Kind, object: &Value) -> Result<(), Status> {
        if !kind.namespaced {
            return Ok(());
        }
        let name = meta::namespace(object);
        let namespace = self
            .store
            .get("namespaces", "", name)
            .ok_or_else(|| Status::not_found("namespaces", "", name))?;
        if meta::is_terminating(namespace) {
            return Err(Status::terminating(&kind.plural, &kind.group, meta::name(object), name));
        }
        Ok(())
    }

    /// Completes a new object from the cluster's state, or refuses it.
    pub(super) fn admit(&mut self, kind: &Kind, object: &mut Value) -> Result<(), Status> {
        match (kind.group.as_str(), kind.kind.as_str()) {
            ("", "Pod") => self.admit_pod(object),
            ("", "Service") => {
                self.give_addresses(object, &[])?;
                self.give_node_ports(object, &Value::Null)
            }
            _ => Ok(()),
        }
    }

    /// Completes a changed object, or refuses the change.
    pub(super) fn admit_change(&mut self, kind: &Kind, old: &Value, new: &mut Value) -> Result<(), Status> {
        if kind.kind != "Service" || kind.custom.is_some() {
            return Ok(());
        }
        let own = families::addresses(&old["spec"]);
        if !own.is_empty() {
            let kept = families::keep(&old["spec"], &mut new["spec"]);
            kept.map_err(|faults| Status::invalid("Service", "", meta::name(old), &faults))?;
        }
        self.give_addresses(new, &own)?;
        self.give_node_ports(new, old)
    }

    /// What a new object brings about.
    pub(super) fn created(&mut self, kind: &Kind, object: &Arc<Value>) {
        match kind.kind.as_str() {
            "Namespace" => self.furnish_namespace(meta::name(object)),
            "CustomResourceDefinition" => self.settle_definitions(meta::text(object, "/spec/group")),
            _ => {}
        }
        let owners: Vec<&str> = meta::items(object, "/metadata/ownerReferences")
            .map(|reference| meta::text(reference, "/uid"))
            .collect();
        // The owner went away while its controller still worked: what the garbage collector finds later.
        if !owners.is_empty() && !owners.iter().any(|owner| self.is_alive(owner)) {
            drop(self.delete(kind, meta::namespace(object), meta::name(object), &Deletion::default()));
        }
    }

    /// What a changed object brings about.
    pub(super) fn replaced(&mut self, kind: &Kind, object: &Value) {
        if kind.kind == "CustomResourceDefinition" {
            self.settle_definitions(meta::text(object, "/spec/group"));
        }
        self.remove_if_released(kind, object);
    }

    /// Each namespace has a service account for its pods and the CA to verify the API server.
    fn furnish_namespace(&mut self, namespace: &str) {
        let objects = [
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}),
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"},
                "data": {"ca.crt": self.ca_pem},
            }),
        ];
        for object in objects {
            if let Some(kind) = self.kinds.of_object(&object) {
                // The namespace is new and the objects are valid, so nothing can refuse them.
                drop(self.create(&kind, namespace, object, Write::default()));
            }
        }
    }

    fn admit_pod(&self, pod: &mut Value) -> Result<(), Status> {
        let (namespace, name) = (meta::namespace(pod).to_owned(), meta::name(pod).to_owned());
        let spec = &mut pod["spec"];
        meta::default(spec, "serviceAccountName", "default");
        let account = meta::text(spec, "/serviceAccountName").to_owned();
        spec["serviceAccount"] = account.clone().into();
        let found = self.store.get("serviceaccounts", &namespace, &account).ok_or_else(|| {
            let why = format!(
                "error looking up service account {namespace}/{account}: serviceaccount \"{account}\" not found"
            );
            Status::forbidden("pods", "", &name, &why)
        })?;
        let wanted = spec["automountServiceAccountToken"]
            .as_bool()
            .or(found["automountServiceAccountToken"].as_bool())
            .unwrap_or(true);
        if wanted {
            mount_token(spec);
        }
        Ok(())
    }

    /// Gives a Service families, and an address of each; `own` are addresses that it has already.
    fn give_addresses(&mut self, service: &mut Value, own: &[String]) -> Result<(), Status> {
        if meta::text(service, "/spec/type") == "ExternalName" {
            return Ok(());
        }
        let name = meta::name(service).to_owned();
        let families = families::complete(&mut service["spec"], self.stack)
            .map_err(|faults| Status::invalid("Service", "", &name, &faults))?;
        let asked = families::addresses(&service["spec"]);
        let mut given = Vec::new();
        if asked.first().is_some_and(|first| first == "None") {
            given.push("None".to_owned());
        } else {
            for (index, family) in families.into_iter().enumerate() {
                given.push(match asked.get(index).filter(|asked| !asked.is_empty()) {
                    Some(asked) if own.contains(asked) => asked.clone(),
                    Some(asked) => self.checked_address(&name, family, asked)?,
                    None => self
                        .free_address(family)
                        .ok_or_else(|| Status::internal("no service address is free"))?
                        .to_string(),
                });
            }
        }
        service["spec"]["clusterIP"] = given[0].clone().into();
        service["spec"]["clusterIPs"] = given.into();
        Ok(())
    }

    /// Gives a Service that takes traffic from outside a port of the nodes for each of its own; `old` is the Service as
    /// it was, or null.
    fn give_node_ports(&self, service: &mut Value, old: &Value) -> Result<(), Status> {
        let (namespace, name) = (meta::namespace(service).to_owned(), meta::name(service).to_owned());
        let outside = ["NodePort", "LoadBalancer"].contains(&meta::text(service, "/spec/type"));
        let mut used = self.node_ports((&namespace, &name));
        for (index, port) in service["spec"]["ports"].as_array_mut().into_iter().flatten().enumerate() {
            let same = |old: &&Value| old["port"] == port["port"] && old["protocol"] == port["protocol"];
            let had = meta::items(old, "/spec/ports").find(same).and_then(|old| old["nodePort"].as_u64());
            let asked = port["nodePort"].as_u64().filter(|port| *port != 0);
            if !outside {
                // What the server gave goes with the type that it was given for.
                if asked == had {
                    meta::map(port).remove("nodePort");
                }
                continue;
            }
            let kept = had.filter(|port| !used.contains(port));
            let given = match asked {
                Some(asked) if !NODE_PORTS.contains(&asked) => Err("is not in the valid range 30000-32767"),
                Some(asked) if used.contains(&asked) => Err("is already allocated"),
                Some(asked) => Ok(asked),
                None => kept
                    .or_else(|| NODE_PORTS.clone().find(|port| !used.contains(port)))
                    .ok_or("of the nodes: none is free"),
            };
            let given = given.map_err(|why| {
                let why = format!("Invalid value: {}: provided port {why}", asked.unwrap_or(0));
                Status::invalid("Service", "", &name, &[(format!("spec.ports[{index}].nodePort"), why)])
            })?;
            used.push(given);
            port["nodePort"] = given.into();
        }
        Ok(())
    }

    /// The node ports of all Services but this one.
    fn node_ports(&self, but: (&str, &str)) -> Vec<u64> {
        self.store
            .list("services", None)
            .filter(|service| (meta::namespace(service), meta::name(service)) != but)
            .flat_map(|service| meta::items(service, "/spec/ports"))
            .filter_map(|port| port["nodePort"].as_u64())
            .collect()
    }

    fn is_used(&self, address: IpAddr) -> bool {
        let mut addresses =
            self.store.list("services", None).flat_map(|service| families::addresses(&service["spec"]));
        addresses.any(|used| used.parse() == Ok(address))
    }

    fn free_address(&mut self, family: Family) -> Option<IpAddr> {
        for _ in 0..u16::MAX {
            // The low addresses are left to those who ask for one, such as the cluster's DNS.
            self.next_service = if self.next_service + 1 < u16::MAX { self.next_service + 1 } else { 257 };
            let address = fabric::service_address(family, self.next_service);
            if !self.is_used(address) {
                return Some(address);
            }
        }
        None
    }

    fn checked_address(&self, name: &str, family: Family, asked: &str) -> Result<String, Status> {
        let refuse = |why: String| {
            let field = "spec.clusterIPs".to_owned();
            let why = format!("Invalid value: [\"{asked}\"]: failed to allocate IP {asked}: {why}");
            Err(Status::invalid("Service", "", name, &[(field, why)]))
        };
        let (first, length) = fabric::service_range(family);
        let address = asked.parse::<IpAddr>().ok();
        let within =
            |address: &IpAddr| ipnet::IpNet::new(first, length).is_ok_and(|range| range.contains(address));
        let Some(address) = address.filter(within) else {
            return refuse(format!(
                "provided IP is not in the valid range. The range of valid IPs is {first}/{length}"
            ));
        };
        if self.is_used(address) {
            return refuse("provided IP is already allocated".to_owned());
        }
        // As it is written everywhere else, whatever the user's way to write it.
        Ok(address.to_string())
    }
}

/// Adds the volume with token, CA and namespace to each container that mounts nothing there itself.
fn mount_token(spec: &mut Value) {
    let name = format!("kube-api-access-{}", meta::random_suffix(5));
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            let taken = meta::items(container, "/volumeMounts")
                .any(|mount| meta::text(mount, "/mountPath") == TOKEN_DIRECTORY);
            if !taken && container.is_object() {
                mounted = true;
                let mount = json!({"name": name, "readOnly": true, "mountPath": TOKEN_DIRECTORY});
                meta::push(container, "volumeMounts", mount);
            }
        }
    }
    if mounted {
        let namespace =
            json!({"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}});
        let sources = json!([
            {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [namespace]}},
        ]);
        meta::push(
            spec,
            "volumes",
            json!({"name": name, "projected": {"sources": sources, "defaultMode": 420}}),
        );
    }
}
