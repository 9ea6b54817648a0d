use super::*;
use crate::workload::WorkloadType;

fn request(authority: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from(authority.parse::<http::uri::Authority>().unwrap());
    for (name, value) in headers {
        request.headers_mut().append(
            HeaderName::from_bytes(name.as_bytes()).unwrap(),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        );
    }
    request
}

#[test]
fn authorities() {
    let address = |text: &str, port| Some(Authority { host: Host::Address(text.parse().unwrap()), port });
    let name = |text: &str, port| Some(Authority { host: Host::Name(text.into()), port });
    for (text, expected) in [
        ("10.2.0.9:8080", address("10.2.0.9", 8080)),
        ("[2001:db8::1]:80", address("2001:db8::1", 80)),
        ("reviews.default.svc.cluster.local:9080", name("reviews.default.svc.cluster.local", 9080)),
        ("Reviews.Default:9080", name("reviews.default", 9080)),
        ("my_service:1", name("my_service", 1)),
        ("", None),
        ("10.2.0.9", None),
        ("reviews", None),
        (":80", None),
        ("10.2.0.9:", None),
        ("10.2.0.9:0", None),
        ("10.2.0.9:+80", None),
        ("10.2.0.9:65536", None),
        ("10.2.0.9:99999999999999999999", None),
        ("2001:db8::1:80", None),
        ("[10.2.0.9]:80", None),
        ("[2001:db8::1:80", None),
        ("10.2.0.999:80", None),
        ("10.2.0:80", None),
        ("user@reviews:80", None),
        ("re views:80", None),
        ("reviews..default:80", None),
    ] {
        let parsed: Option<Authority> = text.parse().ok();
        assert_eq!(parsed, expected, "{text:?}");
        if let Some(authority) = parsed {
            assert_eq!(authority.to_string(), text.to_ascii_lowercase());
        }
    }
    assert!(format!("{}:80", "a".repeat(64)).parse::<Authority>().is_err());
    assert!(format!("{}:80", "a.".repeat(127)).parse::<Authority>().is_err());
}

#[test]
fn refuses_other_methods() {
    let mut get = request("10.2.0.9:80", &[]);
    *get.method_mut() = Method::GET;
    assert_eq!(ConnectRequest::parse(&get), Err(InvalidRequest::Method("GET".into())));
}

#[test]
fn a_request_survives_the_wire() {
    let full = ConnectRequest {
        authority: "10.2.0.9:8080".parse().unwrap(),
        baggage: Baggage {
            cluster: Some("Kubernetes".into()),
            namespace: Some("payments".into()),
            workload: Some((WorkloadType::Deployment, "api-gateway".into())),
            service: Some("api-gateway".into()),
            revision: Some("v1".into()),
            region: Some("eu".into()),
            zone: Some("eu-1".into()),
        },
        forwarded: Some(Forwarded {
            client: Some("10.1.0.7:40000".parse().unwrap()),
            host: Some("payment-service.payments.svc.cluster.local".into()),
        }),
        traceparent: Some(TraceParent::random()),
        workload_uid: Some("Kubernetes//Pod/payments/payment-service-1".into()),
    };
    for request in [full.clone(), ConnectRequest::new(full.authority.clone())] {
        assert_eq!(ConnectRequest::parse(&request.to_http().unwrap()).unwrap(), request);
    }
    let bare = ConnectRequest::new(full.authority).to_http().unwrap();
    assert!(bare.headers().is_empty(), "{bare:?}");
    assert!(bare.uri().scheme().is_none() && bare.uri().path_and_query().is_none(), "{bare:?}");
}

#[test]
fn writes_the_headers_of_istio() {
    let mut request = ConnectRequest::new("10.2.0.9:80".parse().unwrap());
    request.baggage.namespace = Some("a".into());
    request.baggage.workload = Some((WorkloadType::CronJob, "b".into()));
    request.baggage.service = Some("evil,k8s.namespace.name=c".into());
    request.forwarded =
        Some(Forwarded { client: Some("[::1]:5".parse().unwrap()), host: Some("h.svc".into()) });
    request.workload_uid = Some("bad\nuid".into());
    let headers = request.to_http().unwrap().into_parts().0.headers;
    assert_eq!(headers["baggage"], "k8s.namespace.name=a,k8s.cronjob.name=b");
    assert_eq!(headers["forwarded"], "for=\"[::1]:5\";host=h.svc");
    assert!(!headers.contains_key(WORKLOAD_UID));
}

#[test]
fn hints_that_cannot_be_understood_are_absent() {
    let long = "x".repeat(MAX_VALUE + 1);
    let baggage = |headers: &[(&str, &str)]| ConnectRequest::parse(&request("a:1", headers)).unwrap().baggage;
    let several = baggage(&[
        ("baggage", "k8s.cluster.name=c1, k8s.namespace.name = n ;p=q,,=,x=y"),
        ("baggage", "service.name=,k8s.pod.name=p,service.version=v=2"),
    ]);
    let expected = Baggage {
        cluster: Some("c1".into()),
        namespace: Some("n".into()),
        workload: Some((WorkloadType::Pod, "p".into())),
        revision: Some("v=2".into()),
        ..Baggage::default()
    };
    assert_eq!(several, expected);
    assert_eq!(baggage(&[("baggage", &format!("service.name={long}"))]), Baggage::default());

    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    for (header, good) in [
        (traceparent, true),
        ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", false),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", false),
        ("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", false),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", false),
        ("garbage", false),
    ] {
        let parsed = ConnectRequest::parse(&request("a:1", &[("traceparent", header)])).unwrap();
        assert_eq!(parsed.traceparent.map(|trace| trace.to_string()), good.then(|| header.to_owned()));
    }

    for (header, client, host) in [
        ("for=\"10.0.0.1:5\";host=a.b", Some("10.0.0.1:5"), Some("a.b")),
        ("For=10.0.0.1:5; proto=http", Some("10.0.0.1:5"), None),
        ("host=a.b", None, Some("a.b")),
        ("for=unknown", None, None),
        ("nonsense", None, None),
        ("for=\"10.0.0.1:5\", for=\"10.0.0.2:6\"", Some("10.0.0.1:5"), None),
    ] {
        let parsed = ConnectRequest::parse(&request("a:1", &[("forwarded", header)])).unwrap().forwarded;
        let expected = (client.map(|client| client.parse::<SocketAddr>().unwrap()), host.map(str::to_owned));
        assert_eq!(parsed.map_or((None, None), |f| (f.client, f.host)), expected, "{header}");
    }
    let uid = ConnectRequest::parse(&request("a:1", &[("ambit-workload-uid", &long)])).unwrap().workload_uid;
    assert_eq!(uid, None);
}
