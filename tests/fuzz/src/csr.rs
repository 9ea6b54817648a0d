//! A certificate signing request, as the certificate authority gets it. The bytes are PEM, or DER that is made PEM of, or
//! after a zero byte the names of one that is made and signed here, a line each.

use std::sync::OnceLock;

use mesh_core::identity::Identity;
use node_agent::ca::csr::SigningRequest;
use rcgen::{CertificateParams, KeyPair, SanType};

/// A request that is taken names nothing but what its sender may have.
pub fn run(data: &[u8]) {
    let text = match data {
        [0, names @ ..] => return named(names),
        [b'-', ..] => String::from_utf8_lossy(data).into_owned(),
        der => pem_of(der),
    };
    let Ok(allowed) = ALLOWED.parse::<Identity>() else { return };
    if let Ok(request) = SigningRequest::from_pem(&text) {
        // Whatever it names, its signature is right: libFuzzer cannot make one, so it is a seed's or a cut of it.
        let _ = request.check_names(&allowed);
    }
}

/// libFuzzer cannot sign what it makes up.
fn named(names: &[u8]) {
    static KEY: OnceLock<Option<KeyPair>> = OnceLock::new();
    let names: Vec<&str> = str::from_utf8(names).map(|names| names.lines().collect()).unwrap_or_default();
    let Some(key) = KEY.get_or_init(|| KeyPair::generate().ok()) else { return };
    let (Some(der), Ok(allowed)) = (request(&names, key), ALLOWED.parse::<Identity>()) else { return };
    let checked = SigningRequest::from_pem(&pem_of(&der)).and_then(|request| request.check_names(&allowed));
    assert_eq!(checked.is_ok(), names.iter().all(|name| *name == ALLOWED), "{names:?}: {checked:?}");
}

fn pem_of(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der))
}

const ALLOWED: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// Requests with our name, another's, and none.
pub fn seeds() -> Vec<Vec<u8>> {
    let names: [&[&str]; 3] = [&[ALLOWED], &[ALLOWED, "spiffe://cluster.local/ns/shop/sa/admin"], &[]];
    let Ok(key) = KeyPair::generate() else { return Vec::new() };
    let signed: Vec<_> = names.iter().filter_map(|names| request(names, &key)).collect();
    let mut seeds: Vec<_> = names.iter().map(|names| [b"\0", names.join("\n").as_bytes()].concat()).collect();
    // One more than is told in a refusal.
    seeds.push(format!("\0{}spiffe://other", format!("{ALLOWED}\n").repeat(8)).into_bytes());
    seeds.extend(signed.first().map(|der| pem_of(der).into_bytes()));
    seeds.extend(signed);
    seeds
}

fn request(names: &[&str], key: &KeyPair) -> Option<Vec<u8>> {
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| Some(SanType::URI((*name).try_into().ok()?))).collect::<Option<_>>()?;
    Some(params.serialize_request(key).ok()?.der().to_vec())
}
