//! The node's directories, before and after.

use std::os::unix::fs::symlink;

use mesh_core::readiness::Readiness;
use serde_json::{Value, json};

use super::*;

struct Node(PathBuf);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Node {
    fn new(name: &str) -> Self {
        let node = Self(std::env::temp_dir().join(format!("ambit-node-{}-{name}", std::process::id())));
        fs::create_dir_all(node.conf("")).unwrap();
        fs::write(node.0.join(TYPE), "binary").unwrap();
        node
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.0.join("net.d").join(name)
    }

    fn put(&self, name: &str, value: &Value) {
        fs::write(self.conf(name), value.to_string()).unwrap();
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.conf(name)).unwrap()).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.conf("")).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn installer(&self) -> Installer {
        let config =
            Config { cni_conf_dir: self.conf(""), cni_bin_dir: self.0.join("opt/bin"), cni_install: true };
        let socket = Path::new("/run/ambit/cni.sock");
        Installer::new(&config, self.0.join(TYPE), socket, vec!["kube-system".into()])
    }

    /// Installs, and expects our entry in that file, which runtimes take first.
    fn check(&self, file: &str, changed: bool) {
        let installed = self.installer().once().unwrap();
        let path = fs::canonicalize(self.conf(file)).unwrap();
        assert_eq!(installed, Installed::Chained { file: path, changed }, "{file}");
        let list = self.read(file);
        let last = list["plugins"].as_array().unwrap().last().unwrap();
        assert_eq!(last["type"], TYPE);
        assert_eq!(last["excludeNamespaces"], json!(["kube-system"]));
    }
}

fn list(kind: &str) -> Value {
    json!({"cniVersion": "1.0.0", "name": kind, "plugins": [{"type": kind}]})
}

fn conf(kind: &str) -> Value {
    json!({"cniVersion": "0.4.0", "name": kind, "type": kind})
}

#[test]
fn the_first_list_is_chained_and_chained_again() {
    let node = Node::new("list");
    node.put("10-a.conflist", &list("a"));
    node.put("20-b.conflist", &list("b"));
    node.check("10-a.conflist", true);
    node.check("10-a.conflist", false);
    assert_eq!(node.read("20-b.conflist"), list("b"), "runtimes do not read it");
    // Another CNI writes its file anew.
    node.put("10-a.conflist", &list("a"));
    node.check("10-a.conflist", true);
    // And another one comes before.
    node.put("05-c.conflist", &list("c"));
    node.check("05-c.conflist", true);
    assert_eq!(node.names(), ["05-c.conflist", "10-a.conflist", "20-b.conflist"], "nothing else is left");
    node.installer().remove().unwrap();
    for (name, kind) in [("05-c.conflist", "c"), ("10-a.conflist", "a"), ("20-b.conflist", "b")] {
        assert_eq!(node.read(name), list(kind));
    }
    assert!(!node.0.join("opt/bin").join(TYPE).exists());
}

#[test]
fn a_single_configuration_stays_and_gets_a_list_before_it() {
    let node = Node::new("conf");
    node.put("10-a.conf", &conf("a"));
    node.check("10-a.ambit.conflist", true);
    node.check("10-a.ambit.conflist", false);
    assert_eq!(node.read("10-a.conf"), conf("a"));
    assert_eq!(node.names()[0], "10-a.ambit.conflist");
    // The original changes: so does the list made from it.
    node.put("10-a.conf", &json!({"cniVersion": "0.4.0", "name": "a", "type": "a", "mtu": 1400}));
    node.check("10-a.ambit.conflist", true);
    assert_eq!(node.read("10-a.ambit.conflist")["plugins"][0]["mtu"], 1400);
    // Another CNI takes over: our list of the old one must not win.
    fs::remove_file(node.conf("10-a.conf")).unwrap();
    node.put("10-a.conflist", &list("b"));
    node.check("10-a.conflist", true);
    assert_eq!(node.names(), ["10-a.conflist"]);
    node.put("05-c.conf", &conf("c"));
    node.check("05-c.ambit.conflist", true);
    node.installer().remove().unwrap();
    assert_eq!(node.names(), ["05-c.conf", "10-a.conflist"]);
    assert_eq!(node.read("10-a.conflist"), list("b"));
}

#[test]
fn a_node_without_configuration_waits() {
    let node = Node::new("none");
    assert_eq!(node.installer().once().unwrap(), Installed::NoConfiguration);
    fs::write(node.conf("00-broken.conflist"), "{").unwrap();
    fs::write(node.conf("01-empty.conf"), "{}").unwrap();
    fs::write(node.conf("readme.txt"), "").unwrap();
    assert_eq!(node.installer().once().unwrap(), Installed::NoConfiguration);
    node.put("10-a.conflist", &list("a"));
    node.check("10-a.conflist", true);
    fs::remove_dir_all(node.conf("")).unwrap();
    assert_eq!(node.installer().once().unwrap(), Installed::NoConfiguration);
}

#[test]
fn a_version_that_we_do_not_speak_is_left_alone() {
    let node = Node::new("version");
    let old = json!({"cniVersion": "0.2.0", "name": "a", "plugins": [{"type": "a"}]});
    node.put("10-a.conflist", &old);
    let error = node.installer().once().unwrap_err().to_string();
    assert!(error.contains("10-a.conflist") && error.contains("0.2.0"), "{error}");
    assert_eq!(node.read("10-a.conflist"), old, "pods still start");
}

