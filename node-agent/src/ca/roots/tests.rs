//! Which Secret is used, and what two replicas that start together do.

use super::*;
use crate::ca::fakes::Fake;

fn made() -> Material {
    Material::generate("cluster.local", SystemTime::now()).unwrap()
}

async fn load_from(fake: &Fake) -> Result<(&'static str, Material), RootsError> {
    let source = load(fake, "cluster.local", SystemTime::now()).await?;
    assert!(!source.at_once, "nobody said so");
    Ok((source.secret, source.material))
}

#[tokio::test]
async fn the_users_secret_comes_first() {
    let (fake, (users, own)) = (Fake::default(), (made(), made()));
    fake.state().secrets.insert(OWN_SECRET.into(), files(own.clone()));
    assert_eq!(load_from(&fake).await.unwrap(), (OWN_SECRET, own));
    fake.state().secrets.insert(USER_SECRET.into(), files(users.clone()));
    assert_eq!(load_from(&fake).await.unwrap(), (USER_SECRET, users));
}

#[tokio::test]
async fn replicas_that_start_together_agree() {
    let fake = Fake::default();
    let loads = (0..8).map(|_| load_from(&fake));
    let mut loaded = futures_util::future::join_all(loads).await.into_iter().map(Result::unwrap);
    let first = loaded.next().unwrap();
    assert_eq!(first.0, OWN_SECRET);
    assert!(loaded.all(|other| other == first), "replicas sign with different keys");
}

#[tokio::test]
async fn the_loser_of_the_race_takes_the_winners_key() {
    let (fake, winners) = (Fake::default(), made());
    fake.state().created_by_another = Some((OWN_SECRET.into(), files(winners.clone())));
    assert_eq!(load_from(&fake).await.unwrap(), (OWN_SECRET, winners));
}

#[tokio::test]
async fn a_broken_secret_is_never_replaced() {
    for file in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"] {
        for broken in [None, Some(vec![0xff])] {
            let fake = Fake::default();
            let mut there = files(made());
            match broken {
                None => there.remove(file),
                Some(bytes) => there.insert(file.into(), bytes),
            };
            fake.state().secrets.insert(USER_SECRET.into(), there);
            let error = load_from(&fake).await.unwrap_err().to_string();
            assert!(error.contains(USER_SECRET) && error.contains(file), "{error}");
            assert!(!fake.state().secrets.contains_key(OWN_SECRET));
        }
    }
}

#[tokio::test]
async fn roots_are_published_once_and_repaired() {
    let fake = Fake::default();
    let key = (CONFIG_MAP.to_owned(), ROOT_FILE.to_owned());
    let publish = async || publish(&fake, published(&fake).await?.as_deref(), "roots").await;
    for writes in [1, 1] {
        publish().await.unwrap();
        assert_eq!(fake.state().writes, writes);
    }
    fake.state().maps.insert(key.clone(), "someone else's".into());
    publish().await.unwrap();
    assert_eq!(fake.state().maps[&key], "roots");
    fake.state().away = true;
    assert!(publish().await.is_err());
}

#[tokio::test]
async fn the_users_secret_may_say_that_nothing_is_to_be_waited_for() {
    let fake = Fake::default();
    fake.state().secrets.insert(USER_SECRET.into(), files(made()));
    for (value, expect) in [("immediate", true), ("", false), ("true", false)] {
        fake.state().annotations.insert(ROTATION_ANNOTATION.into(), value.into());
        assert_eq!(load(&fake, "cluster.local", SystemTime::now()).await.unwrap().at_once, expect, "{value}");
    }
}

#[tokio::test]
async fn the_state_is_written_by_who_has_read_it_last() {
    let fake = Fake::default();
    let (now, times) = (SystemTime::now(), crate::ca::issue::Times::default());
    let made = [made(), made()].map(|material| {
        let authority = crate::ca::authority::Authority::new(&material, now).unwrap();
        State::new(&authority.candidate(material), times)
    });
    assert_eq!(state(&fake).await.unwrap(), None);
    assert!(settle(&fake, &made[0], None).await.unwrap());
    assert!(!settle(&fake, &made[1], None).await.unwrap(), "there is one");
    let (read, version) = state(&fake).await.unwrap().unwrap();
    assert_eq!(read, made[0]);
    assert!(settle(&fake, &made[1], Some(&version)).await.unwrap());
    assert!(!settle(&fake, &made[0], Some(&version)).await.unwrap(), "it was changed since");
    assert_eq!(state(&fake).await.unwrap().unwrap().0, made[1]);
    let broken = |files: &mut Files| files.insert(RECORD_FILE.into(), b"{}".to_vec());
    fake.state().secrets.get_mut(STATE_SECRET).map(broken);
    let error = state(&fake).await.unwrap_err().to_string();
    assert!(error.contains(STATE_SECRET) && error.contains(RECORD_FILE), "{error}");
}
