//! The manifests: what they install is what is used, no more.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::api::Asked;
use mesh_tests::peer::Authority;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::{Value, json};
use tonic::Code;

use crate::ca;
use crate::fixture::SOON;
use crate::shared::scenario;

const NODE_AGENT: &str = "system:serviceaccount:ambit-system:node-agent";

const CA: &str = "system:serviceaccount:ambit-system:ambit-ca";

/// One thing that a role allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    verb: String,
    group: String,
    resource: String,
    /// Everywhere, if empty.
    namespace: String,
    /// Of any name, if empty.
    name: String,
}

impl Right {
    fn covers(&self, asked: &Asked) -> bool {
        let same = |own: &str, theirs: &str| own.is_empty() || own == theirs;
        (&self.verb, &self.group, &self.resource) == (&asked.verb, &asked.group, &asked.resource)
            && same(&self.namespace, &asked.namespace)
            && same(&self.name, &asked.name)
    }
}

/// What a ClusterRole or Role allows, one by one.
fn rights(lab: &Lab, role: &str) -> anyhow::Result<BTreeSet<Right>> {
    let role = lab.kubectl(["get", "-n", "ambit-system", role, "-o", "json"])?;
    let role: Value = serde_json::from_str(&role)?;
    let namespace = role["metadata"]["namespace"].as_str().unwrap_or_default();
    let texts = |rule: &Value, field: &str| -> Vec<String> {
        let texts = rule[field].as_array().into_iter().flatten();
        texts.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().context("a role without rules")? {
        let mut names = texts(rule, "resourceNames");
        if names.is_empty() {
            names.push(String::new());
        }
        for verb in texts(rule, "verbs") {
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    rights.extend(names.iter().map(|name| Right {
                        verb: verb.clone(),
                        group: group.clone(),
                        resource: resource.clone(),
                        namespace: namespace.to_owned(),
                        name: name.clone(),
                    }));
                }
            }
        }
    }
    Ok(rights)
}

/// Every right was used, and nothing was asked for without one.
fn all_used(lab: &Lab, user: &str, roles: &[&str]) -> anyhow::Result<()> {
    let mut granted = BTreeSet::new();
    for role in roles {
        granted.append(&mut rights(lab, role)?);
    }
    anyhow::ensure!(granted.len() > 4, "{user} has only {granted:?}");
    eventually(&format!("{user} has used each of its rights"), SOON, || {
        let asked = lab.api().asked_by(user);
        let refused: Vec<_> = asked.iter().filter(|asked| !asked.granted).collect();
        anyhow::ensure!(refused.is_empty(), "it was refused {refused:?}");
        let unused: Vec<_> =
            granted.iter().filter(|right| !asked.iter().any(|asked| right.covers(asked))).collect();
        anyhow::ensure!(unused.is_empty(), "nobody used {unused:#?}");
        Ok(())
    })
}

