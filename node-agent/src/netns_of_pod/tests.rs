//! Real cgroup files by runtime and layout, and the search over a made-up `/proc`.

use std::os::unix::fs::symlink;

use super::*;

const UID: &str = "7d9bcbd9-b1d5-4c39-ae0a-2f0c5b8d3e11";
const OTHER: &str = "00000000-0000-4000-8000-000000000001";
const ID: &str = "4f1bd2f1a3c9d1d2b5e86d5e7a2b2f5b0f8d3a3f2b6c0a9e8d7c6b5a49382716";

#[test]
fn cgroup_files_of_runtimes() {
    let escaped = UID.replace('-', "_");
    let own = Some((UID, false));
    for (what, text, expect) in [
        ("v2 cgroupfs containerd", format!("0::/kubepods/burstable/pod{UID}/{ID}\n"), own),
        ("v2 cgroupfs guaranteed", format!("0::/kubepods/pod{UID}/{ID}\n"), own),
        ("v2 cgroupfs CRI-O", format!("0::/kubepods/besteffort/pod{UID}/crio-{ID}\n"), own),
        (
            "v2 systemd containerd",
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{escaped}.slice/cri-containerd-{ID}.scope\n"
            ),
            own,
        ),
        (
            "v2 systemd guaranteed CRI-O",
            format!("0::/kubepods.slice/kubepods-pod{escaped}.slice/crio-{ID}.scope\n"),
            own,
        ),
        (
            "kind",
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{escaped}.slice/cri-containerd-{ID}.scope\n"
            ),
            own,
        ),
        (
            "v1 with docker",
            format!(
                "12:hugetlb:/kubepods/burstable/pod{UID}/{ID}\n11:memory:/kubepods/burstable/pod{UID}/{ID}\n1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n"
            ),
            own,
        ),
        (
            "hybrid: the v2 line is empty",
            format!(
                "13:rdma:/\n4:cpu,cpuacct:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{escaped}.slice/docker-{ID}.scope\n0::/\n"
            ),
            own,
        ),
        ("seen from another cgroup namespace", format!("0::/../../pod{UID}/{ID}\n"), own),
        (
            "and with systemd",
            format!(
                "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{escaped}.slice/cri-containerd-{ID}.scope"
            ),
            own,
        ),
        ("below a parent of the lab's", format!("0::/ambit-1/node-1/kubepods/pod{UID}/app\n"), own),
        ("docker in a pod", format!("0::/kubepods/pod{UID}/{ID}/docker/{ID}\n"), Some((UID, true))),
        ("systemd in a pod", format!("0::/kubepods/pod{UID}/{ID}/init.scope\n"), Some((UID, true))),
        ("in the pod's own", format!("0::/kubepods/pod{UID}\n"), own),
        ("a pod that plays another", format!("0::/kubepods/pod{UID}/{ID}/pod{OTHER}/x\n"), Some((UID, true))),
        (
            "static pod",
            "0::/kubepods/pod0123456789abcdef0123456789abcdef/x\n".to_owned(),
            Some(("0123456789abcdef0123456789abcdef", false)),
        ),
        ("a host service", "0::/system.slice/containerd.service\n".to_owned(), None),
        ("the root", "0::/\n".to_owned(), None),
        ("podman, no pod of Kubernetes", format!("0::/machine.slice/libpod-{ID}.scope\n"), None),
        ("a slice of that name elsewhere", format!("0::/user.slice/app-pod{escaped}.slice/x\n"), None),
        ("no UID", "0::/kubepods/burstable/pod-1/x\n".to_owned(), None),
        ("not a UID", "0::/kubepods/podzzzzzzzz-b1d5-4c39-ae0a-2f0c5b8d3e11/x\n".to_owned(), None),
        ("empty", String::new(), None),
        ("garbage", "::::\n:\n\0\n".to_owned(), None),
    ] {
        let found = membership(&text);
        let found = found.as_ref().map(|m| (m.uid.as_str(), m.nested));
        assert_eq!(found, expect, "{what}");
    }
}

#[test]
fn start_time_is_counted_from_the_last_parenthesis() {
    let fields: Vec<_> = (3..=52).map(|n| n.to_string()).collect();
    let stat = format!("17 (a) b) (c) {}", fields.join(" "));
    assert_eq!(started(&stat), Some(22));
    assert_eq!(started("17 (a"), None);
    assert_eq!(started("17 (a) S 1"), None);
}

/// A directory like `/proc` whose namespaces are plain files.
struct Proc(PathBuf);

