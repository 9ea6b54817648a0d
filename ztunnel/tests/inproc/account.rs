//! What is told of a connection when it has ended.

use crate::world::{APP, CLIENT, SERVER, World, eventually};

/// Both sides' series and log lines of the only connection that the client has had to the server's service, on which it
/// has sent `sent` bytes to the echoing application. The client's side names the application in `target`.
pub(crate) async fn of_one(world: &World, security: &str, sent: u64, target: &str) {
    let greeting = world.pod_ip(CLIENT).to_string().len() as u64 + 1;
    let identities = [
        "src.identity=spiffe://cluster.local/ns/shop/sa/client",
        "dst.identity=spiffe://cluster.local/ns/shop/sa/server",
    ];
    for (reporter, direction, target) in
        [("source", "outbound", target), ("destination", "inbound", "dst.addr")]
    {
        let (reporter, security) =
            (format!("reporter=\"{reporter}\""), format!("connection_security_policy=\"{security}\""));
        let labels = [
            reporter.as_str(),
            "source_workload=\"client-deployment\"",
            "destination_workload=\"server-deployment\"",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/server\"",
            "destination_service=\"server.local\"",
            security.as_str(),
            "response_flags=\"-\"",
        ];
        eventually("the connection counts as closed", async || {
            world.metric("istio_tcp_connections_closed_total", &labels).await == 1
        })
        .await;
        assert_eq!(world.metric("istio_tcp_connections_opened_total", &labels).await, 1);
        assert_eq!(world.metric("istio_tcp_received_bytes_total", &labels).await, sent);
        assert_eq!(world.metric("istio_tcp_sent_bytes_total", &labels).await, sent + greeting);
        let direction = format!("direction=\"{direction}\"");
        let target = format!("{target}={}:{APP}", world.pod_ip(SERVER));
        let parts = ["connection complete", &direction, &target, "dst.service=\"server.local\""];
        world.logged(&[&parts[..], &identities[..]].concat()).await;
    }
}
