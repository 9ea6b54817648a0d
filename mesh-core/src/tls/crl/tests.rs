use rustls::pki_types::CertificateDer;

use super::*;
use crate::test_ca::TestCa;

const PAYMENTS: &str = "spiffe://cluster.local/ns/payments/sa/payment-service";

/// A part of DER.
fn part(tag: u8, contents: &[&[u8]]) -> Vec<u8> {
    let content = contents.concat();
    let length = u8::try_from(content.len()).unwrap();
    let mut part = if length < 0x80 { vec![tag, length] } else { vec![tag, 0x81, length] };
    part.extend(content);
    part
}

/// A list made by hand, signed by nobody: `entries` and `extensions` as they are.
fn by_hand(entries: &[u8], extensions: &[u8]) -> Vec<u8> {
    let algorithm = part(0x30, &[&[0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]]);
    let time = part(0x17, &[b"240101000000Z"]);
    let name = part(0x30, &[]);
    let body = part(0x30, &[&[2, 1, 1], &algorithm, &name, &time, &time, entries, extensions]);
    part(0x30, &[&body, &algorithm, &part(0x03, &[&[0]])])
}

fn entries(entries: &[&[u8]]) -> Vec<u8> {
    part(0x30, entries)
}

fn extension(oid: u8, value: &[u8]) -> Vec<u8> {
    let extension = part(0x30, &[&[0x06, 3, 0x55, 0x1d, oid], &[1, 1, 0xff], &part(0x04, &[value])]);
    part(0xa0, &[&part(0x30, &[&extension])])
}

#[test]
fn reads_what_is_whole_and_refuses_the_rest() {
    let ca = TestCa::new();
    let (_, leaf) = ca.leaf(PAYMENTS).parts();
    let der = ca.revoke(&[&leaf]);
    let pem = pem::encode(&pem::Pem::new("X509 CRL", der.clone()));
    for (file, lists, revoked) in [
        (pem.clone().into_bytes(), 1, 1),
        (format!("# ours\n{pem}\n{}{}", ca.root_pem(), ca.revoke_pem(&[])).into_bytes(), 2, 1),
        (der.clone(), 1, 1),
        (by_hand(&[], &[]), 1, 0),
        // The issuing distribution point of a list of one kind of certificates; a list of it is still the issuer's word.
        (by_hand(&[], &extension(28, &[0x30, 3, 0x81, 1, 0xff])), 1, 0),
    ] {
        let parsed = Lists::parse(&file).unwrap();
        let total: usize = parsed.facts().map(|facts| facts.revoked).sum();
        assert_eq!((parsed.facts().count(), total), (lists, revoked));
    }

    let time = part(0x17, &[b"240101000000Z"]);
    let cut_off = &pem[..pem.len() - 10];
    let damaged = format!("{pem}-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
    for (file, expected) in [
        (b"".to_vec(), "holds no certificate revocation list"),
        (b"no list".to_vec(), "holds no certificate revocation list"),
        (ca.root_pem().into_bytes(), "holds no certificate revocation list"),
        (cut_off.as_bytes().to_vec(), "its PEM is damaged"),
        (format!("{pem}{cut_off}").into_bytes(), "its PEM is damaged"),
        (damaged.into_bytes(), "list 2 cannot be read"),
        (der[..der.len() - 1].to_vec(), "list 1 cannot be read"),
        ([&der[..], &[0]].concat(), "list 1 cannot be read"),
        (ca.root().to_vec(), "list 1 cannot be read"),
        // An entry that is none must not make an empty list of all.
        (by_hand(&entries(&[&[2, 1, 5]]), &[]), "list 1 cannot be read"),
        (by_hand(&entries(&[&part(0x30, &[&[4, 1, 5], &time])]), &[]), "list 1 cannot be read"),
        (by_hand(&[], &extension(27, &[2, 1, 1])), "list 1 is a delta list"),
        (by_hand(&[], &extension(28, &[0x30, 3, 0x84, 1, 0xff])), "list 1 is an indirect list"),
    ] {
        let error = Lists::parse(&file).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

/// Whether `lists` revoke the chain, which is verified against the root of `ca`.
fn serial(lists: &[Vec<u8>], chain: &[&CertificateDer<'static>], ca: &TestCa) -> Option<String> {
    let pem: String =
        lists.iter().map(|list| pem::encode(&pem::Pem::new("X509 CRL", list.clone()))).collect();
    let mut roots = RootCertStore::empty();
    roots.add(ca.root()).unwrap();
    let lists = Lists::parse(pem.as_bytes()).unwrap();
    lists.revoked(chain.iter().map(|certificate| certificate.as_ref()), &roots).map(|revoked| revoked.serial)
}

#[test]
fn revokes_what_the_issuer_itself_has_listed() {
    let root = TestCa::new();
    let (upper, upper_own) = root.intermediate("upper");
    let (lower, lower_own) = upper.intermediate("lower");
    let (_, leaf) = lower.leaf(PAYMENTS).parts();
    let (_, other) = lower.leaf(PAYMENTS).parts();
    let chain = [&leaf, &lower_own, &upper_own];
    let none = lower.revoke(&[]);
    let hex = |certificate: &CertificateDer<'_>| {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
        Some(parsed.raw_serial_as_string().replace(':', "").trim_start_matches("00").to_owned())
    };

    assert_eq!(serial(std::slice::from_ref(&none), &chain, &root), None);
    assert_eq!(serial(&[lower.revoke(&[&other])], &chain, &root), None);
    assert_eq!(serial(&[none.clone(), lower.revoke(&[&other, &leaf])], &chain, &root), hex(&leaf));
    assert_eq!(serial(&[upper.revoke(&[&lower_own])], &chain, &root), hex(&lower_own));
    assert_eq!(serial(&[none, root.revoke(&[&upper_own])], &chain, &root), hex(&upper_own));
    // Not its issuer's word.
    assert_eq!(serial(&[root.revoke(&[&leaf]), upper.revoke(&[&leaf])], &chain, &root), None);
    // Of the same name, as a root's successor may be, and signed by another key.
    let (namesake, _) = upper.intermediate("lower");
    assert_eq!(serial(&[namesake.revoke(&[&leaf])], &chain, &root), None);
    assert_eq!(serial(&[namesake.revoke(&[&leaf]), lower.revoke(&[&leaf])], &chain, &root), hex(&leaf));
    let second = TestCa::new();
    let (_, direct) = root.leaf(PAYMENTS).parts();
    assert_eq!(serial(&[second.revoke(&[&direct])], &[&direct], &root), None);
    assert_eq!(serial(&[root.revoke(&[&direct])], &[&direct], &root), hex(&direct));
    // Junk beside the path hides nothing.
    let junk = CertificateDer::from(vec![0x30, 0x84, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(
        serial(&[upper.revoke(&[&lower_own])], &[&leaf, &junk, &lower_own, &upper_own], &root),
        hex(&lower_own)
    );
}