impl Proc {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ambit-proc-{}-{name}", std::process::id()));
        let proc = Self(path);
        fs::create_dir_all(proc.0.join("namespaces")).unwrap();
        proc.process(1, "0::/init.scope", 1, "host");
        symlink("1", proc.0.join("self")).unwrap();
        fs::write(proc.0.join("uptime"), "1 1").unwrap();
        proc
    }

    fn process(&self, pid: u32, cgroup: &str, started: u64, netns: &str) {
        let directory = self.0.join(pid.to_string());
        fs::create_dir_all(directory.join("ns")).unwrap();
        fs::write(directory.join("cgroup"), cgroup).unwrap();
        fs::write(directory.join("stat"), format!("{pid} (app) S{} {started} 0", " 0".repeat(18))).unwrap();
        fs::write(self.namespace(netns), "").unwrap();
        fs::hard_link(self.namespace(netns), directory.join("ns/net")).unwrap();
    }

    fn namespace(&self, name: &str) -> PathBuf {
        self.0.join("namespaces").join(name)
    }

    fn check(&self, uid: &str, expect: Result<&str, &str>) {
        self.check_wanting("", uid, expect);
    }

    /// The namespace of this name is wanted; there is none without one.
    fn check_wanting(&self, wanted: &str, uid: &str, expect: Result<&str, &str>) {
        let wanted = fs::metadata(self.namespace(wanted)).map_or(0, |metadata| metadata.ino());
        match (find(&self.0, uid, |found| found.inode == wanted), expect) {
            (Ok(found), Ok(netns)) => {
                assert_eq!(found.inode, fs::metadata(self.namespace(netns)).unwrap().ino(), "{uid}");
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (found, _) => panic!("{uid}: {found:?}"),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_pods_first_process_decides() {
    let proc = Proc::new("first");
    let pod = format!("0::/kubepods/pod{UID}");
    proc.process(90, &format!("{pod}/{ID}/docker/x"), 50, "made-by-a-container");
    proc.process(80, &format!("{pod}/app"), 300, "made-by-unshare");
    proc.process(200, &format!("{pod}/pause"), 100, "pod");
    proc.process(70, &format!("{pod}/crio-conmon-x.scope"), 10, "host");
    proc.process(60, &format!("0::/kubepods/pod{OTHER}/x"), 5, "other");
    proc.check(UID, Ok("pod"));
    proc.check(OTHER, Ok("other"));
    proc.check("7d9bcbd9-b1d5-4c39-ae0a-2f0c5b8d3e12", Err("no process"));
}

#[test]
fn a_host_network_pod_has_none() {
    let proc = Proc::new("host");
    proc.process(70, &format!("0::/kubepods/pod{UID}/x"), 10, "host");
    proc.check(UID, Err("hostNetwork"));
}

#[test]
fn a_broken_process_does_not_hide_another() {
    let proc = Proc::new("broken");
    let pod = format!("0::/kubepods/pod{UID}/x");
    proc.process(70, &pod, 10, "gone");
    fs::remove_file(proc.0.join("70/ns/net")).unwrap();
    fs::create_dir(proc.0.join("71")).unwrap();
    proc.process(72, &pod, 20, "pod");
    proc.check(UID, Ok("pod"));
    let nothing = find(Path::new("/nonexistent"), UID, |_| true).unwrap_err().to_string();
    assert!(nothing.contains("/nonexistent") && nothing.contains("hostPID"), "{nothing}");
}

#[test]
fn the_namespace_that_the_pod_was_captured_in_comes_first() {
    let proc = Proc::new("wanted");
    let pod = format!("0::/kubepods/pod{UID}/app");
    proc.process(80, &pod, 10, "made-by-unshare");
    proc.process(81, &pod, 20, "pod");
    proc.process(82, &pod, 30, "host");
    proc.check(UID, Ok("made-by-unshare"));
    proc.check_wanting("pod", UID, Ok("pod"));
    proc.check_wanting("host", UID, Ok("made-by-unshare"));
}

/// Whoever cannot read, for want of descriptors for example, does not know that nobody is there.
#[test]
fn a_process_that_cannot_be_looked_at_is_not_gone() {
    for file in ["cgroup", "stat", "ns/net"] {
        let proc = Proc::new(&format!("unreadable-{}", file.replace('/', "-")));
        proc.process(70, &format!("0::/kubepods/pod{UID}/x"), 10, "pod");
        let path = proc.0.join("70").join(file);
        fs::remove_file(&path).unwrap();
        // Too many levels of symbolic links.
        symlink(&path, &path).unwrap();
        proc.check(UID, Err("/70: "));
        fs::remove_file(&path).unwrap();
        proc.check(UID, Err("no process"));
    }
}
