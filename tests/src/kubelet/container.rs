//! One container: its root file system, limits and environment, and the loop that keeps it running.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};
use k8s_openapi::jiff::Timestamp;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

use super::env;
use super::live::Credentials;
use super::sandbox::hexadecimal;
use super::worker::Worker;
use crate::cgroup;
use crate::rootfs;
use crate::sandbox::{Capabilities, Plan, Step};
use crate::{dns, fabric};

/// How long to wait before a container that ended is started again: doubled each time up to the limit, forgotten
/// when it ran for long.
const BACKOFF: Duration = Duration::from_millis(200);
const BACKOFF_LIMIT: Duration = Duration::from_secs(5);
const RAN_FOR_LONG: Duration = Duration::from_secs(10);

/// When an ended container is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    Always,
    OnFailure,
    Never,
}

/// Run it, again and again as `restart` says; its last exit code.
pub(super) async fn supervise(worker: &Worker, container: &Container, restart: Restart) -> i32 {
    let live = &worker.live;
    let mut pause = BACKOFF;
    loop {
        live.released().await;
        if live.state().finishing && restart == Restart::Always {
            return 0;
        }
        let began = std::time::Instant::now();
        let code = match start(worker, container) {
            Ok(mut child) => {
                worker.publish();
                let code = tokio::select! {
                    status = child.wait() => status.ok().and_then(|status| status.code()).unwrap_or(137),
                    reason = super::probe::watch(worker, container) => {
                        worker.event("Killing", &format!("container {}: {reason}", container.name));
                        kill(worker, container).await;
                        let _ = child.wait().await;
                        137
                    }
                };
                ended(worker, container, code).await;
                Some(code)
            }
            Err(error) => {
                let message = format!("{error:#}");
                worker.event("Failed", &format!("container {}: {message}", container.name));
                let waiting = Some(("CreateContainerError".to_owned(), message));
                live.change(&container.name, |state| state.waiting = waiting);
                worker.publish();
                None
            }
        };
        match (code, restart) {
            (Some(code), Restart::Never) => return code,
            (Some(code), Restart::Always) if live.state().finishing => return code,
            (Some(0), Restart::OnFailure) => return 0,
            _ => {}
        }
        if began.elapsed() > RAN_FOR_LONG {
            pause = BACKOFF;
        }
        if code.is_some() {
            let why = format!("back-off {pause:?} before it is started again");
            live.change(&container.name, |state| {
                state.restarts += 1;
                state.waiting = Some(("CrashLoopBackOff".to_owned(), why));
            });
            worker.publish();
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(BACKOFF_LIMIT);
    }
}

/// Its processes are killed with it, as the end of a pid namespace does in a cluster.
async fn ended(worker: &Worker, container: &Container, code: i32) {
    kill(worker, container).await;
    worker.live.change(&container.name, |state| {
        state.pid = None;
        (state.started, state.ready) = (false, false);
        state.exit = Some(code);
    });
    worker.publish();
}

/// All its processes.
pub(super) async fn kill(worker: &Worker, container: &Container) {
    let id = worker.live.state().containers.get(&container.name).map(|state| state.id.clone());
    if let Some(id) = id.filter(|id| !id.is_empty()) {
        let cgroup = worker.live.cgroup().join(id);
        let _ = tokio::task::spawn_blocking(move || cgroup::kill(&cgroup)).await;
    }
}

fn start(worker: &Worker, container: &Container) -> anyhow::Result<tokio::process::Child> {
    let live = &worker.live;
    let pod = live.pod();
    let place = worker.place();
    let api_server = fabric::service_address(live.node().stack().primary(), 1);
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), rootfs::PATH.to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
        ("HOSTNAME".to_owned(), pod.metadata.name.clone().unwrap_or_default()),
        ("KUBERNETES_SERVICE_HOST".to_owned(), api_server.to_string()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), "443".to_owned()),
    ]);
    environment.extend(env::environment(&pod, container, &place, worker)?);
    let line = env::command_line(container, &environment);
    let credentials = credentials(&pod, container, worker.kubelet.capabilities)?;
    let id = hexadecimal();
    let plan = plan(worker, &pod, container, &id, credentials)?;

    let log = live.log_path(Some(&container.name)).context("no name for the log")?;
    fs::create_dir_all(live.log_directory())?;
    let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = std::process::Command::new(&line[0]);
    command.args(&line[1..]).env_clear().envs(&environment);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    plan.apply(&mut command);
    let child = tokio::process::Command::from(command).spawn().with_context(|| {
        format!("start {:?} (its log names the step that failed, if any did)", line.join(" "))
    })?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let probed = container.readiness_probe.is_some() || container.startup_probe.is_some();
    live.change(&container.name, |state| {
        state.id = id;
        state.pid = pid;
        state.since = Some(Timestamp::now());
        state.started = container.startup_probe.is_none();
        state.ready = !probed;
        state.waiting = None;
        state.environment = environment;
        state.credentials = Some(credentials);
    });
    Ok(child)
}

