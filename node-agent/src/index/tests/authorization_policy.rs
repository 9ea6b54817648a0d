//! Which pods an AuthorizationPolicy is about, and what a change of one touches.

use mesh_core::proto::security as wire;

use super::super::PolicyKey;
use super::*;

fn policy(name: &str, labels: Value) -> Value {
    let (namespace, name) = name.split_once('/').unwrap();
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"selector": {"matchLabels": labels}},
    })
}

/// The pods web (app=web, tier=front) and job in shop, far (app=web) in another namespace and on another node.
fn world(policies: &[Value]) -> Index {
    let mut index = index();
    let mut web = pod("web", "10.0.0.9");
    web["metadata"]["labels"] = json!({"app": "web", "tier": "front"});
    let mut far = pod("far", "10.0.0.10");
    far["metadata"]["labels"] = json!({"app": "web"});
    far["metadata"]["namespace"] = "bank".into();
    far["spec"]["nodeName"] = "node-2".into();
    [web, pod("job", "10.0.0.11"), far].into_iter().for_each(|pod| drop(apply(&mut index, Kind::Pod, pod)));
    policies.iter().for_each(|policy| drop(apply(&mut index, Kind::AuthorizationPolicy, policy.clone())));
    policies_listed(&mut index);
    index
}

fn far() -> Key {
    Key::Pod(ObjectName::new("bank", "far"))
}

fn key(name: &str) -> PolicyKey {
    let (namespace, name) = name.split_once('/').unwrap();
    PolicyKey::Authorization(ObjectName::new(namespace, name))
}

/// The policies that a workload names.
fn named(index: &Index, key: &Key) -> Vec<String> {
    match index.resource(key).unwrap().r#type.unwrap() {
        proto::address::Type::Workload(workload) => workload.authorization_policies,
        proto::address::Type::Service(_) => unreachable!(),
    }
}

#[test]
fn who_names_it() {
    let web = json!({"app": "web"});
    for (policies, by_web, by_job, by_far) in [
        (vec![policy("shop/p", web.clone())], vec!["shop/p"], vec![], vec![]),
        (vec![policy("shop/p", json!({"app": "web", "tier": "back"}))], vec![], vec![], vec![]),
        (vec![policy("shop/p", json!({}))], vec![], vec![], vec![]),
        (vec![policy("bank/p", web.clone())], vec![], vec![], vec!["bank/p"]),
        (vec![policy("istio-system/p", web.clone())], vec!["istio-system/p"], vec![], vec!["istio-system/p"]),
        (
            vec![
                policy("shop/b", web.clone()),
                policy("shop/a", json!({"tier": "front"})),
                policy("istio-system/c", web),
            ],
            vec!["istio-system/c", "shop/a", "shop/b"],
            vec![],
            vec!["istio-system/c"],
        ),
    ] {
        let index = world(&policies);
        let found = [pod_key("web"), pod_key("job"), far()].map(|key| named(&index, &key));
        assert_eq!(found, [by_web, by_job, by_far], "{policies:?}");
        let pods = index.local_pods();
        let web = pods.iter().find(|pod| &*pod.name.name == "web").unwrap();
        assert_eq!(web.description.authorization_policies, found[0], "by the pod protocol");
    }
}

