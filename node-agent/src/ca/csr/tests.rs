//! Requests of every wrong kind, and bytes flipped at every place.

use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256};

use super::*;
use crate::ca::fakes::csr;

const PAYMENT: &str = "spiffe://cluster.local/ns/payments/sa/payment";

#[test]
fn a_request_of_the_right_kind_is_read() {
    let request = SigningRequest::from_pem(&csr(&PKCS_ECDSA_P256_SHA256, &[PAYMENT])).unwrap();
    assert_eq!(request.names, [format!("URI:{PAYMENT}")]);
}

#[test]
fn requests_of_other_kinds_are_not() {
    let good = csr(&PKCS_ECDSA_P256_SHA256, &[PAYMENT]);
    let mut der = pem::parse(&good).unwrap().into_contents();
    let print = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
    let certificate = print("CERTIFICATE", &der);
    let mut longer = der.clone();
    longer.push(0);
    *der.last_mut().unwrap() ^= 1;
    for (what, text, expect) in [
        ("empty", String::new(), InvalidCsr::Pem),
        ("no PEM", "hello".into(), InvalidCsr::Pem),
        ("cut off", good[..good.len() / 2].into(), InvalidCsr::Pem),
        ("another PEM", certificate, InvalidCsr::Pem),
        ("no DER", print("CERTIFICATE REQUEST", b"hello"), InvalidCsr::Der),
        ("more DER", print("CERTIFICATE REQUEST", &longer), InvalidCsr::Der),
        ("signature", print("CERTIFICATE REQUEST", &der), InvalidCsr::Signature),
        ("too long", good.clone() + &" ".repeat(MAX_CSR), InvalidCsr::TooLong(good.len() + MAX_CSR)),
        ("P-384", csr(&PKCS_ECDSA_P384_SHA384, &[PAYMENT]), InvalidCsr::KeyKind),
        ("Ed25519", csr(&PKCS_ED25519, &[PAYMENT]), InvalidCsr::KeyKind),
        ("RSA", csr(&PKCS_RSA_SHA256, &[PAYMENT]), InvalidCsr::KeyKind),
    ] {
        assert_eq!(SigningRequest::from_pem(&text).unwrap_err(), expect, "{what}");
    }
}

#[test]
fn names_are_the_callers_or_none() {
    let allowed: Identity = PAYMENT.parse().unwrap();
    let other = "spiffe://cluster.local/ns/payments/sa/account";
    for (names, good) in [
        (&[][..], true),
        (&[PAYMENT][..], true),
        (&[other][..], false),
        (&[PAYMENT, other][..], false),
        (&["spiffe://cluster.local/ns/payments/sa/payment/"][..], false),
    ] {
        let request = SigningRequest::from_pem(&csr(&PKCS_ECDSA_P256_SHA256, names)).unwrap();
        assert_eq!(request.check_names(&allowed).is_ok(), good, "{names:?}");
    }
    let mut params = rcgen::CertificateParams::new(vec!["example.com".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    let refused = SigningRequest::from_pem(&request).unwrap().check_names(&allowed).unwrap_err();
    assert!(refused.to_string().contains("example.com"), "{refused}");
}

#[test]
fn a_changed_byte_neither_panics_nor_changes_key_or_name() {
    let pem = csr(&PKCS_ECDSA_P256_SHA256, &[PAYMENT]);
    let honest = SigningRequest::from_pem(&pem).unwrap();
    let good = pem::parse(pem).unwrap().into_contents();
    let read =
        |bytes: &[u8]| SigningRequest::from_pem(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", bytes)));
    let mut refused = 0;
    for index in 0..good.len() {
        for change in [0x01, 0x20, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[index] ^= change;
            match read(&bytes) {
                // A few bits of the outer frame are neither signed nor looked at.
                Ok(request) => {
                    assert_eq!((&request.key, &request.names), (&honest.key, &honest.names), "{index}")
                }
                Err(_) => refused += 1,
            }
        }
        assert!(read(&good[..index]).is_err(), "cut at {index}");
    }
    assert!(refused > good.len() * 4 - 16, "{refused} of {} refused", good.len() * 4);
}
