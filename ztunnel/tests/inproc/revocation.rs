//! Certificate revocation lists: who is on one is refused by either end, and cut when it comes on one.

use std::io::ErrorKind;
use std::path::PathBuf;

use mesh_core::test_ca::TestCa;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::near::near_with;
use crate::world::{CLIENT, SERVER, TestPod, World, eventually, line};

/// A file that is gone after the test.
struct File(PathBuf);

impl File {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("ambit-crl-{}-{}", std::process::id(), rand::random::<u32>())))
    }

    fn argument(&self) -> String {
        format!("--crl-path={}", self.0.display())
    }

    /// As an operator's tools and the kubelet do it: at once.
    fn replace(&self, content: &str) {
        let new = self.0.with_extension("new");
        std::fs::write(&new, content).unwrap();
        std::fs::rename(new, &self.0).unwrap();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The pod's certificate as it is in use.
async fn leaf(world: &World, pod: TestPod) -> String {
    let dump = world.dump().await;
    let mut all = dump["certificates"].as_array().unwrap().iter();
    let own = all.find(|certificate| certificate["identity"] == pod.identity()).unwrap();
    own["chain"].as_str().unwrap().to_owned()
}

async fn lists(world: &World) -> usize {
    world.dump().await["revocationLists"]["lists"].as_array().unwrap().len()
}

async fn rejections(world: &World, reporter: &str) -> u64 {
    world.metric("istio_crl_policy_rejections_total", &[&format!("reporter=\"{reporter}\"")]).await
}

async fn open(world: &World) -> TcpStream {
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    stream
}

async fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"?").await.is_ok() && stream.read_u8().await.is_ok_and(|byte| byte == b'?')
}

/// An open connection is reset when the pod's certificate comes on the list, and no other is made until it is off again.
async fn is_cut_and_refused(revoked: TestPod, reporter: &str, direction: &str) {
    let file = File::new();
    let world = World::with(&[&file.argument()]).await;
    let _application = world.application(SERVER).await;
    let mut stream = open(&world).await;
    assert!(echoes(&mut stream).await, "nobody is revoked without a file");
    let list = world.ca.revoke_pem(&[leaf(&world, revoked).await]);
    file.replace(&list);
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["is revoked", direction, "reason=\"CERT_REVOKED\""]).await;
    let cut = rejections(&world, reporter).await;
    assert!(cut > 0);

    let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(refused.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(rejections(&world, reporter).await > cut);
    let flag = "response_flags=\"CERT_REVOKED\"";
    for reporter in ["source", "destination"] {
        eventually("both ends count it", async || {
            let labels = [flag, &format!("reporter=\"{reporter}\"")];
            world.metric("istio_tcp_connections_failed_total", &labels).await > 0
        })
        .await;
    }
    // A file that cannot be used changes nothing, and that is told.
    file.replace(&list[..list.len() / 2]);
    eventually("it is told", async || {
        let status = &world.dump().await["revocationLists"];
        status["error"].as_str().is_some_and(|error| error.contains("PEM is damaged"))
    })
    .await;
    assert_eq!(world.metric("ambit_crl_load_failures_total", &[]).await, 1);
    let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(refused.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

    file.replace(&world.ca.revoke_pem(&[]));
    eventually("it is off again", async || {
        world.dump().await["revocationLists"]["error"].is_null()
            && world.metric("ambit_crl_lists", &[]).await == 1
    })
    .await;
    assert!(echoes(&mut open(&world).await).await);
}

#[tokio::test]
async fn a_tunnel_to_a_server_that_is_revoked_is_cut_and_refused() {
    is_cut_and_refused(SERVER, "source", "direction=\"outbound\"").await;
}

#[tokio::test]
async fn a_tunnel_of_a_client_that_is_revoked_is_cut_and_refused() {
    is_cut_and_refused(CLIENT, "destination", "direction=\"inbound\"").await;
}

#[tokio::test]
async fn others_are_let_be_and_a_file_that_is_gone_revokes_nobody() {
    let file = File::new();
    let world = World::with(&[&file.argument()]).await;
    let _application = world.application(SERVER).await;
    let mut stream = open(&world).await;
    let server = leaf(&world, SERVER).await;
    // Not the issuer's list, though of the issuer's name.
    file.replace(&TestCa::new().revoke_pem(std::slice::from_ref(&server)));
    eventually("it is in force", async || lists(&world).await == 1).await;
    assert!(echoes(&mut stream).await && echoes(&mut open(&world).await).await);
    file.replace(&world.ca.revoke_pem(&[server]));
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    std::fs::remove_file(&file.0).unwrap();
    eventually("none is in force", async || lists(&world).await == 0).await;
    assert!(echoes(&mut open(&world).await).await);
}

/// Nothing but a handshake looks at certificates: where they may be revoked, pods of one node have one, too.
#[tokio::test]
async fn pods_of_one_node_are_not_joined_past_the_lists() {
    let file = File::new();
    let world = near_with(&[&file.argument()]).await;
    let _application = world.application(SERVER).await;
    let mut near = open(&world).await;
    assert!(echoes(&mut near).await);
    let joined = async || {
        let label = "connection_security_policy=\"none\"";
        world.metric("istio_tcp_connections_opened_total", &[label]).await
    };
    assert_eq!(joined().await, 2, "there are no lists yet");
    file.replace(&world.ca.revoke_pem(&[]));
    eventually("it is in force", async || lists(&world).await == 1).await;
    assert_eq!(near.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["certificate revocation lists are in force now", "direction=\"inbound\"", "CUT"]).await;
    assert!(echoes(&mut open(&world).await).await, "over a tunnel it may be");
    assert_eq!(joined().await, 2);
    file.replace(&world.ca.revoke_pem(&[leaf(&world, SERVER).await]));
    eventually("the server is on it", async || {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        stream.read(&mut [0; 1]).await.is_err()
    })
    .await;
}

/// Who was revoked before ztunnel began must not be believed just because nobody can read it any more.
#[tokio::test]
async fn nobody_is_believed_where_the_first_file_is_damaged() {
    let file = File::new();
    let good = TestCa::new().revoke_pem(&[]);
    file.replace(&good[..good.len() / 2]);
    let world = World::unready_with(&[&file.argument()]).await;
    let _application = world.application(SERVER).await;
    world.not_ready_for("crl (").await;
    for _ in 0..2 {
        let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        assert_eq!(refused.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    world.logged(&["no revocation list could be read yet", "connection failed"]).await;
    file.replace(&good);
    world.ready().await;
    assert!(echoes(&mut open(&world).await).await);
}

/// Pods of one node would be joined without a certificate.
#[tokio::test]
async fn nor_are_pods_of_one_node() {
    let file = File::new();
    file.replace("-----BEGIN X509 CRL-----\n");
    let world = World::unready_with(&[&file.argument()]).await;
    crate::near::tell(&world, [("node-1", true), ("node-1", true)]).await;
    let _application = world.application(SERVER).await;
    let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(refused.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    std::fs::remove_file(&file.0).unwrap();
    world.ready().await;
    assert!(echoes(&mut open(&world).await).await);
}
