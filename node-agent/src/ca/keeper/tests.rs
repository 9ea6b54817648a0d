//! Rounds with a clock of the test's.

use mesh_core::readiness::Readiness;

use super::*;
use crate::ca::fakes::Fake;

struct World {
    fake: Fake,
    readiness: Readiness,
    keeper: Keeper<Fake>,
}

fn world() -> World {
    let (fake, readiness) = (Fake::default(), Readiness::new());
    let names = vec!["localhost".to_owned()];
    let gate = readiness.gate("ca secret");
    let keeper = Keeper::new(fake.clone(), "cluster.local".into(), names, gate, Metrics::default());
    World { fake, readiness, keeper }
}

fn put(fake: &Fake, secret: &str, material: &Material, more_roots: &str) {
    let files = [
        ("ca-cert.pem", material.ca_cert.clone()),
        ("ca-key.pem", material.ca_key.clone()),
        ("cert-chain.pem", material.cert_chain.clone()),
        ("root-cert.pem", material.root_cert.clone() + more_roots),
    ];
    let files = files.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect();
    fake.state().secrets.insert(secret.to_owned(), files);
}

fn published(fake: &Fake) -> String {
    fake.state().maps.values().next().cloned().unwrap_or_default()
}

fn roots(watch: &CurrentWatch) -> String {
    watch.borrow().as_ref().map(|current| current.authority.roots()).unwrap_or_default()
}

#[tokio::test]
async fn is_ready_once_it_can_sign_and_everyone_can_know() {
    let World { fake, readiness, keeper } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    fake.state().away = true;
    assert!(matches!(keeper.round(now).await, Err(KeepError::Roots(_))));
    assert!(watch.borrow().is_none());
    assert_eq!(readiness.pending(), ["ca secret"]);
    fake.state().away = false;
    keeper.round(now).await.unwrap();
    assert!(readiness.pending().is_empty());
    assert!(!roots(&watch).is_empty());
    assert_eq!(published(&fake), roots(&watch));
}

#[tokio::test]
async fn the_serving_certificate_is_renewed_even_without_the_api_server() {
    let World { fake, keeper, .. } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    let leaf = || watch.borrow().as_ref().unwrap().serving.cert[0].clone();
    let hours = |n: u64| now + Duration::from_secs(n * 3600);
    keeper.round(now).await.unwrap();
    let first = leaf();
    keeper.round(hours(11)).await.unwrap();
    assert_eq!(leaf(), first, "fresh enough");
    fake.state().away = true;
    assert!(keeper.round(hours(12)).await.is_err());
    assert_ne!(leaf(), first, "half of its life is over");
}

#[tokio::test]
async fn a_new_root_is_followed_only_with_overlap() {
    let World { fake, keeper, .. } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    keeper.round(now).await.unwrap();
    let old = roots(&watch);
    let new = Material::generate("cluster.local", now).unwrap();
    put(&fake, roots::USER_SECRET, &new, "");
    let error = keeper.round(now).await.unwrap_err();
    assert!(matches!(error, KeepError::NoOverlap(_)), "{error}");
    assert_eq!(roots(&watch), old, "the old one goes on");
    put(&fake, roots::USER_SECRET, &new, &old);
    keeper.round(now).await.unwrap();
    assert_eq!(roots(&watch), format!("{}{old}", new.root_cert));
    assert_eq!(published(&fake), roots(&watch));
}

#[tokio::test]
async fn a_broken_secret_does_not_stop_what_serves() {
    let World { fake, keeper, .. } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    keeper.round(now).await.unwrap();
    let old = roots(&watch);
    let broken = Material { ca_key: "x".into(), ..Material::generate("cluster.local", now).unwrap() };
    put(&fake, roots::USER_SECRET, &broken, "");
    let error = keeper.round(now).await.unwrap_err().to_string();
    assert!(error.contains("Secret cacerts: ca-key.pem"), "{error}");
    assert_eq!(roots(&watch), old);
}

#[tokio::test]
async fn what_only_the_user_can_renew_is_told_at_each_threshold_once() {
    let World { fake, keeper, .. } = world();
    let (watch, start) = (keeper.watch(), SystemTime::now());
    let root = Material::generate("cluster.local", start).unwrap();
    put(&fake, roots::USER_SECRET, &root, "");
    keeper.round(start).await.unwrap();
    let current = watch.borrow().clone().unwrap();
    let [life] = current.authority.lives() else { panic!("{:?}", current.authority.lives()) };
    assert_eq!((life.is_root, life.until), (true, current.authority.not_after()));
    let whole = life.until.duration_since(life.from).unwrap();
    let told = [60, 49, 48, 24, 9, 8].map(|percent| {
        let now = life.until - whole.mul_f64(f64::from(percent) / 100.0);
        keeper.warning(&current.authority, now).map(|text| text.contains("Ambit root"))
    });
    assert_eq!(told, [None, Some(true), None, Some(true), Some(true), None]);
}
