//! What is in a certificate, read back with another library than wrote it.

use rcgen::PKCS_ECDSA_P256_SHA256;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;
use crate::ca::authority::Material;
use crate::ca::csr::SigningRequest;
use crate::ca::fakes::csr;

const PAYMENT: &str = "spiffe://cluster.local/ns/payments/sa/payment";
const DAY: Duration = Duration::from_secs(86400);

fn authority(now: SystemTime) -> Authority {
    Authority::new(&Material::generate("cluster.local", now).unwrap(), now).unwrap()
}

fn issue(authority: &Authority, validity: Duration, now: SystemTime) -> Result<Issued, IssueError> {
    let request = SigningRequest::from_pem(&csr(&PKCS_ECDSA_P256_SHA256, &[])).unwrap();
    authority.issue(&request.key, &PAYMENT.parse().unwrap(), validity, now)
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

#[test]
fn a_workload_certificate_says_what_it_must_and_no_more() {
    let now = SystemTime::now();
    let issued = issue(&authority(now), Duration::ZERO, now).unwrap();
    let [leaf, root] = &issued.cert_chain[..] else { panic!("leaf and root: {issued:?}") };
    let (leaf, root) = (pem::parse(leaf).unwrap(), pem::parse(root).unwrap());
    let (_, leaf) = X509Certificate::from_der(leaf.contents()).unwrap();
    let (_, root) = X509Certificate::from_der(root.contents()).unwrap();
    leaf.verify_signature(Some(root.public_key())).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "RFC 5280 4.2.1.6: with an empty subject");
    assert_eq!(names.value.general_names, [GeneralName::URI(PAYMENT)]);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any && usage.other.is_empty());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    assert!(!leaf.is_ca() && leaf.basic_constraints().unwrap().is_some());
    assert_eq!(leaf.raw_serial().len(), 16);
    assert_ne!(leaf.raw_serial(), root.raw_serial());
    assert_eq!(leaf.validity().not_before.timestamp(), seconds(now - Duration::from_secs(300)));
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(now + DAY));
}

#[test]
fn validity_is_bounded_by_a_day_and_by_the_issuer() {
    let start = SystemTime::now();
    let authority = authority(start);
    let end = authority.not_after();
    let hour = Duration::from_secs(3600);
    for (now, asked, expect) in [
        (start, Duration::ZERO, start + DAY),
        (start, hour, start + hour),
        (start, DAY * 365, start + DAY),
        (start, Duration::from_secs(u64::MAX), start + DAY),
        (end - hour, DAY, end),
    ] {
        assert_eq!(issue(&authority, asked, now).unwrap().not_after, expect, "{asked:?}");
    }
    assert!(matches!(issue(&authority, hour, end), Err(IssueError::Expired)));
    assert!(matches!(issue(&authority, hour, end + DAY), Err(IssueError::Expired)));
}

#[test]
fn serials_differ() {
    let mut seen: Vec<_> = (0..64).map(|_| serial().to_bytes()).collect();
    assert!(seen.iter().all(|serial| serial.len() == 16 && serial[0] & 0x80 == 0 && serial[0] != 0));
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 64);
}

#[test]
fn the_serving_certificate_is_verified_by_its_names() {
    let now = SystemTime::now();
    let authority = authority(now);
    let serving = authority.serving(&["ambit-ca.ambit-system.svc".into(), "localhost".into()], now).unwrap();
    assert_eq!(serving.renew_at, now + DAY / 2);
    let mut roots = RootCertStore::empty();
    let root = pem::parse(authority.roots()).unwrap().into_contents();
    roots.add(CertificateDer::from(root)).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let leaf = CertificateDer::from(serving.chain[0].clone());
    for (name, good) in [("ambit-ca.ambit-system.svc", true), ("localhost", true), ("other.svc", false)] {
        let name = ServerName::try_from(name).unwrap();
        let verified = verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::now());
        assert_eq!(verified.is_ok(), good, "{name:?}: {verified:?}");
    }
}

/// Clocks of nodes differ: five minutes either way keep nobody from believing a new certificate, nor its holder from
/// taking it, and one whose clock is further behind is told so.
#[test]
fn clocks_may_be_five_minutes_off() {
    let now = SystemTime::now();
    let authority = authority(now);
    let issued = issue(&authority, DAY, now).unwrap();
    let der = |pem: &String| CertificateDer::from(pem::parse(pem).unwrap().into_contents());
    let chain = [der(&issued.cert_chain[0])];
    let mut roots = RootCertStore::empty();
    roots.add(der(&authority.roots())).unwrap();
    let at = |time: SystemTime| UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap());
    let believed = |time| mesh_core::tls::verify::chain(&chain, &roots, at(time));
    let five = Duration::from_secs(300);
    for time in [now - five, now, now + five, now + DAY - five] {
        assert_eq!(believed(time), Ok(()));
    }
    let behind = believed(now - five - Duration::from_secs(2)).unwrap_err();
    assert!(behind.to_string().contains("compare the clocks"), "{behind}");
}

#[test]
fn times_that_nothing_could_be_signed_with_are_refused() {
    for (read, text, expect) in [
        (lifetime as fn(&str) -> Result<Duration, String>, "0", None),
        (lifetime, "4s", None),
        (lifetime, "5s", Some(5)),
        (lifetime, "315360000", Some(315_360_000)),
        (lifetime, "18446744073709551615", None),
        (skew, "0", Some(0)),
        (skew, "86400s", Some(86_400)),
        (skew, "86401", None),
        (skew, "18446744073709551615s", None),
    ] {
        assert_eq!(read(text).ok(), expect.map(Duration::from_secs), "{text}");
    }
}
