//! A certificate authority for tests: right certificates, and wrong ones in every way that matters.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::certs::{FetchCert, FetchError, WorkloadCert};
use crate::identity::Identity;

/// A root of its own, signing leaves directly or by intermediates. Panics where a product would return an error.
pub struct TestCa {
    root: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
    /// From the one that signs up to, without it, the root.
    intermediates: Vec<CertificateDer<'static>>,
    fetches: AtomicUsize,
}

/// A leaf to issue; starts right, valid from an hour ago for a day.
pub struct Leaf<'a> {
    ca: &'a TestCa,
    names: Vec<String>,
    from: i64,
    until: i64,
    roots: Option<Vec<CertificateDer<'static>>>,
}

impl TestCa {
    /// A new root that nobody else trusts.
    #[allow(clippy::new_without_default, reason = "a key is generated: no two are the same")]
    pub fn new() -> Self {
        let (params, key) = authority("test root");
        let root = params.self_signed(&key).unwrap();
        Self {
            root,
            issuer: Issuer::new(params, key),
            intermediates: Vec::new(),
            fetches: AtomicUsize::new(0),
        }
    }

    /// An authority below this one, and its certificate.
    pub fn intermediate(&self, name: &str) -> (Self, CertificateDer<'static>) {
        let (params, key) = authority(name);
        let own = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let intermediates = std::iter::once(own.clone()).chain(self.intermediates.iter().cloned()).collect();
        let (root, issuer) = (self.root.clone(), Issuer::new(params, key));
        (Self { root, issuer, intermediates, fetches: AtomicUsize::new(0) }, own)
    }

    /// A revocation list (DER) of these certificates, as if this authority had made them.
    pub fn revoke(&self, certificates: &[&CertificateDer<'_>]) -> Vec<u8> {
        let revoked = |certificate: &&CertificateDer<'_>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial(certificate)),
            revocation_time: from_now(-60),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: from_now(-60),
            next_update: from_now(86_400),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    /// The same as PEM, of the first certificate of each chain (PEM).
    pub fn revoke_pem(&self, chains: &[String]) -> String {
        let leaves: Vec<_> =
            chains.iter().map(|chain| CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()).collect();
        pem::encode(&pem::Pem::new("X509 CRL", self.revoke(&leaves.iter().collect::<Vec<_>>())))
    }

    /// PEM of the root.
    pub fn root_pem(&self) -> String {
        self.root.pem()
    }

    /// The root.
    pub fn root(&self) -> CertificateDer<'static> {
        self.root.der().clone()
    }

    /// A right certificate.
    pub fn issue(&self, identity: &str) -> WorkloadCert {
        self.leaf(identity).issue()
    }

    /// A certificate to be made wrong.
    pub fn leaf(&self, identity: &str) -> Leaf<'_> {
        Leaf { ca: self, names: vec![identity.to_owned()], from: -3600, until: 86_400, roots: None }
    }

    /// Signs a request (PEM) for whatever it names and returns PEM.
    pub fn sign(&self, request: &str) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(request).unwrap();
        request.params.not_before = from_now(-60);
        request.params.not_after = from_now(86_400);
        request.signed_by(&self.issuer).unwrap().pem()
    }

    /// Key and certificate (PEM) of a TLS server with a host name.
    pub fn host(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        (key.serialize_pem(), params.signed_by(&key, &self.issuer).unwrap().pem())
    }

    /// How often it was asked as a [`FetchCert`].
    pub fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

impl FetchCert for TestCa {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<WorkloadCert, FetchError>> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let cert = self.issue(&identity.to_string());
        async move { Ok(cert) }.boxed()
    }
}

impl Leaf<'_> {
    /// Validity in seconds from now.
    #[must_use]
    pub fn valid(mut self, from: i64, until: i64) -> Self {
        (self.from, self.until) = (from, until);
        self
    }

    /// Other URI names than the identity.
    #[must_use]
    pub fn names(mut self, names: &[&str]) -> Self {
        self.names = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// What the holder trusts, if not its own root.
    #[must_use]
    pub fn trusting(mut self, ca: &TestCa) -> Self {
        self.roots = Some(vec![ca.root()]);
        self
    }

    /// The certificate; its first name that is an identity is whose it is, else some unnamed one's.
    pub fn issue(self) -> WorkloadCert {
        let identity = self.names.iter().find_map(|name| name.parse::<Identity>().ok());
        let identity = identity.unwrap_or_else(|| "spiffe://cluster.local/ns/none/sa/none".parse().unwrap());
        let (key, leaf) = self.parts();
        let roots = self.roots.unwrap_or_else(|| vec![self.ca.root()]);
        let chain = std::iter::once(leaf).chain(self.ca.intermediates.iter().cloned()).collect();
        WorkloadCert::unverified(identity, key.into(), chain, roots).unwrap()
    }

    /// Key and certificate.
    pub fn parts(&self) -> (PrivatePkcs8KeyDer<'static>, CertificateDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = |name: &String| SanType::URI(Ia5String::try_from(name.clone()).unwrap());
        params.subject_alt_names = self.names.iter().map(uri).collect();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = from_now(self.from);
        params.not_after = from_now(self.until);
        let leaf = params.signed_by(&key, &self.ca.issuer).unwrap();
        (PrivatePkcs8KeyDer::from(key.serialize_der()), leaf.der().clone())
    }
}

fn authority(name: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params, KeyPair::generate().unwrap())
}

fn serial<'a>(certificate: &'a CertificateDer<'_>) -> &'a [u8] {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
    parsed.raw_serial()
}

fn from_now<T: From<std::time::SystemTime>>(seconds: i64) -> T {
    let now = std::time::SystemTime::now();
    let offset = Duration::from_secs(seconds.unsigned_abs());
    T::from(if seconds < 0 { now - offset } else { now + offset })
}
