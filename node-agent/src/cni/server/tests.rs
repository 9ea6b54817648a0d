//! The agent's end of the conversation, over real sockets.

use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use serde_json::Value;
use tokio::sync::Notify;

use super::*;

/// Notes what it is asked; answers ADD with `answer`, after `hold` if that is set.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    answer: Option<AddError>,
    hold: Option<Arc<Notify>>,
    began: Notify,
}

impl Fake {
    fn note(&self, text: String) {
        self.asked.lock().unwrap().push(text);
    }

    fn answer(&self) -> Result<(), AddError> {
        self.answer.clone().map_or(Ok(()), Err)
    }
}

impl Enroller for Fake {
    async fn add(&self, request: AddRequest) -> Result<(), AddError> {
        self.began.notify_one();
        if let Some(hold) = &self.hold {
            hold.notified().await;
        }
        self.note(format!("add {}/{} {:?}", request.namespace, request.name, request.addresses));
        self.answer()
    }

    async fn del(&self, request: DelRequest) {
        self.note(format!("del {}", request.attachment.container_id));
    }

    async fn check(&self, request: AddRequest) -> Result<(), AddError> {
        self.note(format!("check {}", request.name));
        self.answer()
    }

    async fn status(&self) -> Result<(), AddError> {
        self.answer()
    }

    async fn gc(&self, valid: Vec<Attachment>) {
        self.note(format!("gc {}", valid.len()));
    }
}

struct World {
    path: PathBuf,
    enroller: Arc<Fake>,
    shutdown: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), BindError>>,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.path.ancestors().nth(2).unwrap());
    }
}

fn world(name: &str, enroller: Fake) -> World {
    let directory = std::env::temp_dir().join(format!("ambit-cni-{}-{name}", std::process::id()));
    let (path, enroller) = (directory.join("run/cni.sock"), Arc::new(enroller));
    let shutdown = CancellationToken::new();
    // Before the task runs, so that a client can connect at once; serve() binds again over it.
    let listener = bind(&path).unwrap();
    let (stop, served) = (shutdown.clone(), Arc::clone(&enroller));
    let server = tokio::spawn(async move {
        serve_bound(listener, served, stop).await;
        Ok(())
    });
    World { path, enroller, shutdown, server }
}

impl World {
    async fn send(&self, bytes: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    async fn ask(&self, bytes: &[u8]) -> Value {
        let mut stream = self.send(bytes).await;
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        serde_json::from_str(&answer).unwrap()
    }
}

fn pod() -> AddRequest {
    AddRequest {
        namespace: "payments".into(),
        name: "payment-1".into(),
        uid: None,
        netns_path: "/run/netns/x".into(),
        attachment: Attachment { container_id: "c1".into(), ifname: "eth0".into() },
        addresses: vec!["10.244.1.2".parse().unwrap()],
    }
}

#[tokio::test]
async fn every_request_reaches_the_enroller() {
    let world = world("all", Fake::default());
    let del =
        DelRequest { namespace: String::new(), name: String::new(), uid: None, attachment: pod().attachment };
    let requests =
        [Request::Add(pod()), Request::Check(pod()), Request::Del(del), Request::Status, Request::Gc(vec![])];
    for request in requests {
        let answer = world.ask(request.to_line().as_bytes()).await;
        assert_eq!(answer["ok"], true, "{request:?}: {answer}");
    }
    let asked = world.enroller.asked.lock().unwrap().clone();
    assert_eq!(asked, ["add payments/payment-1 [10.244.1.2]", "check payment-1", "del c1", "gc 0"]);
}

#[tokio::test]
async fn refusals_name_the_pod_and_the_reason() {
    for (error, code) in [
        (AddError::Unavailable("ztunnel is away".into()), spec::TRY_AGAIN),
        (AddError::Refused("ztunnel is away".into()), spec::REFUSED),
    ] {
        let world = world(&format!("refuse-{code}"), Fake { answer: Some(error), ..Fake::default() });
        let answer = world.ask(Request::Add(pod()).to_line().as_bytes()).await;
        assert_eq!(answer["error"]["code"], code);
        assert_eq!(answer["error"]["msg"], "cannot enrol pod payments/payment-1");
        assert_eq!(answer["error"]["details"], "ztunnel is away");
        let answer = world.ask(Request::Status.to_line().as_bytes()).await;
        assert_eq!(answer["error"]["code"], code);
    }
}

#[tokio::test]
async fn what_is_no_request_is_answered_and_harms_nobody() {
    let world = world("bad", Fake::default());
    let endless = vec![b'x'; protocol::MAX_REQUEST + 1];
    for (bytes, part) in [
        (&b"\n"[..], "not JSON"),
        (&b"hello\n"[..], "not JSON"),
        (&b"{\"version\":9}\n"[..], "version 9"),
        (&b"{}"[..], "no end"),
        (&b""[..], "no end"),
        (&endless, "longer than"),
    ] {
        let answer = world.ask(bytes).await;
        let details = answer["error"]["details"].as_str().unwrap();
        assert!(details.contains(part), "{details}");
    }
    assert_eq!(world.ask(Request::Status.to_line().as_bytes()).await["ok"], true);
}

#[tokio::test]
async fn an_enrolment_is_finished_though_plugin_and_server_are_leaving() {
    let hold = Arc::new(Notify::new());
    let mut world = world("finish", Fake { hold: Some(Arc::clone(&hold)), ..Fake::default() });
    let stream = world.send(Request::Add(pod()).to_line().as_bytes()).await;
    world.enroller.began.notified().await;
    drop(stream);
    world.shutdown.cancel();
    hold.notify_one();
    (&mut world.server).await.unwrap().unwrap();
    assert_eq!(world.enroller.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn the_socket_is_private_and_replaces_an_old_one() {
    let world = world("socket", Fake::default());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&world.path), 0o600);
    let inode = std::fs::metadata(&world.path).unwrap().ino();
    let _second = bind(&world.path).unwrap();
    assert_ne!(std::fs::metadata(&world.path).unwrap().ino(), inode);
    assert_eq!(mode(&world.path), 0o600);
    let names = std::fs::read_dir(world.path.parent().unwrap()).unwrap().count();
    assert_eq!(names, 1, "no temporary name stays");
    let error = bind(Path::new("/proc/ambit/cni.sock")).unwrap_err().to_string();
    assert!(error.contains("/proc/ambit/cni.sock"), "{error}");
}
