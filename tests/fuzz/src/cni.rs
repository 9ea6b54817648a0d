//! What the container runtime and the other plugins write: the configuration on the CNI plugin's stdin, the node's
//! configuration files, and the plugin's questions to the agent. The first byte says which, or which command it is for.

use node_agent::cni::conflist::{self, Entry};
use node_agent::cni::plugin::{self, Environment};
use node_agent::cni::protocol::{self, Request};
use serde_json::Value;

const COMMANDS: [&str; 8] = ["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION", "", "add"];

/// Always one JSON answer or none; what is edited stays what it was but for our entry; questions survive the wire.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    match first % 16 {
        command @ 0..8 => stdin(COMMANDS[usize::from(command)], rest),
        8..12 => files(rest),
        12 | 13 => question(rest),
        _ => drop(protocol::reply_from_line(rest)),
    }
}

fn stdin(command: &str, bytes: &[u8]) {
    let environment = Environment {
        command: command.to_owned(),
        container_id: "c".to_owned(),
        netns: "/proc/self/ns/net".to_owned(),
        ifname: "eth0".to_owned(),
        arguments: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u".to_owned(),
    };
    let mut bytes = bytes.to_vec();
    // No agent of this machine is asked.
    if let Ok(Value::Object(mut configuration)) = serde_json::from_slice(&bytes)
        && !configuration.get("socket").is_some_and(|socket| !socket.is_string() && !socket.is_null())
    {
        configuration.insert("socket".to_owned(), "/nonexistent/ambit.sock".into());
        bytes = Value::Object(configuration).to_string().into_bytes();
    }
    let outcome = plugin::run(&environment, &bytes[..]);
    if !outcome.stdout.is_empty() {
        let printed: Value = serde_json::from_str(&outcome.stdout).expect("the plugin prints JSON");
        assert!(outcome.success || printed["code"].is_u64(), "{printed}");
    }
    assert!(outcome.success || command != "DEL", "DEL failed: {}", outcome.stdout);
}

fn files(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let entry = Entry {
        socket: "/run/ambit/cni.sock".to_owned(),
        exclude_namespaces: vec!["kube-system".to_owned()],
    };
    if let Ok(Some(chained)) = conflist::chain(text, &entry) {
        assert_eq!(conflist::chain(&chained, &entry), Ok(None), "an entry that is there is added again");
        let without = conflist::unchain(&chained).expect("a list").expect("with our entry");
        assert_eq!(conflist::unchain(&without), Ok(None));
    }
    if let Ok(converted) = conflist::convert(text, &entry) {
        assert_eq!(conflist::chain(&converted, &entry), Ok(None), "{converted}");
    }
}

fn question(line: &[u8]) {
    if let Ok(request) = Request::from_line(line) {
        let again = Request::from_line(request.to_line().trim_end().as_bytes());
        assert_eq!(again.ok(), Some(request));
    }
}

/// What containerd writes for ADD and GC, a node's list and single file, each question and each answer.
pub fn seeds() -> Vec<Vec<u8>> {
    let result = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/n"},{"name":"veth"}],
        "ips":[{"interface":0,"address":"10.244.1.2/24"},{"interface":0,"address":"fd00:244::2/64"}]}"#;
    let configuration = format!(
        r#"{{"cniVersion":"1.0.0","name":"n","type":"mesh-cni","excludeNamespaces":["kube-system"],"prevResult":{result}}}"#
    );
    let gc = r#"{"cniVersion":"1.1.0","name":"n","type":"mesh-cni","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]}"#;
    let list = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"mesh-cni","socket":"/x"},{"type":"portmap"}]}"#;
    let single = r#"{"cniVersion":"0.3.1","name":"n","type":"bridge"}"#;
    let add = r#"{"version":1,"verb":"add","namespace":"shop","name":"web-0","uid":"u","netns":"/n","containerId":"c","ifname":"eth0","addresses":["10.244.1.2"]}"#;
    let asked = r#"{"version":1,"verb":"gc","valid":[{"containerId":"c","ifname":"eth0"}]}"#;
    let refused = r#"{"version":1,"error":{"code":11,"message":"m","details":"d"}}"#;
    let all = [
        (0, configuration.as_str()),
        (1, &configuration),
        (2, &configuration),
        (3, gc),
        (5, ""),
        (8, list),
        (8, single),
        (12, add),
        (12, asked),
        (14, refused),
    ];
    all.map(|(first, text)| [&[first], text.as_bytes()].concat()).into()
}
