//! A peer's certificate, and the SPIFFE names in it. The bytes are DER, or after a zero byte one name.

use std::time::Duration;

use mesh_core::identity::Identity;
use mesh_core::tls::verify;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};

/// A name that is taken is written as it came, and no certificate without our root's signature is believed.
pub fn run(data: &[u8]) {
    if let [0, name @ ..] = data {
        let Ok(name) = str::from_utf8(name) else { return };
        if let Ok(identity) = name.parse::<Identity>() {
            assert_eq!(identity.to_string(), name);
            let parts = [identity.trust_domain().as_str(), identity.namespace(), identity.service_account()];
            assert!(parts.iter().all(|part| !part.is_empty() && !part.contains(['/', '%', '\0', ':', '@'])));
        }
        return;
    }
    let certificate = CertificateDer::from(data);
    if let Ok(identity) = verify::identity(&certificate) {
        assert_eq!(identity.to_string().parse::<Identity>().as_ref(), Ok(&identity));
    }
    let now = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
    let believed = verify::chain(&[certificate], &RootCertStore::empty(), now);
    assert!(believed.is_err(), "a certificate was believed without any root");
}

/// Names of every kind, and certificates with one, several and odd ones.
pub fn seeds() -> Vec<Vec<u8>> {
    let names = [
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://Cluster.local/ns/shop/sa/../sa/web?x#y",
        "https://cluster.local/ns/shop/sa/web",
    ];
    let mut seeds: Vec<Vec<u8>> = names.map(|name| [b"\0", name.as_bytes()].concat()).into();
    for count in 1..=names.len() {
        seeds.extend(certificate(&names[..count]));
    }
    seeds
}

fn certificate(names: &[&str]) -> Option<Vec<u8>> {
    let key = KeyPair::generate().ok()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| Some(SanType::URI((*name).try_into().ok()?))).collect::<Option<_>>()?;
    Some(params.self_signed(&key).ok()?.der().to_vec())
}
