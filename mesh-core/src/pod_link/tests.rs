use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use super::*;
use crate::proto::pods::{AddPod, Fd, FromAgent, Goodbye, Pod, from_agent};

fn goodbye(reason: String) -> FromAgent {
    FromAgent { message: Some(from_agent::Message::Goodbye(Goodbye { reason })) }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn carries_messages_and_descriptors_in_order() {
    let (a, b) = Link::pair().unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let add = AddPod {
        sequence: 7,
        pod: Some(Pod { uid: "u".into(), ..Pod::default() }),
        fds: vec![Fd::Netns as i32, Fd::OutboundV4 as i32],
    };
    let message = FromAgent { message: Some(from_agent::Message::Add(add)) };
    a.send(&message, &[reader.as_fd(), writer.as_fd()]).await.unwrap();
    let (received, mut descriptors) = b.receive::<FromAgent>().await.unwrap();
    assert_eq!(received, message);
    assert_eq!(descriptors.len(), 2);
    for fd in &descriptors {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_ne!(flags & nix::libc::FD_CLOEXEC, 0, "a child process would inherit it");
    }
    File::from(descriptors.pop().unwrap()).write_all(b"x").unwrap();
    let mut byte = [0];
    File::from(descriptors.pop().unwrap()).read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[tokio::test]
async fn refuses_sizes_that_no_packet_may_have() {
    let (a, b) = Link::pair().unwrap();
    assert!(matches!(a.send(&FromAgent { message: None }, &[]).await, Err(LinkError::Size(0))));
    let long = goodbye("x".repeat(MAX_MESSAGE));
    assert!(matches!(a.send(&long, &[]).await, Err(LinkError::Size(_))));

    // A peer that does not keep to the limit.
    let bytes = prost::Message::encode_to_vec(&long);
    send_packet(a.socket.get_ref(), &bytes, &[]).unwrap();
    assert!(matches!(b.receive::<FromAgent>().await, Err(LinkError::Truncated)));
    // The next packet is unharmed.
    a.send(&goodbye("bye".into()), &[]).await.unwrap();
    assert_eq!(b.receive::<FromAgent>().await.unwrap().0, goodbye("bye".into()));
}

#[tokio::test]
async fn closes_the_descriptors_of_packets_it_refuses() {
    let (a, b) = Link::pair().unwrap();
    let file = File::open("/dev/null").unwrap();
    let before = open_descriptors();
    let many = vec![file.as_raw_fd(); MAX_DESCRIPTORS + 1];
    let bytes = prost::Message::encode_to_vec(&goodbye("bye".into()));
    send_packet(a.socket.get_ref(), &bytes, &many).unwrap();
    let refused = b.receive::<FromAgent>().await;
    assert!(matches!(refused, Err(LinkError::Descriptors { actual: 17, .. })), "{refused:?}");
    send_packet(a.socket.get_ref(), &[0xff; 8], &many[..3]).unwrap();
    assert!(matches!(b.receive::<FromAgent>().await, Err(LinkError::Decode(_))));
    send_packet(a.socket.get_ref(), &vec![0; MAX_MESSAGE + 1], &many[..3]).unwrap();
    assert!(matches!(b.receive::<FromAgent>().await, Err(LinkError::Truncated)));
    // Other tests of this process open descriptors too: wait for a moment without theirs.
    let leaked = (0..1000).all(|_| {
        std::thread::yield_now();
        open_descriptors() > before
    });
    assert!(!leaked, "descriptors of refused packets stayed open");
}

#[tokio::test]
async fn sees_the_end() {
    let (a, b) = Link::pair().unwrap();
    a.send(&goodbye("bye".into()), &[]).await.unwrap();
    drop(a);
    assert_eq!(b.receive::<FromAgent>().await.unwrap().0, goodbye("bye".into()));
    assert!(matches!(b.receive::<FromAgent>().await, Err(LinkError::Closed)));
    assert!(matches!(b.send(&goodbye("?".into()), &[]).await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn listens_in_place_of_a_predecessor() {
    let directory = std::env::temp_dir().join(format!("ambit-pod-link-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("pods.sock");
    assert!(Link::connect(&path).await.is_err());
    // What a killed process leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let listener = Listener::bind(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (client, server) = tokio::join!(Link::connect(&path), listener.accept());
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(server.peer().unwrap().pid, std::process::id() as i32);
    client.send(&goodbye("hello".into()), &[]).await.unwrap();
    assert_eq!(server.receive::<FromAgent>().await.unwrap().0, goodbye("hello".into()));
    drop(listener);
    assert!(Link::connect(&path).await.is_err());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "not a socket").unwrap();
    assert!(Listener::bind(&path).is_err(), "replaced a file that is no socket");
    std::fs::remove_dir_all(&directory).unwrap();
}