#[test]
fn a_link_is_followed_and_stays_one() {
    let node = Node::new("link");
    let target = node.0.join("elsewhere.conflist");
    fs::write(&target, list("a").to_string()).unwrap();
    symlink(&target, node.conf("10-a.conflist")).unwrap();
    node.check("10-a.conflist", true);
    assert!(fs::symlink_metadata(node.conf("10-a.conflist")).unwrap().is_symlink());
}

#[test]
fn the_binary_is_copied_when_it_differs() {
    let node = Node::new("binary");
    node.put("10-a.conflist", &list("a"));
    let target = node.0.join("opt/bin").join(TYPE);
    let content = || fs::read_to_string(&target).unwrap();
    node.installer().once().unwrap();
    assert_eq!(content(), "binary");
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
    fs::write(node.0.join(TYPE), "newer binary").unwrap();
    node.installer().once().unwrap();
    assert_eq!(content(), "newer binary");
    fs::remove_file(node.0.join(TYPE)).unwrap();
    let error = node.installer().once().unwrap_err().to_string();
    assert!(error.contains(TYPE), "{error}");
}

const PATIENCE: Duration = Duration::from_secs(10);

/// The keeper of a node's configuration, and what its readiness says.
struct Keeper {
    readiness: Readiness,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Keeper {
    fn start(node: &Node) -> Self {
        let (readiness, stop) = (Readiness::new(), CancellationToken::new());
        let task = tokio::spawn(keep(
            node.installer(),
            Duration::from_millis(5),
            readiness.gate("cni"),
            stop.clone(),
        ));
        Self { readiness, stop, task }
    }

    /// Waits until readiness says all of this and nothing else is wrong; nothing means ready.
    async fn says(&self, parts: &[&str]) {
        let met = |pending: &[String]| match pending {
            [] => parts.is_empty(),
            [only] => !parts.is_empty() && parts.iter().all(|part| only.contains(part)),
            _ => false,
        };
        let waited = tokio::time::timeout(PATIENCE, self.readiness.until(met)).await;
        assert!(waited.is_ok(), "expected {parts:?}, found {:?}", self.readiness.pending());
    }

    /// Waits until our entry is the last in the file.
    async fn chains(&self, node: &Node, file: &str, kind: &str) {
        // The keeper says so whenever it has written.
        let ours = |pending: &[String]| {
            let list = node.read(file);
            pending.is_empty() && list["plugins"][0]["type"] == kind && list["plugins"][1]["type"] == TYPE
        };
        let waited = tokio::time::timeout(PATIENCE, self.readiness.until(ours)).await;
        assert!(waited.is_ok(), "{:?}, {:?}", node.read(file), self.readiness.pending());
    }
}

#[tokio::test]
async fn another_cni_rewrites_its_configuration() {
    let node = Node::new("keep");
    let keeper = Keeper::start(&node);
    keeper.says(&["cni", "no CNI configuration"]).await;
    node.put("10-a.conflist", &list("a"));
    keeper.chains(&node, "10-a.conflist", "a").await;
    // In place, and by a rename as most do.
    node.put("10-a.conflist", &list("b"));
    keeper.chains(&node, "10-a.conflist", "b").await;
    node.put("new.tmp", &list("c"));
    fs::rename(node.conf("new.tmp"), node.conf("10-a.conflist")).unwrap();
    keeper.chains(&node, "10-a.conflist", "c").await;
    keeper.stop.cancel();
    keeper.task.await.unwrap();
    assert_eq!(node.read("10-a.conflist")["plugins"][1]["type"], TYPE, "stopping removes nothing");
}

#[tokio::test]
async fn readiness_tells_what_keeps_it_out_of_the_configuration() {
    let node = Node::new("kept-out");
    node.put("10-a.conflist", &list("a"));
    let keeper = Keeper::start(&node);
    keeper.chains(&node, "10-a.conflist", "a").await;
    // Rewritten to what we cannot be part of.
    let newer = json!({"cniVersion": "9.0.0", "name": "a", "plugins": [{"type": "a"}]});
    node.put("10-a.conflist", &newer);
    keeper.says(&["cni", "10-a.conflist", "9.0.0"]).await;
    assert_eq!(node.read("10-a.conflist"), newer, "pods still start");
    node.put("10-a.conflist", &list("b"));
    keeper.chains(&node, "10-a.conflist", "b").await;
    // Rewritten, and ours cannot be put back: the name that it would be written under is taken.
    let obstacle = node.conf(&format!(".10-a.conflist.{}.tmp", std::process::id()));
    fs::create_dir(&obstacle).unwrap();
    node.put("10-a.conflist", &list("c"));
    keeper.says(&["cni", "cannot write", "10-a.conflist"]).await;
    assert_eq!(node.read("10-a.conflist"), list("c"));
    fs::remove_dir(&obstacle).unwrap();
    keeper.chains(&node, "10-a.conflist", "c").await;
    fs::remove_file(node.conf("10-a.conflist")).unwrap();
    keeper.says(&["cni", "no CNI configuration"]).await;
}