fn credentials(pod: &Pod, container: &Container, all: Capabilities) -> anyhow::Result<Credentials> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let own = container.security_context.as_ref();
    let uid =
        own.and_then(|own| own.run_as_user).or(of_pod.and_then(|of_pod| of_pod.run_as_user)).unwrap_or(0);
    let gid =
        own.and_then(|own| own.run_as_group).or(of_pod.and_then(|of_pod| of_pod.run_as_group)).unwrap_or(0);
    let non_root =
        own.and_then(|own| own.run_as_non_root).or(of_pod.and_then(|of_pod| of_pod.run_as_non_root));
    anyhow::ensure!(non_root != Some(true) || uid != 0, "runAsNonRoot is set, but no runAsUser other than 0");
    let capabilities = if own.and_then(|own| own.privileged) == Some(true) {
        all
    } else {
        let asked = own.and_then(|own| own.capabilities.as_ref());
        let drop = asked.iter().flat_map(|asked| asked.drop.iter().flatten()).map(String::as_str);
        let add = asked.iter().flat_map(|asked| asked.add.iter().flatten()).map(String::as_str);
        Capabilities::container_default().adjusted(drop, add, all)?
    };
    Ok(Credentials {
        uid: u32::try_from(uid)?,
        gid: u32::try_from(gid)?,
        capabilities,
        no_new_privileges: own.and_then(|own| own.allow_privilege_escalation) == Some(false),
    })
}

fn plan(
    worker: &Worker,
    pod: &Pod,
    container: &Container,
    id: &str,
    credentials: Credentials,
) -> anyhow::Result<Plan> {
    let live = &worker.live;
    let node = live.node();
    let context = container.security_context.as_ref();
    let privileged = context.and_then(|context| context.privileged) == Some(true);
    let network = live.netns().context("the pod has no network")?;
    let directory = PathBuf::from(format!("/var/lib/kubelet/pods/{}", live.uid()));
    let root = directory.join("root");
    fs::create_dir_all(node.path(&root.to_string_lossy()))?;

    let mut plan = node.plan(&format!("kubepods/pod{}/{id}", live.uid()))?;
    plan.step(Step::Enter(network.descriptor()?, CloneFlags::CLONE_NEWNET));
    plan.step(Step::Unshare(CloneFlags::CLONE_NEWNS));
    plan.propagation(Path::new("/"), MsFlags::MS_SLAVE);
    rootfs::base(&mut plan, &root, Path::new(rootfs::BINARIES));
    if !privileged {
        // As every container runtime does: sysctls of the container cannot be set from inside.
        plan.bind(Path::new("/proc/sys"), &root.join("proc/sys"), true);
    }
    plan.directories(&root, Path::new("run")).directories(&root, Path::new("var/tmp"));
    rootfs::link(&mut plan, Path::new("/run"), &root.join("var/run"));
    plan.directories(&root, Path::new("sys"));
    plan.filesystem("sysfs", &root.join("sys"), None);
    let own = PathBuf::from(format!("/sys/fs/cgroup/kubepods/pod{}/{id}", live.uid()));
    plan.bind(&own, &root.join("sys/fs/cgroup"), !privileged);
    for file in ["resolv.conf", "hosts"] {
        let target = Path::new("etc").join(file);
        rootfs::mount_point(&mut plan, &root, &target, false);
        plan.bind(&directory.join(file), &root.join(target), true);
    }
    let mut mounts: Vec<&VolumeMount> = container.volume_mounts.iter().flatten().collect();
    mounts.sort_by_key(|mount| mount.mount_path.len());
    for mount in mounts {
        volume(&mut plan, worker, &root, mount)?;
    }
    if !privileged {
        plan.mount(
            None,
            &root.join("sys"),
            None,
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY,
            None,
        );
    }
    if context.and_then(|context| context.read_only_root_filesystem) == Some(true) {
        plan.mount(None, &root, None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None);
    }
    write_settings(worker, pod, &node.path(&directory.to_string_lossy()))?;
    plan.step(Step::Root(crate::sandbox::c_path(&root)));
    if let Some(users) = live.users() {
        plan.step(users.step()?);
    }
    credentials.limit(&mut plan);
    Ok(plan)
}

