//! Pods that a scenario describes in one line.

use std::net::IpAddr;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::cni;
use crate::lab::{Lab, PodRef};
use crate::stack::Family;

/// A Pod with one container from the examples, in the making.
#[derive(Clone, Debug)]
pub struct Workload {
    namespace: String,
    object: Value,
}

impl Workload {
    /// A pod that does nothing until told to.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "labels": { "app": name }, "annotations": {} },
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main", "image": "ambit/examples:latest", "command": ["ambit-example", "idle"],
                    "ports": [],
                }],
            },
        });
        Self { namespace: namespace.to_owned(), object }
    }

    /// What its container runs.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.container()["command"] = json!(words);
        self
    }

    /// An HTTP server on 8080 that answers with the pod's name, ready when it does.
    #[must_use]
    pub fn serve(self) -> Self {
        let name = self.object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.command(&["ambit-example", "serve", "--listen=[::]:8080", &format!("--name={name}")])
            .port("http", 8080)
            .readiness(json!({ "httpGet": { "path": "/healthz", "port": 8080 }, "periodSeconds": 1 }))
    }

    /// An echo server on 7000, TCP and UDP, ready when it accepts.
    #[must_use]
    pub fn echo(self) -> Self {
        self.command(&["ambit-example", "echo", "--listen=[::]:7000", "--udp"])
            .port("tcp", 7000)
            .readiness(json!({ "tcpSocket": { "port": 7000 }, "periodSeconds": 1 }))
    }

    #[must_use]
    pub fn port(mut self, name: &str, number: u16) -> Self {
        if let Some(ports) = self.container()["ports"].as_array_mut() {
            ports.push(json!({ "name": name, "containerPort": number }));
        }
        self
    }

    #[must_use]
    pub fn readiness(mut self, probe: Value) -> Self {
        self.container()["readinessProbe"] = probe;
        self
    }

    #[must_use]
    pub fn liveness(mut self, probe: Value) -> Self {
        self.container()["livenessProbe"] = probe;
        self
    }

    /// With addresses of these IP families only.
    #[must_use]
    pub fn families(mut self, families: &[Family]) -> Self {
        let names: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
        self.object["metadata"]["annotations"][cni::FAMILIES] = json!(names.join(","));
        self
    }

    /// With an interface in the second network, too.
    #[must_use]
    pub fn second_network(mut self) -> Self {
        self.object["metadata"]["annotations"][cni::FURTHER] = json!(cni::SECOND);
        self
    }

    /// On node `index`, counted from 1.
    #[must_use]
    pub fn on_node(mut self, index: u8) -> Self {
        self.object["spec"]["nodeSelector"] = json!({ "kubernetes.io/hostname": format!("n{index}") });
        self
    }

    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.object["metadata"]["labels"][key] = json!(value);
        self
    }

    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        self.object["spec"]["serviceAccountName"] = json!(name);
        self
    }

    /// With this address, which has to be free on its node.
    #[must_use]
    pub fn at(mut self, address: IpAddr) -> Self {
        self.object["metadata"]["annotations"][crate::cni::ADDRESS] = json!(address.to_string());
        self
    }

    /// Set any field by its path in the Pod, e.g. `/spec/hostNetwork`.
    #[must_use]
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", pointer));
        if let Some(parent) = self.object.pointer_mut(parent) {
            parent[key] = value;
        }
        self
    }

    /// Its container as it is now, to make a pod of several.
    #[must_use]
    pub fn container_object(&self) -> Value {
        self.object["spec"]["containers"][0].clone()
    }

    fn container(&mut self) -> &mut Value {
        &mut self.object["spec"]["containers"][0]
    }

    /// Create it.
    pub fn create(self, lab: &Lab) -> anyhow::Result<PodRef<'_>> {
        let name = self.object["metadata"]["name"].as_str().context("a pod without a name")?.to_owned();
        let namespace = self.namespace.clone();
        lab.cluster().create(self.object)?;
        Ok(lab.pod(&format!("{namespace}/{name}")))
    }

    /// Create it and wait until it is ready.
    pub fn start(self, lab: &Lab) -> anyhow::Result<PodRef<'_>> {
        let pod = self.create(lab)?;
        pod.ready()?;
        Ok(pod)
    }
}

/// A Service for the pods with label `app: <app>`, with an address of each IP family that the lab has.
pub fn service(lab: &Lab, namespace: &str, app: &str, port: u16, target: u16) -> anyhow::Result<()> {
    service_to(lab, namespace, app, port, &json!(target))
}

/// The same with a target port by name.
pub fn named_service(lab: &Lab, namespace: &str, app: &str, port: u16, target: &str) -> anyhow::Result<()> {
    service_to(lab, namespace, app, port, &json!(target))
}

fn service_to(lab: &Lab, namespace: &str, app: &str, port: u16, target: &Value) -> anyhow::Result<()> {
    lab.cluster().create(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": app, "namespace": namespace },
        "spec": {
            "selector": { "app": app }, "ipFamilyPolicy": "PreferDualStack",
            "ports": [{ "name": "main", "port": port, "targetPort": target }],
        },
    }))
}

/// A service account.
pub fn service_account(lab: &Lab, namespace: &str, name: &str) -> anyhow::Result<()> {
    lab.cluster().ensure(json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": namespace },
    }))
}
