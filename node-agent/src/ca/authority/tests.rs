//! Secrets of every layout that Istio's documents describe, and broken ones.

use rcgen::{CertifiedIssuer, PKCS_RSA_SHA256};

use super::*;

fn now() -> SystemTime {
    SystemTime::now()
}

type Signer = CertifiedIssuer<'static, KeyPair>;

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn root(name: &str) -> Signer {
    CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap()
}

fn below(name: &str, signer: &Signer) -> Signer {
    CertifiedIssuer::signed_by(ca_params(name), KeyPair::generate().unwrap(), signer).unwrap()
}

fn material(signing: &Signer, chain: &[&Signer], roots: &[&Signer]) -> Material {
    Material {
        ca_cert: signing.pem(),
        ca_key: signing.key().serialize_pem(),
        cert_chain: chain.iter().map(|signer| signer.pem()).collect(),
        root_cert: roots.iter().map(|signer| signer.pem()).collect(),
    }
}

#[test]
fn our_own_root_is_an_authority() {
    let made = Material::generate("cluster.local", now()).unwrap();
    let authority = Authority::new(&made, now()).unwrap();
    assert_eq!(authority.roots(), made.root_cert);
    assert!(authority.intermediates().is_empty());
    let days = authority.not_after().duration_since(now()).unwrap().as_secs() / 86400;
    assert!((3649..=3650).contains(&days), "{days} days");
    let text = format!("{made:?} {authority:?}");
    assert!(!text.contains("PRIVATE"), "a key is printed: {text}");
}

#[test]
fn istio_layouts_are_accepted() {
    let (root, old_root) = (root("root"), root("old root"));
    let middle = below("middle", &root);
    let signing = below("signing", &middle);
    for (what, material, expect) in [
        ("root signs", material(&root, &[], &[&root]), vec![]),
        ("chain repeats the root", material(&root, &[&root], &[&root]), vec![]),
        ("one below, no chain", material(&middle, &[], &[&root]), vec![&middle]),
        ("as Istio's tool writes it", material(&middle, &[&middle, &root], &[&root]), vec![&middle]),
        ("two below", material(&signing, &[&middle], &[&root]), vec![&signing, &middle]),
        ("any order", material(&signing, &[&root, &middle, &signing], &[&root]), vec![&signing, &middle]),
        ("two roots", material(&middle, &[], &[&old_root, &root]), vec![&middle]),
    ] {
        let authority = Authority::new(&material, now()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let expect: Vec<_> = expect.into_iter().map(|signer| signer.pem()).collect();
        assert_eq!(authority.intermediates(), expect, "{what}");
        assert_eq!(authority.roots(), material.root_cert, "{what}");
    }
}

#[test]
fn an_rsa_root_of_the_users_signs_too() {
    let key = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
    let root = CertifiedIssuer::self_signed(ca_params("rsa"), key).unwrap();
    assert!(Authority::new(&material(&root, &[], &[&root]), now()).is_ok());
}

#[test]
fn broken_secrets_are_told_apart() {
    let (root, other) = (root("root"), root("other"));
    let middle = below("middle", &root);
    let signing = below("signing", &middle);
    let good = material(&root, &[], &[&root]);
    let mut leaf = ca_params("leaf");
    leaf.is_ca = IsCa::NoCa;
    let leaf = CertifiedIssuer::signed_by(leaf, KeyPair::generate().unwrap(), &root).unwrap();
    let mut no_sign = ca_params("no sign");
    no_sign.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let no_sign = CertifiedIssuer::self_signed(no_sign, KeyPair::generate().unwrap()).unwrap();
    let mut expired = ca_params("expired");
    expired.not_after = rcgen::date_time_ymd(2001, 9, 9);
    let expired = CertifiedIssuer::self_signed(expired, KeyPair::generate().unwrap()).unwrap();
    let same_name = super::tests::root("root");
    for (what, material, expect) in [
        ("a leaf", material(&leaf, &[], &[&root]), "not a CA certificate"),
        ("may not sign", material(&no_sign, &[], &[&no_sign]), "not a CA certificate"),
        ("no path", material(&root, &[], &[&other]), "does not lead to"),
        ("gap in the chain", material(&signing, &[], &[&root]), "does not lead to"),
        ("root of the same name", material(&middle, &[], &[&same_name]), "does not lead to"),
        ("expired", material(&expired, &[], &[&expired]), "expired at 999993600"),
        ("other key", Material { ca_key: other.key().serialize_pem(), ..good.clone() }, "not the key of"),
        ("no key", Material { ca_key: String::new(), ..good.clone() }, "ca-key.pem is not"),
        ("certificate as key", Material { ca_key: root.pem(), ..good.clone() }, "ca-key.pem is not"),
        (
            "key as root",
            Material { root_cert: good.ca_key.clone(), ..good.clone() },
            "root-cert.pem does not",
        ),
        ("no certificate", Material { ca_cert: "x".into(), ..good.clone() }, "ca-cert.pem does not"),
        ("garbage chain", Material { cert_chain: "x".into(), ..good }, "cert-chain.pem does not"),
    ] {
        let error = Authority::new(&material, now()).unwrap_err().to_string();
        assert!(error.contains(expect), "{what}: {error}");
        assert!(!error.contains("PRIVATE"), "{error}");
    }
}

#[test]
fn a_candidate_says_where_its_key_leads_and_for_how_long() {
    let (other, root) = (root("other"), root("root"));
    let mut short = ca_params("signing");
    issue::set_validity(&mut short, now() - Duration::from_secs(60), now() + Duration::from_secs(3600));
    let signing = CertifiedIssuer::signed_by(short, KeyPair::generate().unwrap(), &root).unwrap();
    let material = material(&signing, &[], &[&other, &root]);
    let candidate = Authority::new(&material, now()).unwrap().candidate(material.clone());
    let lf = |pem: String| pem.replace("\r\n", "\n");
    assert_eq!(candidate.material, material);
    assert_eq!(candidate.roots, [lf(other.pem()), lf(root.pem())]);
    assert_eq!(candidate.anchor, lf(root.pem()));
    let left = |at: SystemTime| at.duration_since(now() - Duration::from_secs(120)).unwrap().as_secs();
    assert!((58..=60).contains(&left(candidate.from)), "{}", left(candidate.from));
    assert!((3718..=3720).contains(&left(candidate.until)), "{}", left(candidate.until));
}