/// A pod in the mesh refuses a client by policy, which is told on it.
fn a_refusal(lab: &Lab) -> anyhow::Result<()> {
    let server = Workload::new("mesh", "refusing").on_node(1).start(lab)?;
    server.captured()?;
    lab.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: refusing, namespace: mesh }\n\
         spec: { selector: { matchLabels: { app: refusing } }, action: DENY, rules: [{}] }\n",
    )?;
    let url = format!("http://{}/", SocketAddr::new(server.address()?, 80));
    eventually("an Event", SOON, || {
        lab.pod("mesh/client").exec(["curl", "-sS", "--max-time", "5", &url])?;
        let fields = "--field-selector=reason=PolicyDenied,involvedObject.name=refusing";
        let events = lab.kubectl(["get", "events", "-n", "mesh", fields, "-o", "name"])?;
        anyhow::ensure!(!events.is_empty(), "none");
        Ok(())
    })?;
    lab.kubectl(["delete", "-n", "mesh", "authorizationpolicy/refusing", "pod/refusing"]).map(drop)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_right_in_the_manifests_is_used_and_no_other_is_asked_for() {
    scenario(|lab| {
        // What happens now and then: a pod that starts before its watch tells of it, roots that somebody changed.
        lab.api().set_watch_delay(None, Some(NODE_AGENT), Duration::from_secs(20));
        let early = Workload::new("mesh", "unheard-of").on_node(1).start(lab);
        lab.api().set_watch_delay(None, Some(NODE_AGENT), Duration::ZERO);
        early?.captured()?;
        let map =
            lab.kubectl(["get", "-n", "ambit-system", "configmap", "ambit-ca-root-cert", "-o", "json"])?;
        let map: Value = serde_json::from_str(&map)?;
        let roots = map["data"]["root-cert.pem"].as_str().context("no roots")?;
        let patch = json!({ "data": { "root-cert.pem": format!("{roots}\n") } }).to_string();
        lab.kubectl([
            "patch",
            "-n",
            "ambit-system",
            "configmap",
            "ambit-ca-root-cert",
            "--type=merge",
            "-p",
            &patch,
        ])?;
        // A key that the user brings, old as it is, and takes away again.
        Authority::valid(1980, 2060)?.install(lab)?;
        lab.pod("ambit-system/ambit-ca").kill_and_wait()?;
        lab.kubectl(["delete", "-n", "ambit-system", "secret", "cacerts"])?;

        // Tokens of clusters before 1.30 do not name their node, as that of a pod which is on none: the CA looks it up.
        Workload::new("ambit-system", "nowhere").service_account("ztunnel").on_node(9).create(lab)?;
        let token = ca::token(lab, "ambit-system", "ztunnel", "nowhere", ca::AUDIENCE)?;
        let answer = ca::ask(lab, &token, &ca::spiffe("client"), true)?;
        lab.kubectl(["delete", "-n", "ambit-system", "pod", "nowhere"])?;
        assert_eq!(answer, Err(Code::PermissionDenied));

        // Policies about nobody, whose status says what became of them.
        let policies = ["PeerAuthentication", "AuthorizationPolicy"].map(|kind| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{ name: nobodys, namespace: plain }}\n\
                 spec: {{ selector: {{ matchLabels: {{ app: nobody }} }} }}\n"
            )
        });
        lab.apply(&policies.join("---\n"))?;
        // The same of what is at no address.
        let entries =
            [("ServiceEntry", "{ hosts: [nobodys.host] }"), ("WorkloadEntry", "{ address: nobodys.host }")];
        let entries = entries.map(|(kind, spec)| {
            format!(
                "apiVersion: networking.istio.io/v1\nkind: {kind}\n\
                 metadata: {{ name: nobodys, namespace: plain }}\nspec: {spec}\n"
            )
        });
        lab.apply(&entries.join("---\n"))?;
        a_refusal(lab)?;
        crate::xds::a_stranger(lab)?;
        all_used(lab, NODE_AGENT, &["clusterrole/ambit-node-agent"])?;
        let all = ["peerauthentication", "authorizationpolicy", "serviceentry", "workloadentry"];
        let all = all.map(|kind| format!("{kind}/nobodys"));
        lab.kubectl(["delete", "-n", "plain"].into_iter().chain(all.iter().map(String::as_str)))?;
        all_used(lab, CA, &["clusterrole/ambit-ca", "role/ambit-ca"])?;
        let ztunnel = lab.api().asked_by("system:serviceaccount:ambit-system:ztunnel");
        anyhow::ensure!(ztunnel.is_empty(), "ztunnel asked for {ztunnel:?}");
        Ok(())
    });
}

/// Applied again nothing changes, and the server takes each object.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_manifests_can_be_applied_again() {
    scenario(|lab| {
        let base = mesh_tests::lab::manifests().join("base");
        let base = base.to_string_lossy();
        let objects = lab.kubectl(["kustomize", &base])?.matches("\nkind: ").count();
        let applied = lab.kubectl(["apply", "-k", &base, "--dry-run=server"])?;
        let lines: Vec<&str> = applied.lines().collect();
        assert_eq!(lines.len(), objects, "{applied}");
        assert!(objects > 10 && lines.iter().all(|line| line.contains(" unchanged ")), "{applied}");
        let examples = mesh_tests::lab::manifests().join("examples/payments");
        // A dry run does not make the namespace, so the others find none: it is there first.
        lab.namespace("payments", &[])?;
        let applied = lab.kubectl(["apply", "-k", &examples.to_string_lossy(), "--dry-run=server"])?;
        assert!(applied.lines().count() > 10, "{applied}");
        assert!(applied.lines().all(|line| line.contains("(server dry run)")), "{applied}");
        lab.kubectl(["delete", "namespace", "payments"]).map(drop)
    });
}
