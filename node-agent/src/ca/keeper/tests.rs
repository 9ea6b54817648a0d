//! Rounds with a clock of the test's.

use mesh_core::readiness::Readiness;

use super::*;
use crate::ca::authority::Material;
use crate::ca::fakes::Fake;

struct World {
    fake: Fake,
    readiness: Readiness,
    keeper: Keeper<Fake>,
}

fn world() -> World {
    world_of(&Fake::default())
}

/// One more replica.
fn world_of(fake: &Fake) -> World {
    let (fake, readiness) = (fake.clone(), Readiness::new());
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

/// Who signs: its certificate.
fn signs(watch: &CurrentWatch) -> String {
    watch.borrow().as_ref().map(|current| current.state.signing.ca_cert.clone()).unwrap_or_default()
}

/// Three replicas, one of which is a new process in each round.
#[tokio::test]
async fn replicas_go_from_one_key_to_another_together() {
    let World { fake, keeper, .. } = world();
    let start = SystemTime::now();
    let more = world_of(&fake);
    let new = || world_of(&fake).keeper;
    let [a, b] = [(), ()].map(|()| Material::generate("cluster.local", start).unwrap());
    put(&fake, roots::USER_SECRET, &a, "");
    keeper.round(start).await.unwrap();
    put(&fake, roots::USER_SECRET, &b, "");
    let both = format!("{}{}", a.root_cert, b.root_cert);
    let whole = Times::default().lifetime + Times::default().skew;
    let second = Duration::from_secs(1);
    for (when, who, trusted) in [
        (second, &a, &both),
        (whole, &a, &both),
        (whole + second, &b, &both),
        (2 * whole, &b, &both),
        (2 * whole + second, &b, &b.root_cert),
    ] {
        // In any order, one of them alone moves it.
        for keeper in [&new(), &keeper, &more.keeper] {
            keeper.round(start + when).await.unwrap();
            let watch = keeper.watch();
            assert_eq!((signs(&watch), roots(&watch)), (who.ca_cert.clone(), trusted.clone()), "{when:?}");
            assert_eq!(published(&fake), *trusted);
        }
    }
    let kept = fake.state().secrets[roots::STATE_SECRET]["ca-key.pem"].clone();
    assert_eq!(kept, b.ca_key.into_bytes(), "the old key is not kept");
}

#[tokio::test]
async fn replicas_that_find_another_key_together_write_once() {
    let fake = Fake::default();
    let start = SystemTime::now();
    let keepers: Vec<_> = (0..6).map(|_| world_of(&fake).keeper).collect();
    for keeper in &keepers {
        keeper.round(start).await.unwrap();
    }
    let new = Material::generate("cluster.local", start).unwrap();
    put(&fake, roots::USER_SECRET, &new, "");
    let rounds = keepers.iter().map(|keeper| keeper.round(start));
    for result in futures_util::future::join_all(rounds).await {
        result.unwrap();
    }
    assert_eq!(fake.state().versions[roots::STATE_SECRET], 1);
    let first = roots(&keepers[0].watch());
    assert!(first.ends_with(&new.root_cert) && keepers.iter().all(|keeper| roots(&keeper.watch()) == first));
}

#[tokio::test]
async fn an_own_root_that_is_deleted_is_followed_by_another() {
    let World { fake, keeper, .. } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    keeper.round(now).await.unwrap();
    let (old, before) = (roots(&watch), signs(&watch));
    fake.state().secrets.remove(roots::OWN_SECRET);
    keeper.round(now).await.unwrap();
    assert_eq!(signs(&watch), before);
    let all = roots(&watch);
    assert!(all.starts_with(&old) && all.len() > old.len(), "{all}");
    // What all replicas do is made again by whoever knows it.
    fake.state().secrets.remove(roots::STATE_SECRET);
    keeper.round(now).await.unwrap();
    assert_eq!((roots(&watch), signs(&watch)), (all, before));
}

#[tokio::test]
async fn a_key_in_wrong_hands_is_given_up_at_once() {
    let World { fake, keeper, .. } = world();
    let (watch, now) = (keeper.watch(), SystemTime::now());
    keeper.round(now).await.unwrap();
    let new = Material::generate("cluster.local", now).unwrap();
    put(&fake, roots::USER_SECRET, &new, "");
    fake.state().annotations.insert("ambit.io/rotation".into(), "immediate".into());
    keeper.round(now).await.unwrap();
    assert_eq!((signs(&watch), published(&fake)), (new.ca_cert, new.root_cert));
}

#[tokio::test]
async fn a_broken_secret_does_not_stop_what_serves() {
    let World { fake, keeper, readiness } = world();
    let now = SystemTime::now();
    keeper.round(now).await.unwrap();
    let old = roots(&keeper.watch());
    let broken = Material { ca_key: "x".into(), ..Material::generate("cluster.local", now).unwrap() };
    put(&fake, roots::USER_SECRET, &broken, "");
    // Not even a process that starts with it, which serves as well.
    let new = world_of(&fake);
    for (readiness, keeper) in [(readiness, keeper), (new.readiness, new.keeper)] {
        let error = keeper.round(now).await.unwrap_err().to_string();
        assert!(error.contains("Secret cacerts: ca-key.pem"), "{error}");
        assert_eq!((roots(&keeper.watch()), readiness.pending()), (old.clone(), vec![]));
    }
    assert_eq!(published(&fake), old);
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
    let mut told = Vec::new();
    for percent in [60, 49, 48, 24, 9, 8] {
        keeper.round(life.until - whole.mul_f64(f64::from(percent) / 100.0)).await.unwrap();
        told.push(fake.state().told.pop().map(|expiry| (expiry.secret, expiry.percent, expiry.until)));
    }
    let at = |percent| Some((roots::USER_SECRET, percent, life.until));
    assert_eq!(told, [None, at(50), None, at(25), at(10), None]);
    // A log has it all the same.
    let said = expiry("cacerts", life, 10, life.until).message;
    assert!(
        said.starts_with("the root ") && said.contains("Ambit root") && said.contains(" 10 percent"),
        "{said}"
    );
}

/// One that was told of hides no other; and what could not be told is told later.
#[tokio::test]
async fn each_certificate_is_told_of_until_it_was_heard() {
    let World { fake, keeper, .. } = world();
    let start = SystemTime::UNIX_EPOCH;
    let at = |days: u64| start + Duration::from_secs(days * 86_400);
    let life = |subject: &str, is_root, days| Life {
        subject: subject.to_owned(),
        is_root,
        from: start,
        until: at(days),
    };
    let lives = [life("root", true, 100), life("intermediate", false, 190)];
    for (day, away, expect) in [
        (40, false, &[][..]),
        (50, true, &[]),
        (51, false, &[("root", 50)]),
        (91, false, &[("root", 10)]),
        (96, false, &[("intermediate", 50)]),
        (97, false, &[]),
        (143, true, &[]),
        (144, true, &[]),
        (145, false, &[("intermediate", 25)]),
        (172, false, &[("intermediate", 10)]),
        (173, false, &[]),
    ] {
        fake.state().away = away;
        keeper.tell_of_age("cacerts", &lives, at(day)).await;
        let told = std::mem::take(&mut fake.state().told);
        let told: Vec<_> = told.iter().map(|expiry| (expiry.subject.as_str(), expiry.percent)).collect();
        assert_eq!(told, expect, "day {day}");
    }
    // Another certificate of the same name is another.
    keeper.tell_of_age("cacerts", &[life("root", true, 300)], at(174)).await;
    assert_eq!(fake.state().told.iter().map(|expiry| expiry.percent).collect::<Vec<_>>(), [50]);
    assert_eq!(keeper.said().len(), 1, "those that are replaced are forgotten");
}
