//! A CONNECT request: its authority, `baggage`, `forwarded`, `traceparent`. The bytes are text: the method, the authority
//! and headers, a line each.

use http::{HeaderName, HeaderValue, Method, Request, Uri};
use mesh_core::hbone::request::{ConnectRequest, Host};

/// What is understood can be sent on, and is then understood in the same way.
pub fn run(data: &[u8]) {
    let Some(request) = request(data) else { return };
    let Ok(understood) = ConnectRequest::parse(&request) else { return };
    assert_ne!(understood.authority.port, 0);
    if let Host::Name(name) = &understood.authority.host {
        assert_eq!(*name, name.to_ascii_lowercase());
    }
    let sent = understood.to_http().expect("an authority that was read can be written");
    let again = ConnectRequest::parse(&sent).expect("what was written can be read");
    assert_eq!(again.authority, understood.authority);
    assert_eq!(again.traceparent, understood.traceparent);
    assert_eq!(again.workload_uid, understood.workload_uid);
    // Values with a separator in them are not written; what is, means the same.
    let third = ConnectRequest::parse(&again.to_http().expect("it can be written again")).expect("and read");
    assert_eq!((third.baggage, third.forwarded), (again.baggage, again.forwarded));
}

fn request(data: &[u8]) -> Option<Request<()>> {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(lines.next()?).ok()?;
    let authority = http::uri::Authority::try_from(lines.next()?).ok()?;
    *request.uri_mut() = Uri::from(authority);
    for line in lines {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else { continue };
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            request.headers_mut().append(name, value);
        }
    }
    Some(request)
}

/// Requests as Istio's and our own proxies send them.
pub fn seeds() -> Vec<Vec<u8>> {
    let headers = "baggage:k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,\
        service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z\n\
        forwarded:for=\"10.244.1.3:40000\";host=web.shop.svc.cluster.local\n\
        traceparent:00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n\
        ambit-workload-uid:Kubernetes//Pod/shop/web-0";
    ["10.244.2.4:8080", "[fd00:244::4]:8080", "web.shop.svc.cluster.local:80"]
        .map(|authority| format!("CONNECT\n{authority}\n{headers}").into_bytes())
        .into()
}
