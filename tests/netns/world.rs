//! Two pods joined by a routed network namespace, a bpf file system and a cgroup of their own, for one test.
//!
//! **Invariant:** everything is gone after the test, also when it panics. The test process joins the cgroup, so its
//! connections from inside a pod are an app's; so one test runs at a time.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use mesh_ebpf_abi::SOCKET_PROXY;
use mesh_tests::cgroup;
use mesh_tests::netns::{self, Netns};
use mesh_tests::shell;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use node_agent::datapath::{Config, Datapath, GuardHook, KubeletConfig, Listeners, Numbers, PodSpec};
use socket2::{Domain, Protocol, Socket, Type};

use crate::family::{Family, transparent};

/// How long a packet may take on this machine when it is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what should not come.
pub(crate) const REFUSAL: Duration = Duration::from_millis(1300);
/// Port of the apps.
pub(crate) const PORT: u16 = 7000;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A pod: a network namespace behind a veth pair.
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) netns: Netns,
    /// Of the family that the test is about.
    pub(crate) address: IpAddr,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    /// What its probes name.
    pub(crate) probe_ports: BTreeSet<u16>,
    /// Whether its DNS queries are to be captured.
    pub(crate) dns: bool,
}

impl Pod {
    /// Runs `work` inside the pod, as one of its apps.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.netns.run(work)
    }

    pub(crate) fn spec(&self) -> Result<PodSpec> {
        let mut addresses = vec![IpAddr::V4(self.v4), IpAddr::V6(self.v6)];
        addresses.sort_by_key(|ip| *ip != self.address);
        self.spec_with(addresses)
    }

    pub(crate) fn spec_with(&self, addresses: Vec<IpAddr>) -> Result<PodSpec> {
        let (uid, netns) = (self.uid.clone(), self.netns.descriptor()?);
        Ok(PodSpec { uid, netns, addresses, probe_ports: self.probe_ports.clone(), dns: self.dns })
    }

    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.address, port))
    }

    /// Opens a connection from inside the pod.
    pub(crate) fn dial(&self, to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.run(|| Ok(TcpStream::connect_timeout(&to, timeout)?))
    }

    /// Listens inside the pod.
    pub(crate) fn listen(&self, at: &str) -> Result<TcpListener> {
        self.run(|| TcpListener::bind(at).with_context(|| format!("listen on {at}")))
    }

    /// Listens inside the pod on all its addresses; where the test is about IPv4 on those of IPv4 only.
    pub(crate) fn serve(&self) -> Result<TcpListener> {
        let family = if self.address.is_ipv4() { Family::V4 } else { Family::V6 };
        self.listen(&family.anywhere(PORT).to_string())
    }

    /// A value of /proc/sys/net inside the pod.
    pub(crate) fn sysctl(&self, name: &str) -> Result<String> {
        self.run(|| Ok(fs::read_to_string(format!("/proc/sys/net/{name}"))?.trim().to_owned()))
    }
}

