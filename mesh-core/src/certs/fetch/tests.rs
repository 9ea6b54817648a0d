use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Response, Status};

use super::*;
use crate::proto::ca::IstioCertificateResponse;
use crate::proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use crate::test_ca::TestCa;

const PAYMENTS: &str = "spiffe://cluster.local/ns/payments/sa/payment-service";

/// A certificate authority that signs for those who bring the token "right".
struct Authority {
    ca: Arc<TestCa>,
    seen: Mutex<Vec<IstioCertificateRequest>>,
}

struct Service(Arc<Authority>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header =
            |name: &str| request.metadata().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if header("authorization").as_deref() != Some("Bearer right") {
            return Err(Status::unauthenticated("the token is not valid"));
        }
        assert_eq!(header("clusterid").as_deref(), Some("Kubernetes"));
        let request = request.into_inner();
        let leaf = self.0.ca.sign(&request.csr);
        self.0.seen.lock().unwrap().push(request);
        Ok(Response::new(IstioCertificateResponse { cert_chain: vec![leaf, self.0.ca.root_pem()] }))
    }
}

struct Scene {
    authority: Arc<Authority>,
    client: CaClient,
    directory: PathBuf,
    address: SocketAddr,
}

impl Drop for Scene {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

async fn scene(name: &str) -> Scene {
    let ca = Arc::new(TestCa::new());
    let authority = Arc::new(Authority { ca: ca.clone(), seen: Mutex::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (key, certificate) = ca.host("localhost");
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(TlsIdentity::from_pem(certificate, key)))
        .unwrap()
        .add_service(IstioCertificateServiceServer::new(Service(authority.clone())));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let directory = std::env::temp_dir().join(format!("ambit-fetch-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let config = CaConfig {
        ca_address: format!("https://localhost:{}", address.port()),
        ca_root: directory.join("root-cert.pem"),
        mesh_roots: None,
        token: directory.join("token"),
    };
    std::fs::write(&config.ca_root, ca.root_pem()).unwrap();
    std::fs::write(&config.token, "right\n").unwrap();
    Scene { authority, client: CaClient::new(config, "Kubernetes".into()), directory, address }
}

#[tokio::test]
async fn fetches_for_another_identity_with_rotated_files() {
    let scene = scene("good").await;
    let identity: Identity = PAYMENTS.parse().unwrap();
    let cert = scene.client.fetch(&identity).await.unwrap();
    assert_eq!(cert.identity(), &identity);
    let seen = scene.authority.seen.lock().unwrap().clone();
    let impersonated = seen[0].metadata.clone().unwrap().fields["ImpersonatedIdentity"].kind.clone();
    assert_eq!(impersonated, Some(Kind::StringValue(PAYMENTS.into())));
    assert_eq!(seen[0].validity_duration, 86_400);

    std::fs::write(&scene.client.config.token, "wrong").unwrap();
    let error = scene.client.fetch(&identity).await.unwrap_err().to_string();
    assert!(error.contains("the token is not valid") && !error.contains("wrong"), "{error}");
    std::fs::write(&scene.client.config.token, "right").unwrap();
    let again = scene.client.fetch(&identity).await.unwrap();
    assert_ne!(again.serial(), cert.serial());

    std::fs::write(&scene.client.config.ca_root, TestCa::new().root_pem()).unwrap();
    let error = scene.client.fetch(&identity).await.unwrap_err();
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn says_what_is_missing() {
    let scene = scene("bad").await;
    let identity: Identity = PAYMENTS.parse().unwrap();
    let with = |change: &dyn Fn(&mut CaConfig)| {
        let mut config = scene.client.config.clone();
        change(&mut config);
        CaClient::new(config, "Kubernetes".into())
    };
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (client, expected) in [
        (with(&|config| config.token = "/nowhere/token".into()), "token from /nowhere/token"),
        (with(&|config| config.ca_root = "/nowhere/root".into()), "root from /nowhere/root"),
        (with(&|config| config.ca_address = format!("http://{}", scene.address)), "must be https://"),
        (with(&|config| config.ca_address = "https://".into()), "is no address"),
        (with(&|config| config.ca_address = format!("https://{closed}")), "cannot be reached"),
        (
            with(&|config| config.ca_address = format!("https://127.0.0.1:{}", scene.address.port())),
            "reached",
        ),
    ] {
        let error = client.fetch(&identity).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn reads_leaf_intermediates_and_roots() {
    let ca = TestCa::new();
    let (one, two) = (ca.root_pem(), TestCa::new().root_pem());
    let count = |answer: &[&str]| {
        let answer: Vec<String> = answer.iter().map(|pem| (*pem).to_owned()).collect();
        split(&answer).map(|(chain, roots)| (chain.len(), roots.len())).map_err(|error| error.to_string())
    };
    assert_eq!(count(&[&one, &two]), Ok((1, 1)));
    assert_eq!(count(&[&one, &two, &one]), Ok((2, 1)));
    assert_eq!(count(&[&one, &format!("{one}{two}")]), Ok((1, 2)));
    assert!(count(&[]).unwrap_err().contains("0 certificates"));
    assert!(count(&[&one]).unwrap_err().contains("1 certificates"));
    assert!(
        count(&[&one, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"])
            .unwrap_err()
            .contains("parsed")
    );
}
