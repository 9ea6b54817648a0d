//! The CNI plugin as a runtime runs it: a real process, its environment, stdin and stdout, against an agent's socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A directory with an agent's socket.
struct World {
    directory: PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

struct Output {
    success: bool,
    stdout: String,
}

impl Output {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {:?}", self.stdout))
    }

    /// An error object of that code, whose message or details say `part`.
    fn is_error(&self, version: &str, code: u64, part: &str) {
        let error = self.json();
        assert!(!self.success, "{error}");
        assert_eq!(
            (error["cniVersion"].as_str(), error["code"].as_u64()),
            (Some(version), Some(code)),
            "{error}"
        );
        let text = format!("{} {}", error["msg"].as_str().unwrap(), error["details"].as_str().unwrap());
        assert!(text.contains(part), "{text}");
    }
}

impl World {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-plugin-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        Self { directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("cni.sock")
    }

    /// Takes one connection, returns the request it carried, after `answer` had the stream.
    fn agent(&self, answer: impl FnOnce(UnixStream) + Send + 'static) -> JoinHandle<Value> {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            answer(stream);
            serde_json::from_str(&line).unwrap()
        })
    }

    fn says(&self, text: &str) -> JoinHandle<Value> {
        let text = text.to_owned();
        self.agent(move |mut stream| stream.write_all(text.as_bytes()).unwrap())
    }

    fn configuration(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "pods", "type": "mesh-cni", "socket": self.socket(),
            "excludeNamespaces": ["kube-system"],
            "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}],
            "prevResult": {
                "cniVersion": version,
                "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/x", "mtu": 1450}],
                "ips": [{"version": "4", "interface": 1, "address": "10.244.1.2/24", "gateway": "10.244.1.1"}],
                "routes": [{"dst": "0.0.0.0/0"}], "dns": {"nameservers": ["10.96.0.10"]},
            },
        })
    }

    fn run(&self, command: &str, namespace: &str, stdin: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_NETNS", "/run/netns/x")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=payment-1;K8S_POD_UID=u1"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // A plugin that refuses early may not read all of it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        Output { success: output.status.success(), stdout: String::from_utf8(output.stdout).unwrap() }
    }

    fn call(&self, command: &str, version: &str) -> Output {
        self.run(command, "payments", &self.configuration(version).to_string())
    }
}

const OK: &str = "{\"ok\":true}\n";

#[test]
fn add_in_every_version() {
    let world = World::new("add");
    for version in VERSIONS {
        let agent = world.says(OK);
        let output = world.call("ADD", version);
        assert!(output.success, "{version}: {}", output.stdout);
        assert_eq!(output.json(), world.configuration(version)["prevResult"], "{version}");
        let asked = agent.join().unwrap();
        let expect = json!({
            "version": 1, "verb": "add", "namespace": "payments", "name": "payment-1", "uid": "u1",
            "netns": "/run/netns/x", "containerId": "c1", "ifname": "eth0", "addresses": ["10.244.1.2"],
        });
        assert_eq!(asked, expect);
    }
}

#[test]
fn the_other_commands_in_their_versions() {
    let world = World::new("others");
    for (command, since) in [("DEL", 0), ("CHECK", 1), ("STATUS", 3), ("GC", 3)] {
        for (index, version) in VERSIONS.into_iter().enumerate() {
            if index >= since {
                let agent = world.says(OK);
                let output = world.call(command, version);
                assert!(output.success && output.stdout.is_empty(), "{command} {version}: {}", output.stdout);
                assert_eq!(agent.join().unwrap()["verb"], command.to_lowercase());
            } else if command != "GC" {
                world.call(command, version).is_error(version, 1, command);
            }
        }
    }
}

