//! A peer's certificate, and the SPIFFE names in it. The bytes are DER, or after a zero byte one name, or after a one
//! what is changed in a certificate that our root has signed: by turns a place (two bytes) and the byte there.

use std::sync::OnceLock;
use std::time::Duration;

use mesh_core::identity::Identity;
use mesh_core::tls::verify;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};

/// A name that is taken is written as it came, and no certificate without our root's signature is believed, not even one
/// that differs in one bit from one with it.
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
    if let [1, changes @ ..] = data {
        return changed(changes);
    }
    let certificate = CertificateDer::from(data);
    if let Ok(identity) = verify::identity(&certificate) {
        assert_eq!(identity.to_string().parse::<Identity>().as_ref(), Ok(&identity));
    }
    let believed = verify::chain(&[certificate], &RootCertStore::empty(), now());
    assert!(believed.is_err(), "a certificate was believed without any root");
}

fn changed(changes: &[u8]) {
    let Some((signed, roots)) = signed() else { return };
    let mut der = signed.to_vec();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % der.len();
        der[at] = change[2];
    }
    let is_ours = der == **signed;
    let believed = verify::chain(&[CertificateDer::from(der)], roots, now());
    assert_eq!(believed.is_ok(), is_ours, "{believed:?}");
}

/// A leaf and the root that signed it, made once.
fn signed() -> Option<&'static (CertificateDer<'static>, RootCertStore)> {
    static SIGNED: OnceLock<Option<(CertificateDer<'static>, RootCertStore)>> = OnceLock::new();
    let make = || {
        let (root_key, leaf_key) = (KeyPair::generate().ok()?, KeyPair::generate().ok()?);
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let mut roots = RootCertStore::empty();
        roots.add(root.self_signed(&root_key).ok()?.der().clone()).ok()?;
        let issuer = Issuer::new(root, root_key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/shop/sa/web".try_into().ok()?)];
        Some((leaf.signed_by(&leaf_key, &issuer).ok()?.der().clone(), roots))
    };
    SIGNED.get_or_init(make).as_ref()
}

/// Within the life that rcgen gives by default.
fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000))
}

/// Names of every kind, and certificates with one, several and odd ones.
pub fn seeds() -> Vec<Vec<u8>> {
    let names = [
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://Cluster.local/ns/shop/sa/../sa/web?x#y",
        "https://cluster.local/ns/shop/sa/web",
    ];
    let mut seeds: Vec<Vec<u8>> = names.map(|name| [b"\0", name.as_bytes()].concat()).into();
    seeds.extend([vec![1], vec![1, 0, 40, 7], vec![1, 1, 0, 0, 0, 60, 9]]);
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
