//! Envoy as an HBONE proxy of somebody else: it opens tunnels, or ends them. Its settings are those that one writes for
//! that by hand from Envoy's documentation; the certificates are of the lab's mesh.

use std::net::{Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::eventually;
use crate::lab::{Background, Lab, PATIENCE};
use crate::peer::{Authority, Credentials};
use crate::tools;

/// Where Envoy is an HTTP proxy: what clients CONNECT to there goes through a tunnel.
pub const PROXY: u16 = 18000;
/// Where Envoy takes tunnels in.
const HBONE: u16 = 15008;
/// Until a tunnel that has ended is in its log.
const SOON: Duration = Duration::from_secs(15);

/// A running Envoy; it ends with this.
#[derive(Debug)]
pub struct Envoy(Background);

impl Envoy {
    /// Start it where `place` says, and wait until it serves.
    pub fn start(
        lab: &Lab,
        place: impl FnOnce(&str) -> anyhow::Result<Command>,
        settings: &Value,
    ) -> anyhow::Result<Self> {
        let program = tools::directory().join("pypi/envoy/_bin/envoy");
        anyhow::ensure!(program.is_file(), "there is no Envoy; `cargo xtask setup` fetches it");
        let mut command = place(program.to_str().context("the checkout's path is no text")?)?;
        command.args(["--disable-hot-restart", "--concurrency", "1", "--file-flush-interval-msec", "50"]);
        command.args(["--config-yaml", &settings.to_string()]);
        let envoy = Self(Background::start(lab, command)?);
        envoy.0.wait_for("starting main dispatch loop", PATIENCE)?;
        Ok(envoy)
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.0.output()
    }

    /// Wait until it has logged a line that has all these texts.
    pub fn logs(&self, texts: &[&str]) -> anyhow::Result<String> {
        eventually(&format!("Envoy logs {texts:?}"), SOON, || {
            let log = self.log();
            let line = log.lines().find(|line| texts.iter().all(|text| line.contains(text)));
            line.map(str::to_owned).with_context(|| format!("it says {log}"))
        })
    }
}

/// One that tunnels to `server`, which has to be `expected`: what is connected to [`PROXY`] on its loopback, to where
/// the client says, and what to a port of `tunnels`, to that authority.
#[must_use]
pub fn client(
    root: &Authority,
    credentials: &Credentials,
    server: SocketAddr,
    expected: &str,
    tunnels: &[(u16, String)],
) -> Value {
    let proxy =
        http_filter("HTTP1", &[json!({ "match": { "connect_matcher": {} }, "route": tunnel("hbone") })]);
    let tunnels = tunnels.iter().map(|(port, authority)| {
        let typed = json!({
            "@type": kind("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"),
            "stat_prefix": "tunnel", "cluster": "hbone", "tunneling_config": { "hostname": authority },
        });
        listener(
            loopback(*port),
            &json!({ "name": "envoy.filters.network.tcp_proxy", "typed_config": typed }),
            None,
        )
    });
    let listeners: Vec<Value> =
        [listener(loopback(PROXY), &proxy, None)].into_iter().chain(tunnels).collect();
    let transport = tls("UpstreamTlsContext", root, credentials, expected);
    json!({ "static_resources": { "listeners": listeners, "clusters": [cluster("hbone", server, Some(transport))] } })
}

/// One that ends tunnels of `expected` to these applications, as [`HBONE`] of the host it runs on. Of each it logs the
/// authority, the client's name, the status, and the headers that HBONE has.
#[must_use]
pub fn server(
    root: &Authority,
    credentials: &Credentials,
    expected: &str,
    applications: &[SocketAddr],
) -> Value {
    let routes: Vec<Value> = applications
        .iter()
        .map(|application| {
            let authority =
                json!({ "name": ":authority", "string_match": { "exact": application.to_string() } });
            let mut route = tunnel(&application.to_string());
            route["upgrade_configs"] = json!([{ "upgrade_type": "CONNECT", "connect_config": {} }]);
            json!({ "match": { "connect_matcher": {}, "headers": [authority] }, "route": route })
        })
        .collect();
    let transport = tls("DownstreamTlsContext", root, credentials, expected);
    let address = json!({ "socket_address": {
        "address": Ipv6Addr::UNSPECIFIED, "port_value": HBONE, "ipv4_compat": true,
    } });
    let listener = listener(address, &http_filter("HTTP2", &routes), Some(transport));
    let clusters: Vec<Value> = applications.iter().map(|to| cluster(&to.to_string(), *to, None)).collect();
    json!({ "static_resources": { "listeners": [listener], "clusters": clusters } })
}

/// A protobuf message of Envoy's.
fn kind(name: &str) -> String {
    format!("type.googleapis.com/{name}")
}

fn loopback(port: u16) -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } })
}

fn listener(address: Value, filter: &Value, transport: Option<Value>) -> Value {
    let mut chain = json!({ "filters": [filter] });
    if let Some(transport) = transport {
        chain["transport_socket"] = transport;
    }
    json!({ "address": address, "filter_chains": [chain] })
}

/// A route's target, for as long as the tunnel stays open.
fn tunnel(cluster: &str) -> Value {
    json!({ "cluster": cluster, "timeout": "0s" })
}

fn http_filter(codec: &str, routes: &[Value]) -> Value {
    let line = "tunnel %REQ(:AUTHORITY)% of %DOWNSTREAM_PEER_URI_SAN%: %RESPONSE_CODE% \
                baggage=%REQ(BAGGAGE)% forwarded=%REQ(FORWARDED)%\n";
    let typed = json!({
        "@type": kind("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http", "codec_type": codec,
        "http2_protocol_options": { "allow_connect": true },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": routes }] },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": kind("envoy.extensions.filters.http.router.v3.Router") },
        }],
        "access_log": [{
            "name": "envoy.access_loggers.stdout",
            "typed_config": {
                "@type": kind("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"),
                "log_format": { "text_format_source": { "inline_string": line } },
            },
        }],
    });
    json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": typed })
}

/// One address; with TLS it is spoken HTTP/2 to.
fn cluster(name: &str, to: SocketAddr, transport: Option<Value>) -> Value {
    let address = json!({ "socket_address": { "address": to.ip(), "port_value": to.port() } });
    let endpoints = json!([{ "lb_endpoints": [{ "endpoint": { "address": address } }] }]);
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": endpoints },
    });
    if let Some(transport) = transport {
        cluster["transport_socket"] = transport;
        let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        cluster["typed_extension_protocol_options"][options] = json!({
            "@type": kind(options),
            "explicit_http_config": { "http2_protocol_options": { "allow_connect": true } },
        });
    }
    cluster
}

/// Mutual TLS 1.3 with a peer of this name, and HTTP/2 in it.
fn tls(context: &str, root: &Authority, credentials: &Credentials, expected: &str) -> Value {
    let common = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{
            "certificate_chain": { "inline_string": credentials.chain_pem() },
            "private_key": { "inline_string": credentials.key_pem() },
        }],
        "validation_context": {
            "trusted_ca": { "inline_string": root.pem() },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": expected } }],
        },
    });
    let mut typed = json!({
        "@type": kind(&format!("envoy.extensions.transport_sockets.tls.v3.{context}")),
        "common_tls_context": common,
    });
    if context == "DownstreamTlsContext" {
        typed["require_client_certificate"] = json!(true);
    }
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": typed })
}