/// The test's whole world.
pub(crate) struct World {
    pub(crate) family: Family,
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) router: Netns,
    pub(crate) bpffs: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) kubelet: PathBuf,
    pub(crate) guard_hook: GuardHook,
    home: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    /// For a test that is about IPv4, or about no family.
    pub(crate) fn new() -> Result<Self> {
        Self::of(Family::V4)
    }

    pub(crate) fn of(family: Family) -> Result<Self> {
        // A test that failed before poisoned nothing: its world is gone.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A process's first one makes sockets that it keeps, and these keep the network namespace that they are made in.
        drop(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
        let id = std::process::id();
        let name = |part: &str| format!("dp{id}-{part}");
        let bpffs = std::env::temp_dir().join(name("bpffs"));
        let root = cgroup::mount_point()?;
        let home = root.join(own_cgroup()?.trim_start_matches('/'));
        let mut world = Self {
            family,
            router: Netns::create(&name("r"))?,
            a: pod(&name("a"), family, 1, &[PORT])?,
            b: pod(&name("b"), family, 2, &[])?,
            bpffs,
            cgroup: root.join(name("cgroup")),
            kubelet: root.join(name("kubelet")),
            guard_hook: guard_hook()?,
            home,
            _alone: alone,
        };
        world.build()?;
        Ok(world)
    }

    fn build(&mut self) -> Result<()> {
        self.wire(&self.a, 1)?;
        self.wire(&self.b, 2)?;
        self.router.sysctl("ipv4/ip_forward", "1")?;
        self.router.sysctl("ipv6/conf/all/forwarding", "1")?;
        fs::create_dir_all(&self.bpffs)?;
        self.mount_bpffs()?;
        fs::create_dir_all(&self.cgroup)?;
        fs::create_dir_all(&self.kubelet)?;
        join(&self.cgroup)
    }

    /// Joins a pod and the router by a veth pair.
    pub(crate) fn wire(&self, pod: &Pod, net: u8) -> Result<()> {
        let router = self.router.name();
        // What was there before goes some time after its pod has.
        mesh_tests::eventually("the name of the router's interface is free", PATIENCE, || {
            let links = shell::run("ip", ["-n", router, "link", "list"])?;
            ensure!(!links.contains(&format!("v{net}@")), "{links}");
            Ok(())
        })?;
        for netns in [&self.router, &pod.netns] {
            // Addresses can be used at once.
            netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
            netns.sysctl("ipv6/conf/all/accept_dad", "0")?;
        }
        pod.netns.ip(&format!(
            "link add eth0 type veth peer name v{net} netns {router}\n\
             addr add 10.98.{net}.2/24 dev eth0\naddr add fd98:{net}::2/64 dev eth0\nlink set eth0 up\n"
        ))?;
        self.router.ip(&format!(
            "addr add 10.98.{net}.1/24 dev v{net}\naddr add fd98:{net}::1/64 dev v{net}\nlink set v{net} up\n"
        ))?;
        pod.netns.ip(&format!("route add default via 10.98.{net}.1\nroute add default via fd98:{net}::1\n"))
    }

    /// Another network of a pod, by this interface: 10.97.`net`.2 and fd97:`net`::2, the router has 1 at its end.
    pub(crate) fn second_network(&self, pod: &Pod, interface: &str, net: u8) -> Result<()> {
        pod.netns.ip(&format!(
            "link add {interface} type veth peer name s{net} netns {}\naddr add 10.97.{net}.2/24 dev {interface}\n\
             addr add fd97:{net}::2/64 dev {interface}\nlink set {interface} up\n",
            self.router.name()
        ))?;
        self.router.ip(&format!(
            "addr add 10.97.{net}.1/24 dev s{net}\naddr add fd97:{net}::1/64 dev s{net}\nlink set s{net} up\n"
        ))
    }

    pub(crate) fn mount_bpffs(&self) -> Result<()> {
        mount(Some("bpf"), &self.bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).context("mount bpffs")
    }

    pub(crate) fn unmount_bpffs(&self) -> Result<()> {
        umount2(&self.bpffs, MntFlags::MNT_DETACH).context("unmount bpffs")
    }

    /// What a reboot leaves of pods and pins: nothing. Both pods come up again, in other network namespaces.
    pub(crate) fn reboot(&mut self) -> Result<()> {
        self.unmount_bpffs()?;
        self.mount_bpffs()?;
        for pod in [&mut self.a, &mut self.b] {
            let name = pod.netns.name().to_owned();
            netns::remove(&name);
            pod.netns = Netns::create(&name)?;
        }
        self.wire(&self.a, 1)?;
        self.wire(&self.b, 2)
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            bpffs: self.bpffs.clone(),
            cgroup_root: Some(self.cgroup.clone()),
            guard_hook: self.guard_hook,
            kubelet: KubeletConfig { cgroup: Some(self.kubelet.clone()), port: 0 },
            proc: PathBuf::from("/proc"),
            numbers: Numbers::default(),
        }
    }

    /// The router is the node.
    pub(crate) fn open(&self) -> Result<Datapath> {
        self.router.run(|| Ok(Datapath::open(&self.config())?))
    }

    /// The pod dies: its network namespace loses its name and this process's hold on it.
    pub(crate) fn forget_a(&mut self) -> Result<()> {
        netns::remove(self.a.netns.name());
        self.a.netns = Netns::open("gone", std::path::Path::new("/proc/self/ns/net"))?;
        Ok(())
    }

    /// Runs `work` as a process outside the captured cgroup.
    pub(crate) fn outside<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.within(&self.home, work)
    }

    /// Runs `work` as a process in this cgroup.
    pub(crate) fn within<T>(&self, cgroup: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
        join(cgroup)?;
        let result = work();
        join(&self.cgroup)?;
        result
    }

    /// Directory of a pod's pinned links.
    pub(crate) fn pod_pins(&self, pod: &Pod) -> PathBuf {
        self.version().join("links").join(&pod.uid)
    }

    /// The pin of the guard on eth0 of a pod.
    pub(crate) fn guard_pin(&self, pod: &Pod, hook: GuardHook) -> Result<PathBuf> {
        self.interface_pin(pod, "eth0", hook)
    }

    /// The pin of the guard on an interface of a pod.
    pub(crate) fn interface_pin(&self, pod: &Pod, interface: &str, hook: GuardHook) -> Result<PathBuf> {
        let index = shell::run("ip", ["-n", pod.netns.name(), "-o", "link", "show", interface])?;
        let (index, _) = index.split_once(':').context("ip link show")?;
        let clsact = match hook {
            GuardHook::Auto => !mesh_tests::kernel::names("tcx_link_attach")?,
            hook => hook == GuardHook::Clsact,
        };
        let end = if clsact { "-clsact" } else { "" };
        Ok(self.pod_pins(pod).join(format!("guard-{index}{end}")))
    }

    /// Directory of all that this version pins.
    pub(crate) fn version(&self) -> PathBuf {
        self.bpffs.join("ambit").join(format!("v{}", mesh_ebpf_abi::ABI_VERSION))
    }

    /// A datapath with the pods captured.
    pub(crate) fn enrolled(&self, pods: &[&Pod]) -> Result<(Datapath, Vec<Listeners>)> {
        let mut datapath = self.open()?;
        let listeners = pods.iter().map(|pod| enrol(&mut datapath, pod)).collect::<Result<_>>()?;
        Ok((datapath, listeners))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let moved = join(&self.home);
        // A world that was not built to its end says why by itself.
        let built = self.bpffs.exists();
        let unmounted = umount2(&self.bpffs, MntFlags::MNT_DETACH);
        let removed = fs::remove_dir(&self.bpffs);
        cgroup::remove_tree(&self.cgroup);
        cgroup::remove_tree(&self.kubelet);
        for name in [self.a.netns.name(), self.b.netns.name(), self.router.name()] {
            netns::remove(name);
        }
        if built && !std::thread::panicking() {
            moved.expect("back in the cgroup that the tests started in");
            unmounted.expect("bpffs unmounted");
            removed.expect("mount point removed");
        }
    }
}

