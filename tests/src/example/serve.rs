//! The example services: an HTTP server whose answer says who asked, and what the services behind it answered.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use super::{http, stream};

#[derive(Debug, clap::Args)]
pub(super) struct Config {
    /// By default all addresses of both families.
    #[arg(long, default_value = "[::]:8080")]
    listen: SocketAddr,
    /// What the service calls itself.
    #[arg(long)]
    name: String,
    #[arg(long, default_value = "v1")]
    version: String,
    /// Asked for each request before it is answered; may be given several times.
    #[arg(long = "call", value_name = "URL")]
    calls: Vec<String>,
}

pub(super) async fn run(config: Config) -> anyhow::Result<()> {
    let listener = stream::listen(config.listen).await?;
    println!("{} {} listens on {}", config.name, config.version, config.listen);
    let config = Arc::new(config);
    loop {
        let Ok((stream, client)) = listener.accept().await else { continue };
        // What dials IPv4 is seen as ::ffff:a.b.c.d by a socket of both families.
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let config = config.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| {
                let config = config.clone();
                async move { Ok::<_, Infallible>(answer(&config, client, request).await) }
            });
            // A client that goes away early is none of our business.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(config: &Config, client: SocketAddr, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.uri().path() == "/healthz" {
        return Response::new(Full::from("ok\n"));
    }
    println!("{} {} from {client}", request.method(), request.uri());
    // As tracing headers are: what the caller marks stays marked further down.
    let passed_on: Vec<(String, String)> = request
        .headers()
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("x-"))
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
        .collect();
    let mut calls = Vec::new();
    for url in &config.calls {
        calls.push(call(url, &passed_on).await);
    }
    let failed = calls.iter().any(|call| call["status"] != 200);
    let body = json!({
        "service": config.name,
        "version": config.version,
        "client": client.ip().to_string(),
        "path": request.uri().path(),
        "calls": calls,
    });
    let mut response = Response::new(Full::from(format!("{body}\n")));
    response
        .headers_mut()
        .insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    if failed {
        *response.status_mut() = StatusCode::BAD_GATEWAY;
    }
    response
}

async fn call(url: &str, headers: &[(String, String)]) -> Value {
    match http::get(url, headers, Duration::from_secs(10)).await {
        Ok(answer) => {
            let body = serde_json::from_str(&answer.body).unwrap_or(Value::String(answer.body));
            json!({ "url": url, "status": answer.status, "body": body })
        }
        Err(error) => json!({ "url": url, "error": format!("{error:#}") }),
    }
}