#[test]
fn until_the_policies_are_listed_nobody_gets_in() {
    let (web, namespace) = (pod("web", "10.0.0.9"), json!({"metadata": {"name": "shop"}}));
    let world_without_lists = || {
        let mut index = index();
        apply(&mut index, Kind::Namespace, namespace.clone());
        apply(&mut index, Kind::Pod, web.clone());
        index
    };
    let mut index = world_without_lists();
    let (web, namespace) = (decode(web.clone()), decode(namespace.clone()));
    let name = ObjectName::new("shop", "web");
    let subject_to = |index: &Index, expect: &[&str], what: &str| {
        let all = [index.pod(&name), index.pod_in(&name, &namespace), index.read_pod(&web, &namespace).ok()];
        for pod in all {
            assert_eq!(pod.unwrap().description.authorization_policies, expect, "{what}");
        }
    };
    // The proxy denies for the sake of a policy that it does not know.
    let unknown = ["istio-system/not_listed_yet"];
    subject_to(&index, &unknown, "none is listed");
    index.handle(Event::Restarted(Kind::PeerAuthentication));
    index.handle(Event::Listed(Kind::PeerAuthentication));
    subject_to(&index, &unknown, "one kind is");
    let mut other = world_without_lists();
    other.handle(Event::Listed(Kind::AuthorizationPolicy));
    subject_to(&other, &unknown, "the other is");
    index.handle(Event::Restarted(Kind::AuthorizationPolicy));
    apply(&mut index, Kind::AuthorizationPolicy, policy("shop/p", json!({"app": "db"})));
    subject_to(&index, &unknown, "there may be more of them");
    index.handle(Event::Listed(Kind::AuthorizationPolicy));
    subject_to(&index, &[], "both are");
    index.handle(Event::Restarted(Kind::PeerAuthentication));
    subject_to(&index, &[], "what is known stays in use during a relist");
}

/// A longer message than the pod protocol has cannot be sent at all.
#[test]
fn of_more_policies_than_a_message_holds_the_model_tells_alone() {
    let long = |number: usize| format!("shop/{number:03}{}", "p".repeat(250));
    let web = || json!({"app": "web"});
    for (count, told) in [(10, 10), (70, 1)] {
        let policies: Vec<Value> = (0..count).map(|number| policy(&long(number), web())).collect();
        let index = world(&policies);
        let pods = index.local_pods();
        let description = &pods.iter().find(|pod| &*pod.name.name == "web").unwrap().description;
        assert_eq!(description.authorization_policies.len(), told);
        let is_stand_in = description.authorization_policies == ["istio-system/not_listed_yet"];
        assert_eq!(is_stand_in, told == 1, "one that no proxy knows");
        assert_eq!(named(&index, &pod_key("web")).len(), count, "the model");
    }
}

#[test]
fn a_policy_for_waypoints_is_nobody_s_at_layer_4() {
    let mut targeted = policy("shop/p", json!({}));
    targeted["spec"] =
        json!({"targetRefs": [{"kind": "Service", "name": "web"}], "action": "DENY", "rules": [{}]});
    let index = world(&[targeted]);
    assert_eq!(index.policy(&key("shop/p")), None);
    assert_eq!(index.policy_name(&key("shop/p")), "shop/p");
    assert_eq!(index.policies(&ObjectName::new("shop", "web")), []);
}

#[test]
fn what_all_policies_say_of_a_pod() {
    let everything = json!({});
    let index = world(&[
        policy("shop/one", json!({"app": "web"})),
        policy("shop/all", everything.clone()),
        policy("istio-system/mesh", everything.clone()),
        policy("bank/all", everything),
        policy("shop/other", json!({"app": "db"})),
    ]);
    let names = |pod: &str| -> Vec<String> {
        let policies = index.policies(&ObjectName::new("shop", pod)).into_iter();
        policies.map(|policy| format!("{}/{}", policy.namespace, policy.name)).collect()
    };
    assert_eq!(names("web"), ["shop/one", "istio-system/mesh", "shop/all"]);
    assert_eq!(names("job"), ["istio-system/mesh", "shop/all"]);
}

#[test]
fn a_change_touches_those_it_is_and_was_about() {
    let mut index = world(&[]);
    let mut change = |policy| {
        let changes = apply(&mut index, Kind::AuthorizationPolicy, policy);
        (changes.keys, changes.policies, changes.local)
    };
    let touched = |keys: &[Key]| keys.iter().cloned().collect::<BTreeSet<Key>>();
    let policies = || BTreeSet::from([key("shop/p")]);
    let web = || policy("shop/p", json!({"app": "web"}));
    assert_eq!(change(web()), (touched(&[pod_key("web")]), policies(), true));
    assert_eq!(change(web()), (touched(&[]), BTreeSet::new(), false), "the same again");
    let none = || policy("shop/p", json!({"app": "db"}));
    assert_eq!(change(none()), (touched(&[pod_key("web")]), policies(), true), "the pod that it was about");
    assert_eq!(change(none()), (touched(&[]), BTreeSet::new(), false));
    // Nobody names what is about everyone; connections older than enrolment are asked about anew.
    assert_eq!(change(policy("shop/p", json!({}))), (touched(&[]), policies(), true));
    let mesh = BTreeSet::from([key("istio-system/p")]);
    assert_eq!(
        change(policy("istio-system/p", json!({"app": "web"}))),
        (touched(&[pod_key("web"), far()]), mesh, true)
    );
    let far_alone = change(policy("bank/p", json!({"app": "web"})));
    assert_eq!(far_alone, (touched(&[far()]), BTreeSet::from([key("bank/p")]), false), "no pod of this node");
    let gone = index.handle(Event::Deleted(Kind::AuthorizationPolicy, ObjectName::new("istio-system", "p")));
    assert_eq!(gone.keys, touched(&[pod_key("web"), far()]));
    assert_eq!(index.policy(&key("istio-system/p")), None);
    assert_eq!(named(&index, &far()), ["bank/p"]);
}