/// Prepares and captures a pod.
pub(crate) fn enrol(datapath: &mut Datapath, pod: &Pod) -> Result<Listeners> {
    let listeners = datapath.prepare(&pod.spec()?, None)?;
    datapath.capture(&pod.uid)?;
    Ok(listeners)
}

/// Accepts the next connection of a listener.
pub(crate) fn accept(listener: &OwnedFd) -> Result<TcpStream> {
    let socket = Socket::from(listener.try_clone()?);
    mesh_tests::eventually("a connection", PATIENCE, || Ok(socket.accept()?.0)).map(into_stream)
}

/// Whether a listener has no connection waiting.
pub(crate) fn idle(listener: &OwnedFd) -> Result<bool> {
    let socket = Socket::from(listener.try_clone()?);
    match socket.accept() {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// A socket as the proxy makes them: flagged, so not captured and let out. Call it inside the pod.
pub(crate) fn proxy_socket(datapath: &Datapath, domain: Domain) -> Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    flag(datapath, &socket)?;
    Ok(socket)
}

/// Flags a socket as the proxy's.
pub(crate) fn flag(datapath: &Datapath, socket: &Socket) -> Result<()> {
    let map = aya::maps::MapData::from_fd(datapath.skproxy_map().try_clone_to_owned()?)?;
    let mut map = aya::maps::SkStorage::<_, u32>::try_from(aya::maps::Map::SkStorage(map))?;
    Ok(map.insert(socket, SOCKET_PROXY, 0)?)
}

/// The proxy's connection to the app, from the client's address and a port of the proxy's choice. Call it inside
/// the pod.
pub(crate) fn upstream(datapath: &Datapath, client: SocketAddr, app: SocketAddr) -> Result<TcpStream> {
    let domain = Domain::for_address(app);
    let socket = proxy_socket(datapath, domain)?;
    // A pod that dials itself has both addresses, and its replies would pass a socket that is bound to lo by.
    if client.ip() != app.ip() {
        transparent(&socket, domain)?;
        socket.set_mark(mesh_ebpf_abi::MARK_UPSTREAM)?;
        socket.bind_device(Some(b"lo"))?;
    }
    socket.bind(&client.into())?;
    socket.connect_timeout(&app.into(), REFUSAL)?;
    Ok(into_stream(socket))
}

pub(crate) fn into_stream(socket: Socket) -> TcpStream {
    socket.set_nonblocking(false).expect("fcntl");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// Sends a word each way.
pub(crate) fn converse(one: &TcpStream, other: &TcpStream) -> Result<()> {
    use std::io::{Read as _, Write as _};
    for (mut from, mut to) in [(one, other), (other, one)] {
        to.set_read_timeout(Some(PATIENCE))?;
        from.write_all(b"word")?;
        let mut word = [0; 4];
        to.read_exact(&mut word).context("the word does not arrive")?;
        ensure!(&word == b"word");
    }
    Ok(())
}

fn pod(name: &str, family: Family, net: u8, probe_ports: &[u16]) -> Result<Pod> {
    let v4 = Ipv4Addr::new(10, 98, net, 2);
    let v6 = Ipv6Addr::new(0xfd98, net.into(), 0, 0, 0, 0, 0, 2);
    let address = family.pick(v4.into(), v6.into());
    let (netns, probe_ports) = (Netns::create(name)?, probe_ports.iter().copied().collect());
    Ok(Pod { uid: name.to_owned(), netns, address, v4, v6, probe_ports, dns: true })
}

/// As the agent's setting of the same name; with `auto` it is tcx on every kernel that has it.
fn guard_hook() -> Result<GuardHook> {
    let Ok(value) = std::env::var("AMBIT_GUARD_HOOK") else { return Ok(GuardHook::Auto) };
    GuardHook::from_str(&value, true).map_err(anyhow::Error::msg).context("AMBIT_GUARD_HOOK")
}

fn own_cgroup() -> Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("0::")).context("no cgroup2 in /proc/self/cgroup")?;
    Ok(line.to_owned())
}

fn join(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("join {}", cgroup.display()))
}
