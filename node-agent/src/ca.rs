//! The certificate authority role, `node-agent ca`.
//!
//! It runs as ordinary pods of the mesh's own namespace, and it alone holds the signing key. `attest` decides who may
//! have which identity, `issue` signs, `roots` owns the key's home in the API server, `server` speaks gRPC.
//!
//! **Invariant:** no private key, and no caller's token, ever reaches a log or an error text.

use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;

/// Settings of `node-agent ca`.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where certificates are asked for, over TLS.
    #[arg(long, env = "AMBIT_CA_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Namespace of the mesh itself: of the CA's Secret, its ConfigMap, and the ztunnel ServiceAccount.
    #[arg(long, env = "POD_NAMESPACE", default_value = "ambit-system")]
    pub system_namespace: String,
    /// Trust domain of the SPIFFE identities.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// DNS suffix of the cluster's services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Where readiness, liveness and metrics are served.
    #[arg(long, env = "AMBIT_STATUS_ADDRESS", default_value = "0.0.0.0:15014")]
    pub status_address: SocketAddr,
}

/// Runs until `shutdown`.
///
/// # Errors
/// When a setting is wrong or an address is taken.
pub async fn run(config: Config, client: kube::Client, shutdown: CancellationToken) -> anyhow::Result<()> {
    let _ = (config, client);
    shutdown.cancelled().await;
    Ok(())
}