fn volume(plan: &mut Plan, worker: &Worker, root: &Path, mount: &VolumeMount) -> anyhow::Result<()> {
    let source = worker.volume(&mount.name).with_context(|| format!("no volume is called {}", mount.name))?;
    let source = mount.sub_path.as_ref().map_or_else(|| source.clone(), |sub| source.join(sub));
    let on_host = worker.live.node().path(&source.to_string_lossy());
    let is_directory = !on_host.exists() || on_host.is_dir();
    let inside = inside(Path::new(&mount.mount_path));
    rootfs::mount_point(plan, root, &inside, is_directory);
    let target = root.join(&inside);
    plan.bind(&source, &target, mount.read_only == Some(true));
    if mount.mount_propagation.as_deref().unwrap_or("None") == "None" {
        plan.propagation(&target, MsFlags::MS_PRIVATE);
    }
    Ok(())
}

/// A container's path relative to its root. /var/run is a link to /run, which a mount must not follow: it would lead
/// into the node.
fn inside(path: &Path) -> PathBuf {
    let parts: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    match parts.strip_prefix("var/run") {
        Ok(rest) => Path::new("run").join(rest),
        Err(_) => parts,
    }
}

/// resolv.conf and hosts as a kubelet writes them.
fn write_settings(worker: &Worker, pod: &Pod, directory: &Path) -> anyhow::Result<()> {
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network) == Some(true);
    let policy = spec.and_then(|spec| spec.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let of_node = policy == "Default" || (policy == "ClusterFirst" && host_network);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let families = worker.live.node().stack().families();
    let resolv = if of_node {
        format!("nameserver {}\n", fabric::control(families[0]))
    } else {
        // One of each family, as `--cluster-dns` lists them: a resolver goes on to the next where it has no way to one.
        let servers: String =
            families.iter().map(|family| format!("nameserver {}\n", dns::service(*family))).collect();
        format!(
            "search {namespace}.svc.cluster.local svc.cluster.local cluster.local\n\
             {servers}\
             options ndots:5\n"
        )
    };
    fs::write(directory.join("resolv.conf"), resolv)?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let own: String = worker.place().pod_ips.iter().map(|ip| format!("{ip} {name}\n")).collect();
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{own}");
    fs::write(directory.join("hosts"), hosts)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_stay_below_the_containers_root() {
        for (path, expect) in [
            ("/var/run/secrets/tokens", "run/secrets/tokens"),
            ("/run/ambit", "run/ambit"),
            ("/../../etc/x", "etc/x"),
            ("relative", "relative"),
        ] {
            assert_eq!(inside(Path::new(path)), PathBuf::from(expect), "{path}");
        }
    }
}
