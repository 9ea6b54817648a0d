//! What is told of the pods' certificates.

use crate::world::{World, eventually};

#[tokio::test]
async fn the_pods_certificates_are_counted_and_the_first_to_end_is_told() {
    let world = World::new().await;
    let fresh = async || world.metric("ambit_certificates", &["state=\"fresh\""]).await;
    eventually("both pods have theirs", async || fresh().await == 2).await;
    let left = world.metric("ambit_certificate_expiry_seconds", &[]).await;
    assert!((86_000..=86_400).contains(&left), "{left}");
    assert_eq!(world.metric("ambit_certificates", &["state=\"missing\""]).await, 0);
    assert_eq!(world.metric("ambit_certificate_renewal_failures_total", &[]).await, 0);
}
