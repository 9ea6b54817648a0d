//! The pod protocol, both ends. The first byte says whose messages these are; then come packets, each with its length
//! (two bytes) and how many descriptors are beside it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use mesh_core::addr::Network;
use mesh_core::pod_link::Link;
use mesh_core::pod_protocol;
use mesh_core::proto::pods::{self as wire, from_agent, from_ztunnel};
use node_agent::pods::Pods;
use prost::Message;
use tokio::runtime::{self, Runtime};
use ztunnel::pods::state::Conversation;

thread_local! {
    static RUNTIME: Option<Runtime> = runtime::Builder::new_current_thread().enable_all().build().ok();
}

/// Neither end panics or waits for ever, whatever the other says.
pub fn run(data: &[u8]) {
    let Some((first, packets)) = data.split_first() else { return };
    if first % 2 == 0 { to_ztunnel(packets) } else { to_agent(packets) }
}

fn to_ztunnel(packets: &[u8]) {
    let mut conversation = Conversation::new(Network::default(), pod_protocol::VERSIONS);
    for (packet, count) in split(packets) {
        let Ok(message) = wire::FromAgent::decode(packet) else { return };
        if conversation.receive(message, descriptors(count)).is_err() {
            return;
        }
    }
}

fn to_agent(packets: &[u8]) {
    RUNTIME.with(|runtime| {
        let (Some(runtime), [flag_map]) = (runtime, &descriptors(1)[..]) else { return };
        runtime.block_on(async {
            let Ok((ours, theirs)) = Link::pair() else { return };
            let ztunnel = async move {
                for (packet, count) in split(packets) {
                    let Ok(message) = wire::FromZtunnel::decode(packet) else { return };
                    let descriptors = descriptors(count);
                    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
                    if theirs.send(&message, &descriptors).await.is_err() {
                        return;
                    }
                }
            };
            let pods = Pods::new();
            let both = async { tokio::join!(pods.converse(&ours, flag_map), ztunnel) };
            tokio::time::timeout(Duration::from_secs(4), both)
                .await
                .expect("the conversation ends with the link");
        });
    });
}

fn split(mut packets: &[u8]) -> impl Iterator<Item = (&[u8], u8)> {
    std::iter::from_fn(move || {
        let ([low, high, count], rest) = packets.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (packet, rest) = rest.split_at(length);
        packets = rest;
        Some((packet, count % 12))
    })
}

fn descriptors(count: u8) -> Vec<OwnedFd> {
    (0..count).filter_map(|_| Some(File::open("/dev/null").ok()?.into())).collect()
}

/// A conversation as it should be, from either side.
pub fn seeds() -> Vec<Vec<u8>> {
    let pod = || wire::Pod {
        uid: "u".to_owned(),
        namespace: "shop".to_owned(),
        name: "web-0".to_owned(),
        service_account: "web".to_owned(),
        addresses: vec![vec![10, 244, 1, 2], vec![0xfd; 16]],
        workload_uid: "Kubernetes//Pod/shop/web-0".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        workload_name: "web".to_owned(),
        authorization_policies: vec!["shop/p".to_owned()],
        ..Default::default()
    };
    let fds: Vec<i32> = (1..=7).chain(9..=10).collect();
    let to_ztunnel = [
        (
            from_agent::Message::Welcome(wire::Welcome {
                version: 2,
                software: "agent".to_owned(),
                fds: vec![8],
            }),
            1,
        ),
        (from_agent::Message::Keep(wire::KeepPod { sequence: 1, pod: Some(pod()) }), 0),
        (from_agent::Message::Add(wire::AddPod { sequence: 2, pod: Some(pod()), fds: fds.clone() }), 9),
        (from_agent::Message::SnapshotEnd(wire::SnapshotEnd { sequence: 3 }), 0),
        (from_agent::Message::Remove(wire::RemovePod { sequence: 4, uid: "u".to_owned() }), 0),
        (from_agent::Message::Superseded(wire::Superseded { sequence: 5 }), 0),
        (from_agent::Message::Goodbye(wire::Goodbye { reason: "r".to_owned() }), 0),
    ];
    let to_agent = [
        (
            from_ztunnel::Message::Hello(wire::Hello {
                min_version: 1,
                max_version: 9,
                software: "z".to_owned(),
                draining: false,
            }),
            0,
        ),
        (from_ztunnel::Message::Held(wire::Held { pod: Some(pod()), fds }), 9),
        (from_ztunnel::Message::HeldEnd(wire::HeldEnd {}), 0),
        (from_ztunnel::Message::Ack(wire::Ack { sequence: 1, error: String::new() }), 0),
        (
            from_ztunnel::Message::Denied(wire::Denied {
                uid: "u".to_owned(),
                client: "c".to_owned(),
                port: 80,
                policy: "shop/p".to_owned(),
                reason: "r".to_owned(),
            }),
            0,
        ),
        (
            from_ztunnel::Message::Expiring(wire::Expiring {
                identity: "spiffe://cluster.local/ns/shop/sa/a".to_owned(),
                percent: 25,
                not_after: 1,
                reason: "r".to_owned(),
            }),
            0,
        ),
        (from_ztunnel::Message::Draining(wire::Draining {}), 0),
    ];
    let ztunnels = to_ztunnel
        .map(|(message, count)| (wire::FromAgent { message: Some(message) }.encode_to_vec(), count));
    let agents = to_agent
        .map(|(message, count)| (wire::FromZtunnel { message: Some(message) }.encode_to_vec(), count));
    vec![joined(0, &ztunnels), joined(1, &agents)]
}

fn joined(first: u8, packets: &[(Vec<u8>, u8)]) -> Vec<u8> {
    let mut bytes = vec![first];
    for (packet, count) in packets {
        bytes.extend((packet.len() as u16).to_le_bytes());
        bytes.push(*count);
        bytes.extend(packet);
    }
    bytes
}
