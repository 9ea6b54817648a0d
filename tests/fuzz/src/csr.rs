//! A certificate signing request, as the certificate authority gets it. The bytes are PEM, or DER that is made PEM of.

use mesh_core::identity::Identity;
use node_agent::ca::csr::SigningRequest;
use rcgen::{CertificateParams, KeyPair, SanType};

/// A request that is taken names nothing but what its sender may have.
pub fn run(data: &[u8]) {
    let text = match data {
        [b'-', ..] => String::from_utf8_lossy(data).into_owned(),
        der => pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)),
    };
    let Ok(allowed) = ALLOWED.parse::<Identity>() else { return };
    if let Ok(request) = SigningRequest::from_pem(&text) {
        // Whatever it names, its signature is right: libFuzzer cannot make one, so it is a seed's or a cut of it.
        let _ = request.check_names(&allowed);
    }
}

const ALLOWED: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// Requests with our name, another's, and none.
pub fn seeds() -> Vec<Vec<u8>> {
    let names: [&[&str]; 3] = [&[ALLOWED], &[ALLOWED, "spiffe://cluster.local/ns/shop/sa/admin"], &[]];
    let mut seeds: Vec<Vec<u8>> = names.iter().filter_map(|names| request(names)).collect();
    seeds.extend(
        request(&[ALLOWED]).map(|der| pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)).into_bytes()),
    );
    seeds
}

fn request(names: &[&str]) -> Option<Vec<u8>> {
    let key = KeyPair::generate().ok()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| Some(SanType::URI((*name).try_into().ok()?))).collect::<Option<_>>()?;
    Some(params.serialize_request(&key).ok()?.der().to_vec())
}
