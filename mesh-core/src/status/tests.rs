use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use super::*;

struct Served {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

async fn served(handlers: Handlers) -> Served {
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(serve(listener, handlers, async {
        let _ = stopped.await;
    }));
    Served { address, stop, task }
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn answers_by_path_and_method() {
    let readiness = Readiness::new();
    let gate = readiness.gate("xds");
    let handlers = Handlers::new()
        .readiness(readiness)
        .liveness()
        .get("/config_dump", |request| json(&serde_json::json!({ "query": request.uri().query() })))
        .post("/quit", |_| text(StatusCode::OK, "bye"));
    let served = served(handlers).await;
    let head = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    for (line, status, part) in [
        ("GET /healthz/live", "200", "live"),
        ("GET /healthz/ready", "503", "pending: xds"),
        ("GET /config_dump?a=b", "200", "\"query\": \"a=b\""),
        ("GET /nothing", "404", "/config_dump"),
        ("GET /quit", "405", "allow: POST"),
        ("POST /quit", "200", "bye"),
        ("DELETE /config_dump", "405", "use GET"),
    ] {
        let answer = ask(served.address, &format!("{line} {head}")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{line}: {answer}");
        assert!(answer.contains(part), "{line}: {answer}");
    }
    gate.open();
    let answer = ask(served.address, &format!("HEAD /healthz/ready {head}")).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("ready\n"), "{answer}");
    served.stop.send(()).unwrap();
    served.task.await.unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
}

/// Status and body that a kubelet's probe gets.
async fn probe(address: SocketAddr, path: &str) -> (u16, String) {
    let head = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = ask(address, &format!("GET {path} {head}")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn ready_while_all_gates_are_open_and_else_says_which_and_why() {
    let readiness = Readiness::new();
    let (xds, cni) = (readiness.gate("xds"), readiness.gate("cni"));
    let served = served(Handlers::new().readiness(readiness).liveness()).await;
    let not = |what: &str| (503, format!("not ready, pending: {what}\n"));
    let ready = async |expect| {
        assert_eq!(probe(served.address, "/healthz/ready").await, expect);
        // Whoever is not ready yet is not to be restarted.
        assert_eq!(probe(served.address, "/healthz/live").await, (200, "live\n".to_owned()));
    };
    ready(not("cni, xds")).await;
    xds.open();
    cni.close("disk full");
    ready(not("cni (disk full)")).await;
    cni.open();
    ready((200, "ready\n".to_owned())).await;
    xds.close("");
    ready(not("xds")).await;
}

#[tokio::test]
async fn live_for_as_long_as_the_check_finds_nothing() {
    let stuck = Arc::new(std::sync::Mutex::new(None));
    let check = stuck.clone();
    let readiness = Readiness::new();
    let handlers = Handlers::new().readiness(readiness).liveness_of(move || match *check.lock().unwrap() {
        Some(error) => Err::<(), &str>(error),
        None => Ok(()),
    });
    let served = served(handlers).await;
    assert_eq!(probe(served.address, "/healthz/live").await, (200, "live\n".to_owned()));
    *stuck.lock().unwrap() = Some("the datapath is stuck");
    assert_eq!(probe(served.address, "/healthz/live").await, (500, "the datapath is stuck\n".to_owned()));
    assert_eq!(probe(served.address, "/healthz/ready").await, (200, "ready\n".to_owned()));
}

#[tokio::test]
async fn refuses_what_is_too_long_or_no_http() {
    let served = served(Handlers::new().liveness()).await;
    let long = format!("GET /healthz/live HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(2 * HEAD_LIMIT));
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    // The server may close before it has read all of it.
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    let answer = ask(served.address, "\x16\x03\x01 not http\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn says_which_address_is_taken() {
    let taken = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind(address).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn all_addresses_are_those_of_both_families() {
    let listener = bind("[::]:0".parse().unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    for host in ["127.0.0.1", "::1"] {
        TcpStream::connect((host, port)).await.unwrap_or_else(|error| panic!("{host}: {error}"));
    }
}
