use std::os::unix::fs::symlink;

use super::*;

const PORT: u16 = 10250;
const POD: &str =
    "/kubepods.slice/kubepods-pod0f9d1c1e_6a53_4f36_8a3e_f0ac3a3f5c57.slice/cri-containerd-a.scope";

/// A /proc, and a cgroup hierarchy, with what the test puts there.
struct World {
    directory: PathBuf,
}

impl World {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-kubelet-{}-{name}", std::process::id()));
        fs::create_dir_all(directory.join("proc/thread-self/net")).unwrap();
        fs::create_dir_all(directory.join("cgroup")).unwrap();
        Self { directory }
    }

    /// A process that has the socket with this inode.
    fn process(&self, pid: u32, cgroup: &str, inode: u64) -> &Self {
        let process = self.directory.join("proc").join(pid.to_string());
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::write(process.join("cgroup"), format!("2:cpu:/\n0::{cgroup}\n")).unwrap();
        symlink("/dev/null", process.join("fd/0")).unwrap();
        symlink(format!("socket:[{inode}]"), process.join("fd/7")).unwrap();
        self
    }

    fn cgroup(&self, path: &str) -> PathBuf {
        let directory = self.directory.join("cgroup").join(path.trim_start_matches('/'));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn listens(&self, table: &str, lines: &[(u16, &str, u64)]) -> &Self {
        let mut text = "  sl  local_address rem_address   st ...\n".to_owned();
        for (port, state, inode) in lines {
            text.push_str(&format!(
                "   0: 00000000:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100 0 0 10 0\n"
            ));
        }
        fs::write(self.directory.join("proc/thread-self/net").join(table), text).unwrap();
        self
    }

    /// `root` is the part of the hierarchy that is mounted, as the agent's cgroup namespace shows it.
    fn find(&self, root: &str, setting: Option<PathBuf>, pods: Option<&Path>) -> Result<Kubelet, NotFound> {
        let point = self.directory.join("cgroup");
        let mountinfo = format!("31 23 0:28 {root} {} rw - cgroup2 cgroup2 rw\n", point.display());
        let config = Config { cgroup: setting, port: PORT };
        find(&config, &self.directory.join("proc"), &mountinfo, pods)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

#[test]
fn who_listens_on_the_port_is_the_kubelet() {
    let world = World::new("listens");
    let cgroup = world.cgroup("/system.slice/kubelet.service");
    let pods = world.cgroup("/kubepods.slice");
    world.listens("tcp6", &[(443, "0A", 40), (PORT, "01", 41), (PORT, "0A", 42)]);
    world.process(7, "/system.slice/other.service", 41).process(8, "/system.slice/kubelet.service", 42);
    let evidence = Evidence::Listens { pid: 8, port: PORT };
    let expect = Kubelet { cgroup: cgroup.clone(), except: None, evidence };
    assert_eq!(world.find("/", None, Some(&pods)).as_ref(), Ok(&expect));
    assert_eq!(world.find("/", None, None).as_ref(), Ok(&expect), "where the pods are is not known");
}

/// The agent's pod has a cgroup namespace of its own, and the node's hierarchy mounted.
#[test]
fn seen_from_a_cgroup_namespace() {
    let world = World::new("namespace");
    let cgroup = world.cgroup("/system.slice/kubelet.service");
    world.listens("tcp", &[(PORT, "0A", 42)]);
    world.process(8, "/../../../system.slice/kubelet.service", 42);
    assert_eq!(world.find("/../../..", None, None).map(|kubelet| kubelet.cgroup), Ok(cgroup));
    let hidden = NotFound::NotMounted("/../../../system.slice/kubelet.service".to_owned());
    assert_eq!(world.find("/", None, None), Err(hidden));
}

#[test]
fn a_pod_that_has_the_port_is_not_the_kubelet() {
    let world = World::new("pod");
    world.cgroup(POD);
    world.listens("tcp", &[(PORT, "0A", 42)]);
    world.process(8, POD, 42);
    assert_eq!(world.find("/", None, None), Err(NotFound::NoProcess(PORT)));
}

#[test]
fn nobody_there() {
    let world = World::new("nobody");
    assert_eq!(world.find("/", None, None), Err(NotFound::NotListening(PORT)));
    world.listens("tcp", &[(PORT, "0A", 42)]);
    assert_eq!(world.find("/", None, None), Err(NotFound::NoProcess(PORT)));
}

#[test]
fn pods_below_the_kubelets_cgroup_are_told_apart_or_there_is_no_answer() {
    let world = World::new("shared");
    let (root, pods) = (world.cgroup("/"), world.cgroup("/kubepods.slice"));
    world.listens("tcp", &[(PORT, "0A", 42)]);
    world.process(8, "/", 42);
    let except = |found: Result<Kubelet, NotFound>| found.map(|kubelet| kubelet.except);
    assert_eq!(except(world.find("/", None, Some(&pods))), Ok(Some(pods.clone())));
    assert_eq!(except(world.find("/", None, None)), Ok(None), "there is no pod");
    world.process(9, POD, 43);
    assert_eq!(world.find("/", None, None), Err(NotFound::Pods(root)));
    assert_eq!(except(world.find("/", None, Some(&pods))), Ok(Some(pods)));
}

#[test]
fn the_setting_is_believed() {
    let world = World::new("setting");
    let (cgroup, pods) = (world.cgroup("/k3s"), world.cgroup("/k3s/kubepods"));
    let found = world.find("/", Some(cgroup.clone()), Some(&pods));
    let expect = Kubelet { cgroup: cgroup.clone(), except: Some(pods), evidence: Evidence::Setting };
    assert_eq!(found, Ok(expect));
    let missing = cgroup.join("gone");
    assert_eq!(world.find("/", Some(missing.clone()), None), Err(NotFound::NoCgroup(missing)));
}

#[test]
fn cgroups_in_each_other() {
    for (cgroup, other, expected) in [
        ("/a/b", "/a", true),
        ("/a", "/a", true),
        ("/ab", "/a", false),
        ("/a", "/a/b", false),
        ("/a", "/", true),
        ("/", "/", true),
        // Of a reader in /x/y/z: other is /, /x, /k.
        ("/", "/../../..", true),
        ("/../w", "/../../..", true),
        ("/../../../k", "/../../..", true),
        ("/../../../k", "/../..", false),
        ("/../w", "/../..", true),
        ("/../../../k/l", "/../../../k", true),
        ("/../w", "/../../../k", false),
    ] {
        assert_eq!(inside(cgroup, other), expected, "{cgroup} in {other}");
    }
}
