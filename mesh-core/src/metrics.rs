//! Serving a registry of metrics. Which metrics there are, each daemon's own `metrics.rs` says.

pub mod process;

use std::sync::Arc;

use bytes::Bytes;
use http::header::ACCEPT;
use http::{Request, Response, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::status;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The handler for `/metrics`: OpenMetrics for those who accept it, else the older text form, which reads the same.
pub fn handler(registry: Arc<Registry>) -> impl Fn(&Request<()>) -> Response<Bytes> + Send + Sync + 'static {
    move |request| {
        let mut body = String::new();
        if let Err(error) = encode(&mut body, &registry) {
            let text = format!("metrics cannot be written: {error}\n");
            return status::text(StatusCode::INTERNAL_SERVER_ERROR, text);
        }
        let accepted = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let open = accepted.into_iter().any(|value| value.contains("application/openmetrics-text"));
        status::reply(StatusCode::OK, if open { OPEN_METRICS } else { PLAIN }, body.into())
    }
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn is_open_metrics_for_those_who_accept_it() {
        let mut registry = Registry::default();
        let counter = Counter::<u64>::default();
        registry.register("pods_enrolled", "Pods enrolled", counter.clone());
        counter.inc_by(3);
        let serve = handler(Arc::new(registry));
        for (accept, expected) in [
            ("", PLAIN),
            ("text/plain", PLAIN),
            ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", OPEN_METRICS),
        ] {
            let mut request = Request::new(());
            request.headers_mut().insert(ACCEPT, accept.parse().unwrap());
            let response = serve(&request);
            assert_eq!(response.headers()[CONTENT_TYPE], expected, "{accept}");
            let body = std::str::from_utf8(response.body()).unwrap();
            assert!(body.contains("pods_enrolled_total 3\n"), "{body}");
        }
    }
}
