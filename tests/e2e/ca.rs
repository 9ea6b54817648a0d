//! Who gets which certificate: real tokens of pods, presented to the running CA.

use std::time::Duration;

use mesh_core::proto::ca::IstioCertificateRequest;
use mesh_core::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_tests::Lab;
use mesh_tests::cluster::Kind;
use mesh_tests::workload::{self, Workload};
use prost_types::value::Kind as ValueKind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Code, Request};

use crate::shared::scenario;

pub(crate) const AUDIENCE: Option<&str> = Some("istio-ca");

/// Ask the CA's Service from node 1; how many certificates came, or the refusal.
pub(crate) fn ask(
    lab: &Lab,
    token: &str,
    identity: &str,
    impersonate: bool,
) -> anyhow::Result<Result<usize, Code>> {
    let address = lab.service_address("ambit-system", "ambit-ca")?;
    let root: k8s_openapi::api::core::v1::ConfigMap =
        lab.cluster().get(Kind::ConfigMap, "ambit-system", "ambit-ca-root-cert")?;
    let root = root.data.unwrap_or_default().remove("root-cert.pem").unwrap_or_default();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root))
        .domain_name("ambit-ca.ambit-system.svc");
    let endpoint = Endpoint::from_shared(format!("https://{address}:15012"))?
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(10))
        .tls_config(tls)?;
    let message = request(token, identity, impersonate)?;
    lab.node(1).netns().run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client = IstioCertificateServiceClient::new(endpoint.connect().await?);
            match client.create_certificate(message).await {
                Ok(response) => Ok(Ok(response.into_inner().cert_chain.len())),
                Err(status) => Ok(Err(status.code())),
            }
        })
    })
}

fn request(
    token: &str,
    identity: &str,
    impersonate: bool,
) -> anyhow::Result<Request<IstioCertificateRequest>> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = CertificateParams::default();
    parameters.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let value = Value { kind: Some(ValueKind::StringValue(identity.to_owned())) };
    let fields = [("ImpersonatedIdentity".to_owned(), value)].into_iter().collect();
    let mut message = Request::new(IstioCertificateRequest {
        csr: parameters.serialize_request(&key)?.pem()?,
        validity_duration: 3600,
        metadata: impersonate.then_some(Struct { fields }),
    });
    if !token.is_empty() {
        message.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    }
    Ok(message)
}

pub(crate) fn token(
    lab: &Lab,
    namespace: &str,
    account: &str,
    pod: &str,
    audience: Option<&str>,
) -> anyhow::Result<String> {
    lab.cluster().token(namespace, account, pod, audience, Duration::from_secs(600))
}

pub(crate) fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/mesh/sa/{account}")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_gets_its_own_identity_and_no_other() {
    scenario(|lab| {
        let own = token(lab, "mesh", "client", "client", AUDIENCE)?;
        let issued = ask(lab, &own, &spiffe("client"), false)?;
        assert!(issued.is_ok_and(|certificates| certificates >= 2), "{issued:?}");
        // What its request says besides, and what it asks to be instead.
        for (impersonate, code) in [(false, Code::InvalidArgument), (true, Code::PermissionDenied)] {
            let other = ask(lab, &own, &spiffe("web"), impersonate)?;
            assert_eq!(other, Err(code), "a pod asked for another's identity");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn tokens_that_prove_nothing_get_nothing() {
    scenario(|lab| {
        let for_api = token(lab, "mesh", "client", "client", None)?;
        for (what, token) in [("none", ""), ("nonsense", "x.y.z"), ("of another audience", for_api.as_str())]
        {
            let answer = ask(lab, token, &spiffe("client"), false)?;
            assert_eq!(answer, Err(Code::Unauthenticated), "a token that is {what}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn ztunnel_gets_the_identities_of_live_pods_of_its_own_node() {
    scenario(|lab| {
        workload::service_account(lab, "mesh", "elsewhere")?;
        Workload::new("mesh", "elsewhere").service_account("elsewhere").on_node(2).start(lab)?;
        let of_node =
            |node: u8| token(lab, "ambit-system", "ztunnel", &lab.daemon("ztunnel", node).name()?, AUDIENCE);
        let (first, second) = (of_node(1)?, of_node(2)?);
        for (what, token, identity, expect) in [
            ("a pod of its node", &first, spiffe("client"), None),
            ("a pod of another node", &first, spiffe("elsewhere"), Some(Code::PermissionDenied)),
            ("that pod's own node", &second, spiffe("elsewhere"), None),
            ("nobody", &first, spiffe("nobody"), Some(Code::PermissionDenied)),
            (
                "another trust domain",
                &first,
                "spiffe://elsewhere.local/ns/mesh/sa/client".to_owned(),
                Some(Code::PermissionDenied),
            ),
        ] {
            let answer = ask(lab, token, &identity, true)?;
            assert_eq!(answer.err(), expect, "{what}: {identity}");
        }
        lab.kubectl(["delete", "-n", "mesh", "pod", "elsewhere", "--wait"])?;
        let gone = ask(lab, &second, &spiffe("elsewhere"), true)?;
        assert_eq!(gone, Err(Code::PermissionDenied), "the identity of a pod that is gone");
        Ok(())
    });
}