/// Who is relabelled is told anew, so that its open connections are asked about again: cut, or served, at once.
#[test]
fn a_pod_that_is_relabelled_is_subject_to_others() {
    let mut index =
        world(&[policy("shop/p", json!({"app": "web"})), policy("istio-system/db", json!({"app": "db"}))]);
    let mut relabel = |labels: Value| {
        let mut web = pod("web", "10.0.0.9");
        web["metadata"]["labels"] = labels;
        let changes = apply(&mut index, Kind::Pod, web);
        (changes.keys.contains(&pod_key("web")), changes.local, named(&index, &pod_key("web")))
    };
    let (told, local) = (true, true);
    assert_eq!(relabel(json!({"app": "db"})), (told, local, vec!["istio-system/db".to_owned()]));
    assert_eq!(relabel(json!({"app": "none"})), (told, local, vec![]));
    assert_eq!(relabel(json!({"app": "web"})), (told, local, vec!["shop/p".to_owned()]));
    assert_eq!(relabel(json!({"app": "web", "tier": "back"})).2, ["shop/p"]);
}

#[test]
fn a_list_removes_what_is_not_in_it_any_more() {
    let mut index = world(&[policy("shop/p", json!({"app": "web"}))]);
    index.handle(Event::Restarted(Kind::AuthorizationPolicy));
    let changes = index.handle(Event::Listed(Kind::AuthorizationPolicy));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("web")]));
    assert_eq!(named(&index, &pod_key("web")), Vec::<String>::new());
}

#[test]
fn one_that_cannot_be_read() {
    let unreadable = |index: &mut Index| {
        let (kind, name) = (Kind::AuthorizationPolicy, ObjectName::new("shop", "p"));
        index.handle(Event::Unreadable { kind, name, reason: "torn".into() })
    };
    // Never known: everything is denied that it may be about.
    let mut index = world(&[]);
    let changes = unreadable(&mut index);
    assert_eq!((changes.problems.len(), changes.policies), (1, BTreeSet::from([key("shop/p")])));
    let policy_of = |index: &Index| index.policy(&key("shop/p")).unwrap();
    assert_eq!(policy_of(&index).scope(), wire::Scope::Namespace);
    assert_eq!((policy_of(&index).action(), policy_of(&index).rules.len()), (wire::Action::Deny, 1));
    // Else what was known stays.
    let mut index = world(&[policy("shop/p", json!({"app": "web"}))]);
    assert_eq!(unreadable(&mut index).policies, BTreeSet::new());
    assert_eq!(policy_of(&index).action(), wire::Action::Allow);
}

#[test]
fn what_is_wrong_with_it_is_reported() {
    let mut index = world(&[]);
    let mut wrong = policy("shop/p", json!({}));
    wrong["spec"]["rules"] = json!([{"to": [{"operation": {"methods": ["GET"]}}]}]);
    let problems = apply(&mut index, Kind::AuthorizationPolicy, wrong).problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(
        (problems[0].kind, &problems[0].name),
        (Kind::AuthorizationPolicy, &ObjectName::new("shop", "p"))
    );
    assert!(problems[0].reason.contains("waypoint"), "{}", problems[0].reason);
    assert!(!problems[0].skipped, "the rest of it is in force");
}
