use std::sync::atomic::{AtomicBool, AtomicUsize};

use futures_util::FutureExt;

use super::*;
use crate::test_ca::TestCa;

const PAYMENTS: &str = "spiffe://cluster.local/ns/payments/sa/payment-service";

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

/// A certificate authority that can be away, and gives certificates of any lifetime.
struct Fickle {
    ca: TestCa,
    away: AtomicBool,
    asked: AtomicUsize,
    lifetime: i64,
}

impl Fickle {
    fn new(lifetime: i64) -> Arc<Self> {
        let (away, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
        Arc::new(Self { ca: TestCa::new(), away, asked, lifetime })
    }

    async fn asked(&self, times: usize) {
        while self.asked.load(Ordering::SeqCst) < times {
            tokio::task::yield_now().await;
        }
    }
}

impl FetchCert for Fickle {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<WorkloadCert, FetchError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        async move {
            // So that those who ask at once really wait for one another.
            tokio::task::yield_now().await;
            if self.away.load(Ordering::SeqCst) {
                return Err(FetchError::Refused("away".into()));
            }
            Ok(self.ca.leaf(&identity.to_string()).valid(-1, self.lifetime).issue())
        }
        .boxed()
    }
}

#[tokio::test]
async fn fetches_once_for_all_who_wait() {
    let ca = Fickle::new(3600);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), Roots::default());
    let (one, other) = (id(PAYMENTS), id("spiffe://cluster.local/ns/payments/sa/other"));
    let all = futures_util::future::join_all((0..50).map(|_| certificates.get(&one))).await;
    let first = all[0].as_ref().unwrap().clone();
    assert!(all.iter().all(|cert| Arc::ptr_eq(cert.as_ref().unwrap(), &first)));
    assert_eq!(ca.asked.load(Ordering::SeqCst), 1);
    assert_eq!(certificates.get(&other).await.unwrap().identity(), &other);
    assert_eq!(ca.asked.load(Ordering::SeqCst), 2);
    let states: Vec<_> = certificates.status().into_iter().map(|status| status.state).collect();
    assert_eq!(states, ["available", "available"]);
}

#[tokio::test]
async fn says_at_once_why_there_is_none_and_tries_again() {
    let ca = Fickle::new(3600);
    ca.away.store(true, Ordering::SeqCst);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), Roots::default());
    let identity = id(PAYMENTS);
    for _ in 0..3 {
        let error = certificates.get(&identity).await.unwrap_err();
        assert!(matches!(error, CertError::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("away") && error.to_string().contains(PAYMENTS), "{error}");
    }
    let status = certificates.status();
    assert_eq!((status[0].state, status[0].error.is_some()), ("unavailable", true));
    ca.away.store(false, Ordering::SeqCst);
    ca.asked(2).await;
    while certificates.get(&identity).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn renews_before_the_end_and_keeps_the_old_one_meanwhile() {
    let ca = Fickle::new(3);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), Roots::default());
    let identity = id(PAYMENTS);
    let first = certificates.get(&identity).await.unwrap();
    ca.away.store(true, Ordering::SeqCst);
    ca.asked(2).await;
    // The renewal has failed or is about to; the first one is still good.
    assert_eq!(certificates.get(&identity).await.unwrap().serial(), first.serial());
    // Longer than the half of its life that was left it goes on, and tells of its trouble.
    loop {
        let health = certificates.health(SystemTime::now());
        if health.reached.is_some_and(|percent| percent <= 25) {
            assert_eq!((health.fresh, health.failing, health.soonest), (0, 1, Some(first.not_after())));
            assert!(health.failures > 0);
            let late = certificates.late(SystemTime::now());
            assert!(late[0].percent <= 25 && late[0].error.contains("away"), "{late:?}");
            assert_eq!((&late[0].identity, late[0].until), (&identity, first.not_after()));
            break;
        }
        assert!(SystemTime::now() < first.not_after());
        tokio::task::yield_now().await;
    }
    assert_eq!(certificates.status()[0].state, "renewal failing");
    let expired = loop {
        let asked = SystemTime::now();
        match certificates.get(&identity).await {
            Ok(cert) => assert!(asked <= cert.not_after()),
            Err(error) => break error,
        }
        tokio::task::yield_now().await;
    };
    assert!(matches!(expired, CertError::Expired { .. }), "{expired}");
    ca.away.store(false, Ordering::SeqCst);
    let renewed = loop {
        if let Ok(cert) = certificates.get(&identity).await {
            break cert;
        }
        tokio::task::yield_now().await;
    };
    assert_ne!(renewed.serial(), first.serial());
    let health = certificates.health(SystemTime::now());
    assert_eq!((health.fresh, health.failing, health.reached), (1, 0, None));
    assert_eq!(certificates.late(SystemTime::now()), []);
}

/// Of either side, with a peer whose certificate is of that authority.
async fn believes(cert: &WorkloadCert, peers: &TestCa, own: &TestCa) -> (bool, bool) {
    let peer = peers.leaf(PAYMENTS).trusting(own).issue();
    let expected = [id(PAYMENTS)];
    let (near, far) = tokio::io::duplex(65_536);
    let as_client = tokio::join!(
        crate::tls::client::connect(near, cert, &expected),
        crate::tls::server::accept(far, &peer)
    );
    let (near, far) = tokio::io::duplex(65_536);
    let as_server = tokio::join!(
        crate::tls::client::connect(near, &peer, &expected),
        crate::tls::server::accept(far, cert)
    );
    (as_client.0.is_ok(), as_server.1.is_ok())
}

