//! IP families of Services as `kubectl` sees them, in clusters of one family and of two.

use mesh_tests::Stack;

use crate::cluster::Cluster;

fn service(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec: {{selector: {{app: web}}, ports: [{{port: 80}}]{spec}}}\n"
    )
}

/// Policy, families and addresses of a Service.
fn shown(cluster: &Cluster, name: &str) -> String {
    let path = "{.spec.ipFamilyPolicy} {.spec.ipFamilies[*]} {.spec.clusterIP} {.spec.clusterIPs[*]}";
    cluster.kubectl(&format!("get service {name} -o 'jsonpath={path}'"))
}

/// The same with addresses replaced by their families: which are free is not the point.
fn families(cluster: &Cluster, name: &str) -> String {
    let named = |word: &str| match word.parse::<std::net::IpAddr>() {
        Ok(address) if address.is_ipv4() => "v4".to_owned(),
        Ok(_) => "v6".to_owned(),
        Err(_) => word.to_owned(),
    };
    shown(cluster, name).split(' ').map(named).collect::<Vec<_>>().join(" ")
}

#[test]
fn services_get_the_families_they_ask_for() {
    for (stack, plain, prefer) in [
        (Stack::V4, "SingleStack IPv4 v4 v4", "PreferDualStack IPv4 v4 v4"),
        (Stack::V6, "SingleStack IPv6 v6 v6", "PreferDualStack IPv6 v6 v6"),
        (Stack::Dual, "SingleStack IPv4 v4 v4", "PreferDualStack IPv4 IPv6 v4 v4 v6"),
    ] {
        let cluster = Cluster::start_with(stack);
        cluster.kubectl_with("apply -f -", &service("plain", ""));
        assert_eq!(families(&cluster, "plain"), plain, "{stack:?}");
        cluster.kubectl_with("apply -f -", &service("prefer", ", ipFamilyPolicy: PreferDualStack"));
        assert_eq!(families(&cluster, "prefer"), prefer, "{stack:?}");
        let required = service("require", ", ipFamilyPolicy: RequireDualStack");
        if stack == Stack::Dual {
            cluster.kubectl_with("apply -f -", &required);
            assert_eq!(families(&cluster, "require"), "RequireDualStack IPv4 IPv6 v4 v4 v6");
        } else {
            let said = cluster.refused("admin", "apply -f -", &required);
            assert!(said.contains("this cluster is not configured for dual-stack services"), "{said}");
        }
        let own = cluster.kubectl("get service kubernetes -o 'jsonpath={.spec.clusterIP}'");
        assert_eq!(own, if stack == Stack::V6 { "fd00:96::1" } else { "10.96.0.1" });
    }
}

#[test]
fn addresses_that_were_asked_for_are_given_once() {
    let cluster = Cluster::start_with(Stack::Dual);
    let asked = ", clusterIPs: ['fd00:96::77', 10.96.0.77], ipFamilyPolicy: RequireDualStack";
    cluster.kubectl_with("apply -f -", &service("asked", asked));
    assert_eq!(
        shown(&cluster, "asked"),
        "RequireDualStack IPv6 IPv4 fd00:96::77 fd00:96::77 10.96.0.77",
        "the first address tells the first family"
    );
    for (spec, why) in [
        (", clusterIP: 10.96.0.77", "provided IP is already allocated"),
        (", clusterIP: 'fd00:96:0:0::77'", "provided IP is already allocated"),
        (", clusterIP: 'fd00:97::1'", "The range of valid IPs is fd00:96::/112"),
        (", ipFamilies: [IPv4, IPv6]", "must be RequireDualStack or PreferDualStack"),
        (
            ", ipFamilies: [IPv6], clusterIP: 10.96.0.78",
            "expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
        (", ipFamilies: [IPv6, IPv6], ipFamilyPolicy: PreferDualStack", "Duplicate value"),
    ] {
        let said = cluster.refused("admin", "apply -f -", &service("other", spec));
        assert!(said.contains(why), "{spec}: {said}");
    }
}

#[test]
fn a_service_becomes_dual_and_single_again() {
    let cluster = Cluster::start_with(Stack::Dual);
    cluster.kubectl_with("apply -f -", &service("web", ""));
    let first = shown(&cluster, "web");
    let patch =
        |policy: &str| format!("patch service web -p '{{\"spec\":{{\"ipFamilyPolicy\":\"{policy}\"}}}}'");
    cluster.kubectl(&patch("PreferDualStack"));
    assert_eq!(families(&cluster, "web"), "PreferDualStack IPv4 IPv6 v4 v4 v6");
    let dual = shown(&cluster, "web");
    cluster.kubectl("label service web a=b");
    cluster.kubectl_with("replace -f -", &service("web", ""));
    assert_eq!(shown(&cluster, "web"), dual, "what a change does not speak of stays");
    cluster.kubectl(&patch("SingleStack"));
    assert_eq!(shown(&cluster, "web"), first, "the primary address is the one it had");
    let other = cluster.refused("admin", "patch service web -p '{\"spec\":{\"ipFamilies\":[\"IPv6\"]}}'", "");
    assert!(other.contains("spec.ipFamilies[0]") && other.contains("may not change once set"), "{other}");
}

#[test]
fn ports_of_the_nodes_come_and_go_with_the_type() {
    let cluster = Cluster::start_with(Stack::V4);
    cluster.kubectl_with("apply -f -", &service("web", ", type: NodePort"));
    let port =
        |name: &str| cluster.kubectl(&format!("get service {name} -o jsonpath={{.spec.ports[0].nodePort}}"));
    let first = port("web");
    assert!((30000..=32767).contains(&first.parse().unwrap()), "{first}");
    cluster.kubectl_with("replace -f -", &service("web", ", type: LoadBalancer"));
    assert_eq!(port("web"), first, "what a change does not speak of stays");
    let taken = format!(", type: NodePort, ports: [{{port: 80, nodePort: {first}}}]");
    let taken = service("other", &taken).replace(", ports: [{port: 80}]", "");
    let said = cluster.refused("admin", "apply -f -", &taken);
    assert!(said.contains("spec.ports[0].nodePort") && said.contains("is already allocated"), "{said}");
    let said = cluster.refused("admin", "apply -f -", &taken.replace(&first, "80"));
    assert!(said.contains("is not in the valid range"), "{said}");
    cluster.kubectl("patch service web -p '{\"spec\":{\"type\":\"ClusterIP\"}}'");
    assert_eq!(port("web"), "");
    cluster.kubectl_with("apply -f -", &taken);
    cluster.kubectl("patch service web -p '{\"spec\":{\"type\":\"NodePort\"}}'");
    assert!(!port("web").is_empty() && port("web") != port("other"));
}

#[test]
fn a_slice_has_addresses_of_its_type() {
    let cluster = Cluster::start_with(Stack::Dual);
    let slice = |family: &str, address: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s}}\n\
             addressType: {family}\nports: []\nendpoints: [{{addresses: ['{address}']}}]\n"
        )
    };
    let said = cluster.refused("admin", "create -f -", &slice("IPv6", "10.0.0.1"));
    assert!(
        said.contains("endpoints[0].addresses[0]") && said.contains("must be a valid IPv6 address"),
        "{said}"
    );
    cluster.kubectl_with("create -f -", &slice("IPv6", "fd00::1"));
}