#[test]
fn version_says_what_it_speaks() {
    let world = World::new("version");
    for (stdin, version) in [(r#"{"cniVersion":"1.0.0"}"#, "1.0.0"), ("", "1.1.0"), ("{}", "1.1.0")] {
        let output = world.run("VERSION", "", stdin);
        assert!(output.success);
        assert_eq!(output.json(), json!({"cniVersion": version, "supportedVersions": VERSIONS}));
    }
}

#[test]
fn an_unreachable_agent_fails_add_but_not_del() {
    let world = World::new("away");
    world.call("ADD", "1.0.0").is_error("1.0.0", 11, "payments/payment-1");
    world.call("ADD", "1.0.0").is_error("1.0.0", 11, "kubectl -n ambit-system get pods");
    world.call("CHECK", "1.0.0").is_error("1.0.0", 11, "cannot be reached");
    world.call("STATUS", "1.1.0").is_error("1.1.0", 50, "has not started");
    // A socket whose agent died.
    drop(UnixListener::bind(world.socket()).unwrap());
    world.call("ADD", "0.3.1").is_error("0.3.1", 11, "restarting or has crashed");
    for command in ["DEL", "GC"] {
        let output = world.call(command, "1.1.0");
        assert!(output.success && output.stdout.is_empty(), "{command}");
    }
}

#[test]
fn an_excluded_namespace_needs_no_agent() {
    let world = World::new("excluded");
    let configuration = world.configuration("1.0.0");
    let output = world.run("ADD", "kube-system", &configuration.to_string());
    assert!(output.success, "{}", output.stdout);
    assert_eq!(output.json(), configuration["prevResult"]);
}

#[test]
fn the_agents_refusal_reaches_the_runtime() {
    let world = World::new("refused");
    let refusal = "{\"error\":{\"code\":100,\"msg\":\"cannot enrol pod\",\"details\":\"because\"}}\n";
    let agent = world.says(refusal);
    world.call("ADD", "1.0.0").is_error("1.0.0", 100, "cannot enrol pod because");
    agent.join().unwrap();
    let agent = world.says(refusal);
    world.call("STATUS", "1.1.0").is_error("1.1.0", 50, "because");
    agent.join().unwrap();
}

#[test]
fn a_broken_agent_is_told_apart() {
    let world = World::new("broken");
    let long = "x".repeat(20_000);
    for (answer, code, part) in [
        ("", 11, "without an answer"),
        ("{\"ok\":", 11, "cut off"),
        (long.as_str(), 11, "too long"),
        ("hello\n", 6, "cannot be understood"),
        ("{\"ok\":false}\n", 6, "same release"),
    ] {
        let answer = answer.to_owned();
        let agent = world.agent(move |mut stream| drop(stream.write_all(answer.as_bytes())));
        world.call("ADD", "1.0.0").is_error("1.0.0", code, part);
        agent.join().unwrap();
    }
}

#[test]
fn a_silent_agent_is_left_at_the_deadline() {
    let world = World::new("silent");
    // Reads until the plugin gives up.
    let agent = world.agent(|mut stream| drop(stream.read(&mut [0; 1])));
    world.call("STATUS", "1.1.0").is_error("1.1.0", 50, "no answer within 5 s");
    agent.join().unwrap();
}

#[test]
fn bad_input_gives_an_error_object() {
    let world = World::new("input");
    let with = |version: Value| {
        let mut configuration = world.configuration("1.0.0");
        configuration["cniVersion"] = version;
        configuration.to_string()
    };
    for (stdin, version, code, part) in [
        (String::new(), "1.1.0", 6, "not a JSON object"),
        ("hello".into(), "1.1.0", 6, "not a JSON object"),
        ("[]".into(), "1.1.0", 6, "another kind"),
        ("{".repeat(100_000), "1.1.0", 6, "not a JSON object"),
        (" ".repeat(1024 * 1024 + 1), "1.1.0", 6, "longer than"),
        (with("0.2.0".into()), "0.2.0", 1, "0.3.1, 0.4.0, 1.0.0, 1.1.0"),
        (with("2.0.0".into()), "2.0.0", 1, "2.0.0"),
        (with("".into()), "", 1, "not supported"),
        (with(Value::Null), "1.1.0", 1, "0.1.0"),
        (with(1.into()), "1.1.0", 1, "not supported"),
    ] {
        world.run("ADD", "payments", &stdin).is_error(version, code, part);
        let del = world.run("DEL", "payments", &stdin);
        assert!(del.success && del.stdout.is_empty(), "DEL never fails");
    }
    world.call("", "1.0.0").is_error("1.0.0", 4, "CNI_COMMAND is not set");
    world.call("add", "1.0.0").is_error("1.0.0", 4, "container runtime");
}