#[tokio::test]
async fn the_roots_of_a_file_are_trusted_in_the_next_handshake() {
    let (ca, other) = (Fickle::new(3600), TestCa::new());
    let roots = Roots::of(vec![ca.ca.root()]);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), roots.clone());
    let identity = id(PAYMENTS);
    let now = async |trusted: &[&TestCa]| loop {
        let cert = certificates.get(&identity).await.unwrap();
        if trusted.iter().map(|ca| ca.root()).eq(cert.roots().iter().cloned()) {
            return cert;
        }
        tokio::task::yield_now().await;
    };
    let first = now(&[&ca.ca]).await;
    assert_eq!(believes(&first, &ca.ca, &ca.ca).await, (true, true));
    assert_eq!(believes(&first, &other, &ca.ca).await, (false, false));
    roots.replace(vec![ca.ca.root(), other.root()]);
    let both = now(&[&ca.ca, &other]).await;
    assert_eq!(believes(&both, &other, &ca.ca).await, (true, true));
    assert_eq!(believes(&both, &ca.ca, &ca.ca).await, (true, true));
    assert_eq!(both.serial(), first.serial(), "there is no need for another certificate");
    roots.replace(vec![ca.ca.root()]);
    let back = now(&[&ca.ca]).await;
    assert_eq!(believes(&back, &other, &ca.ca).await, (false, false));
    assert_eq!(ca.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_certificate_whose_root_is_trusted_no_more_is_renewed_at_once() {
    let (ca, other) = (Fickle::new(3600), TestCa::new());
    let roots = Roots::of(vec![ca.ca.root()]);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), roots.clone());
    certificates.get(&id(PAYMENTS)).await.unwrap();
    roots.replace(vec![other.root()]);
    ca.asked(2).await;
    // It is still what there is, and is asked for again and again.
    ca.asked(3).await;
    let cert = certificates.get(&id(PAYMENTS)).await.unwrap();
    assert_eq!(cert.roots(), [other.root()]);
    roots.replace(vec![other.root(), ca.ca.root()]);
    while certificates.get(&id(PAYMENTS)).await.unwrap().roots().len() != 2 {
        tokio::task::yield_now().await;
    }
}

/// The roots that it came with may be those that the file took away.
#[tokio::test]
async fn roots_that_cannot_be_used_leave_nobody_trusted() {
    let ca = Fickle::new(3600);
    let roots = Roots::of(vec![ca.ca.root()]);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), roots.clone());
    certificates.get(&id(PAYMENTS)).await.unwrap();
    roots.replace(vec![vec![1, 2, 3].into()]);
    while certificates.get(&id(PAYMENTS)).await.is_ok() {
        tokio::task::yield_now().await;
    }
    roots.replace(vec![ca.ca.root()]);
    while certificates.get(&id(PAYMENTS)).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn forgets() {
    let ca = Fickle::new(3600);
    let certificates = Certificates::new(ca.clone(), Revocations::default(), Roots::default());
    let identity = id(PAYMENTS);
    certificates.get(&identity).await.unwrap();
    certificates.forget(&identity);
    assert!(certificates.status().is_empty());
    certificates.prefetch(&identity);
    ca.asked(2).await;

    // Who waits for one that is forgotten is told.
    ca.away.store(true, Ordering::SeqCst);
    let other = id("spiffe://cluster.local/ns/payments/sa/other");
    let waiting = certificates.get(&other);
    tokio::pin!(waiting);
    assert!(futures_util::poll!(&mut waiting).is_pending());
    certificates.forget(&other);
    assert!(matches!(waiting.await, Err(CertError::Forgotten(_))));
}

#[test]
fn takes_only_what_peers_will_take() {
    let (ca, other) = (TestCa::new(), TestCa::new());
    let key = || rcgen::KeyPair::generate().unwrap();
    let parts = |names: &str, ca: &TestCa| ca.leaf(names).parts();
    let identity = || id(PAYMENTS);
    let (right_key, right) = parts(PAYMENTS, &ca);
    let new = |key: rustls::pki_types::PrivateKeyDer<'static>, chain, roots| {
        WorkloadCert::new(identity(), key, chain, roots)
    };
    let good = new(right_key.clone_key().into(), vec![right.clone()], vec![ca.root()]).unwrap();
    assert!(good.chain_pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert_eq!(good.roots_pem().trim(), ca.root_pem().replace("\r\n", "\n").trim());
    assert!(good.not_before() < SystemTime::now() && SystemTime::now() < good.not_after());
    let (wrong_key, wrong) = parts("spiffe://cluster.local/ns/payments/sa/other", &ca);
    for (key, chain, roots, expected) in [
        (right_key.clone_key(), vec![right.clone()], vec![], "no root certificate"),
        (right_key.clone_key(), vec![right.clone()], vec![other.root()], "issuer is unknown"),
        (wrong_key, vec![wrong], vec![ca.root()], "the certificate is for"),
        (right_key.clone_key(), vec![], vec![ca.root()], "none was presented"),
        (
            rustls::pki_types::PrivatePkcs8KeyDer::from(key().serialize_der()),
            vec![right.clone()],
            vec![ca.root()],
            "cannot be used",
        ),
        (
            right_key,
            vec![rustls::pki_types::CertificateDer::from(vec![1, 2])],
            vec![ca.root()],
            "carries no SPIFFE identity",
        ),
    ] {
        let error = new(key.into(), chain, roots).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
