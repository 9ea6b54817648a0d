//! What each command comes to, without an agent; `tests/mesh_cni.rs` runs the real process.

use serde_json::json;

use super::*;

fn environment(command: &str, namespace: &str) -> Environment {
    Environment {
        command: command.into(),
        container_id: "c1".into(),
        netns: "/run/netns/x".into(),
        ifname: "eth0".into(),
        arguments: format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=p;K8S_POD_UID=u"),
    }
}

fn configuration() -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "pods", "type": TYPE, "excludeNamespaces": ["kube-system"],
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.244.1.2/24"}], "dns": {}},
    })
}

fn planned(environment: &Environment, change: impl Fn(&mut Value)) -> Result<Plan, Failure> {
    let mut configuration = configuration();
    change(&mut configuration);
    plan(Command::parse(&environment.command).unwrap(), environment, &configuration)
}

#[test]
fn add_asks_about_the_pod_and_passes_the_result_on() {
    let plan = planned(&environment("ADD", "payments"), |_| ()).unwrap();
    let Some(Request::Add(add)) = plan.question else { panic!("{plan:?}") };
    assert_eq!((add.namespace.as_str(), add.name.as_str(), add.uid.as_deref()), ("payments", "p", Some("u")));
    assert_eq!(add.addresses, ["10.244.1.2".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(plan.result, Some(configuration()["prevResult"].clone()));
    assert_eq!(plan.socket, Path::new(SOCKET));
    let plan = planned(&environment("ADD", "payments"), |c| c["socket"] = "/x".into()).unwrap();
    assert_eq!(plan.socket, Path::new("/x"));
}

#[test]
fn excluded_namespaces_are_not_asked_about() {
    for command in ["ADD", "DEL", "CHECK"] {
        let plan = planned(&environment(command, "kube-system"), |_| ()).unwrap();
        assert_eq!(plan.question, None, "{command}");
        assert_eq!(plan.result.is_some(), command == "ADD");
        assert!(planned(&environment(command, "kube-system-2"), |_| ()).unwrap().question.is_some());
    }
}

#[test]
fn what_is_missing_is_named() {
    let good = environment("ADD", "payments");
    let without = |change: fn(&mut Environment)| {
        let mut environment = good.clone();
        change(&mut environment);
        planned(&environment, |_| ()).unwrap_err()
    };
    for (failure, code, part) in [
        (without(|e| e.container_id.clear()), spec::ENVIRONMENT, "CNI_CONTAINERID"),
        (without(|e| e.netns.clear()), spec::ENVIRONMENT, "CNI_NETNS"),
        (without(|e| e.ifname.clear()), spec::ENVIRONMENT, "CNI_IFNAME"),
        (without(|e| e.arguments.clear()), spec::ENVIRONMENT, "K8S_POD_NAMESPACE"),
        (without(|e| e.arguments = "K8S_POD_NAMESPACE=a".into()), spec::ENVIRONMENT, "K8S_POD_NAME"),
    ] {
        assert_eq!(failure.code, code);
        assert!(failure.message.contains(part), "{failure:?}");
    }
    for (field, value, part) in [
        ("prevResult", Value::Null, "no prevResult"),
        ("prevResult", json!([]), "no prevResult"),
        ("prevResult", json!({}), "0 addresses"),
        ("prevResult", json!({"ips": [{"address": "x"}]}), "\"x\" is no address"),
        ("socket", json!(1), "socket must be"),
        ("excludeNamespaces", json!("kube-system"), "list of names"),
        ("excludeNamespaces", json!(["payments", 1]), "list of names"),
    ] {
        let failure = planned(&good, |c| c[field] = value.clone()).unwrap_err();
        assert_eq!(failure.code, spec::CONFIGURATION);
        assert!(failure.message.contains(part), "{failure:?}");
    }
}

#[test]
fn gc_passes_the_attachments_on() {
    let environment = environment("GC", "");
    let valid = json!([{"containerID": "a", "ifname": "eth0"}]);
    let plan = planned(&environment, |c| c["cni.dev/valid-attachments"] = valid.clone()).unwrap();
    let attachment = Attachment { container_id: "a".into(), ifname: "eth0".into() };
    assert_eq!(plan.question, Some(Request::Gc(vec![attachment])));
    assert!(planned(&environment, |_| ()).is_err());
}
