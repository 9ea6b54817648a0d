//! Admission: what a new object gets or is refused because of other objects in the cluster. Namespaces must be
//! there, pods get their service account and its token volume, services get addresses and node ports.

use std::net::Ipv4Addr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::cluster::{Cluster, Deletion, Write};
use super::kinds::Kind;
use super::meta;
use super::status::Status;

/// First address of the service range 10.96.0.0/16, and its size.
const SERVICE_RANGE: (u32, u32) = (0x0a60_0000, 0x1_0000);
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
            let why =
                format!("unable to create new content in namespace {name} because it is being terminated");
            return Err(Status::forbidden(&kind.plural, &kind.group, meta::name(object), &why));
        }
        Ok(())
    }

    /// Completes a new object from the cluster's state, or refuses it.
    pub(super) fn admit(&mut self, kind: &Kind, object: &mut Value) -> Result<(), Status> {
        match (kind.group.as_str(), kind.kind.as_str()) {
            ("", "Pod") => self.admit_pod(object),
            ("", "Service") => self.admit_service(object),
            _ => Ok(()),
        }
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

    fn admit_service(&mut self, service: &mut Value) -> Result<(), Status> {
        if meta::text(service, "/spec/type") == "ExternalName" {
            return Ok(());
        }
        let name = meta::name(service).to_owned();
        let asked = meta::text(service, "/spec/clusterIP").to_owned();
        let address = match asked.as_str() {
            "None" => asked,
            "" => {
                self.free_address().ok_or_else(|| Status::internal("no service address is free"))?.to_string()
            }
            asked => self.checked_address(&name, asked)?,
        };
        service["spec"]["clusterIP"] = address.clone().into();
        service["spec"]["clusterIPs"] = json!([address]);
        if ["NodePort", "LoadBalancer"].contains(&meta::text(service, "/spec/type")) {
            let mut used = self.node_ports();
            for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
                if port["nodePort"].as_u64().unwrap_or(0) == 0 {
                    let free = NODE_PORTS.clone().find(|port| !used.contains(port));
                    let free = free.ok_or_else(|| Status::internal("no node port is free"))?;
                    used.push(free);
                    port["nodePort"] = free.into();
                }
            }
        }
        Ok(())
    }

    fn node_ports(&self) -> Vec<u64> {
        self.store
            .list("services", None)
            .flat_map(|service| meta::items(service, "/spec/ports"))
            .filter_map(|port| port["nodePort"].as_u64())
            .collect()
    }

    fn is_used(&self, address: &str) -> bool {
        self.store.list("services", None).any(|service| meta::text(service, "/spec/clusterIP") == address)
    }

    fn free_address(&mut self) -> Option<Ipv4Addr> {
        let (first, size) = SERVICE_RANGE;
        for _ in 0..size {
            // The low addresses are left to those who ask for one, such as the cluster's DNS.
            self.next_service = if self.next_service + 1 < size - 1 { self.next_service + 1 } else { 257 };
            let address = Ipv4Addr::from_bits(first + self.next_service);
            if !self.is_used(&address.to_string()) {
                return Some(address);
            }
        }
        None
    }

    fn checked_address(&self, name: &str, asked: &str) -> Result<String, Status> {
        let refuse = |why: String| {
            let field = "spec.clusterIPs".to_owned();
            Err(Status::invalid(
                "Service",
                "",
                name,
                &[(field, format!("Invalid value: [\"{asked}\"]: {why}"))],
            ))
        };
        let Ok(address) = asked.parse::<Ipv4Addr>() else {
            return refuse("must be a valid IP address".to_owned());
        };
        let (first, size) = SERVICE_RANGE;
        if !(first..first + size).contains(&address.to_bits()) {
            let why = "provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16";
            return refuse(format!("failed to allocate IP {asked}: {why}"));
        }
        if self.is_used(asked) {
            return refuse(format!("failed to allocate IP {asked}: provided IP is already allocated"));
        }
        Ok(asked.to_owned())
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
