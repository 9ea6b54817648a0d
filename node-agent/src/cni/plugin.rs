//! The CNI plugin itself: it passes the runtime's question on to the node's agent and the result of the plugins
//! before it on to the runtime.
//!
//! A pod of the mesh may not start outside it, so an ADD that the agent did not answer fails; the namespaces excluded
//! in the configuration are never asked about, so that the mesh's own pods start without it.
//!
//! **Invariant:** DEL never fails; nothing but a result or an error object is ever printed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::cni::protocol::{self, AddRequest, Attachment, DelRequest, Request};
use crate::cni::spec::{self, Command, Failure};

/// The plugin's name in a CNI configuration, and of its binary.
pub const TYPE: &str = "mesh-cni";
/// Where the agent listens, unless the configuration says otherwise.
pub const SOCKET: &str = "/run/ambit/cni.sock";
/// How long ADD and CHECK wait for the agent. The agent's own bound for ztunnel's acknowledgement is half of this, and
/// kubelet waits minutes.
pub const ADD_DEADLINE: Duration = Duration::from_secs(20);
/// How long the others wait: they lose little without an answer.
pub const SHORT_DEADLINE: Duration = Duration::from_secs(5);
/// Longest configuration in bytes.
pub const MAX_CONFIGURATION: u64 = 1024 * 1024;

/// The CNI_* variables.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// CNI_COMMAND.
    pub command: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS.
    pub netns: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_ARGS.
    pub arguments: String,
}

/// What the process prints and how it exits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// All of stdout.
    pub stdout: String,
    /// Exit status 0.
    pub success: bool,
}

/// Does what the environment says with the configuration on `stdin`.
pub fn run(environment: &Environment, stdin: impl Read) -> Outcome {
    let command = Command::parse(&environment.command);
    let configuration = read_configuration(command, stdin);
    let version = request_version(configuration.as_ref().ok());
    let done = configuration.and_then(|configuration| match command {
        None => Err(unknown_command(&environment.command)),
        Some(Command::Version) => Ok(Some(spec::version_result(&version))),
        Some(command) => {
            check_version(command, &configuration)?;
            let plan = plan(command, environment, &configuration)?;
            plan.question.as_ref().map_or(Ok(()), |question| ask(command, &plan.socket, question))?;
            Ok(plan.result)
        }
    });
    match done {
        Ok(result) => {
            Outcome { stdout: result.map_or_else(String::new, |result| format!("{result}\n")), success: true }
        }
        // The runtime would try for ever to delete what is gone anyway; the agent finds out by itself.
        Err(_) if matches!(command, Some(Command::Del | Command::Gc)) => {
            Outcome { stdout: String::new(), success: true }
        }
        Err(failure) => Outcome { stdout: format!("{}\n", failure.to_json(&version)), success: false },
    }
}

/// What a command comes to, decided without touching anything.
#[derive(Debug, PartialEq)]
struct Plan {
    socket: PathBuf,
    /// `None`: nothing to ask.
    question: Option<Request>,
    /// What is printed once the agent agreed.
    result: Option<Value>,
}

fn plan(command: Command, environment: &Environment, configuration: &Value) -> Result<Plan, Failure> {
    let socket = text(configuration, "socket")?.unwrap_or(SOCKET).into();
    let excluded = excluded(configuration, environment)?;
    let attachment =
        Attachment { container_id: environment.container_id.clone(), ifname: environment.ifname.clone() };
    let (question, result) = match command {
        Command::Add => {
            let result = previous_result(configuration)?;
            let question = if excluded { None } else { Some(Request::Add(pod(environment, result)?)) };
            (question, Some(result.clone()))
        }
        Command::Check if excluded => (None, None),
        Command::Check => (Some(Request::Check(pod(environment, previous_result(configuration)?)?)), None),
        Command::Del if excluded => (None, None),
        Command::Del => {
            let argument = |key| spec::argument(&environment.arguments, key).map(str::to_owned);
            let request = DelRequest {
                namespace: argument("K8S_POD_NAMESPACE").unwrap_or_default(),
                name: argument("K8S_POD_NAME").unwrap_or_default(),
                uid: argument("K8S_POD_UID"),
                attachment,
            };
            (Some(Request::Del(request)), None)
        }
        Command::Status => (Some(Request::Status), None),
        Command::Gc => (Some(Request::Gc(valid_attachments(configuration)?)), None),
        Command::Version => (None, None),
    };
    Ok(Plan { socket, question, result })
}

fn pod(environment: &Environment, result: &Value) -> Result<AddRequest, Failure> {
    let variable = |name: &str, value: &str| match value {
        "" => Err(Failure::new(spec::ENVIRONMENT, format!("{name} is not set"), "the runtime must set it")),
        value => Ok(value.to_owned()),
    };
    let argument = |key: &str| spec::argument(&environment.arguments, key);
    let required = |key: &str| {
        let why = "only pods of Kubernetes can be in the mesh; other containers need a CNI configuration without mesh-cni";
        let missing = || Failure::new(spec::ENVIRONMENT, format!("CNI_ARGS has no {key}"), why);
        argument(key).map(str::to_owned).ok_or_else(missing)
    };
    let addresses = spec::container_addresses(result).map_err(|error| {
        Failure::new(spec::CONFIGURATION, format!("prevResult is not a CNI result: {error}"), CHAIN_HINT)
    })?;
    if addresses.is_empty() || addresses.len() > protocol::MAX_ADDRESSES {
        let message = format!("prevResult gives the pod {} addresses", addresses.len());
        return Err(Failure::new(spec::CONFIGURATION, message, CHAIN_HINT));
    }
    Ok(AddRequest {
        namespace: required("K8S_POD_NAMESPACE")?,
        name: required("K8S_POD_NAME")?,
        uid: argument("K8S_POD_UID").map(str::to_owned),
        netns_path: variable("CNI_NETNS", &environment.netns)?,
        attachment: Attachment {
            container_id: variable("CNI_CONTAINERID", &environment.container_id)?,
            ifname: variable("CNI_IFNAME", &environment.ifname)?,
        },
        addresses,
    })
}

fn excluded(configuration: &Value, environment: &Environment) -> Result<bool, Failure> {
    let wrong = || configuration_failure("excludeNamespaces must be a list of names");
    let namespaces = match &configuration["excludeNamespaces"] {
        Value::Null => return Ok(false),
        Value::Array(namespaces) => namespaces,
        _ => return Err(wrong()),
    };
    let names = namespaces.iter().map(Value::as_str).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
    let namespace = spec::argument(&environment.arguments, "K8S_POD_NAMESPACE");
    Ok(namespace.is_some_and(|namespace| names.contains(&namespace)))
}

fn previous_result(configuration: &Value) -> Result<&Value, Failure> {
    let missing = || Failure::new(spec::CONFIGURATION, "the configuration has no prevResult", CHAIN_HINT);
    Some(&configuration["prevResult"]).filter(|result| result.is_object()).ok_or_else(missing)
}

fn valid_attachments(configuration: &Value) -> Result<Vec<Attachment>, Failure> {
    let wrong =
        || configuration_failure("cni.dev/valid-attachments must be a list of containerID and ifname");
    let list = configuration["cni.dev/valid-attachments"].as_array().ok_or_else(wrong)?;
    let attachment = |value: &Value| {
        Some(Attachment {
            container_id: value["containerID"].as_str()?.to_owned(),
            ifname: value["ifname"].as_str()?.to_owned(),
        })
    };
    list.iter().map(attachment).collect::<Option<_>>().ok_or_else(wrong)
}

fn text<'a>(configuration: &'a Value, field: &str) -> Result<Option<&'a str>, Failure> {
    match &configuration[field] {
        Value::Null => Ok(None),
        Value::String(text) if !text.is_empty() => Ok(Some(text)),
        _ => Err(configuration_failure(&format!("{field} must be a text"))),
    }
}

fn configuration_failure(message: &str) -> Failure {
    let details = "see the mesh-cni entry in the node's CNI configuration; the agent rewrites a broken one";
    Failure::new(spec::CONFIGURATION, message, details)
}

fn read_configuration(command: Option<Command>, stdin: impl Read) -> Result<Value, Failure> {
    let mut bytes = Vec::new();
    let read = stdin.take(MAX_CONFIGURATION + 1).read_to_end(&mut bytes);
    read.map_err(|error| {
        Failure::new(spec::IO, "cannot read the configuration on stdin", error.to_string())
    })?;
    if bytes.len() as u64 > MAX_CONFIGURATION {
        let message = format!("the configuration on stdin is longer than {MAX_CONFIGURATION} bytes");
        return Err(Failure::new(spec::DECODE, message, "a network configuration is a few kilobytes"));
    }
    if command == Some(Command::Version) && bytes.trim_ascii().is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    let not_json =
        |details| Failure::new(spec::DECODE, "the configuration on stdin is not a JSON object", details);
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| not_json(error.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(not_json("it is another kind of JSON value".to_owned())) }
}

/// Answers name the version they are in: the request's, as far as it can be read.
fn request_version(configuration: Option<&Value>) -> String {
    let newest = spec::VERSIONS[spec::VERSIONS.len() - 1];
    configuration.and_then(|c| c["cniVersion"].as_str()).unwrap_or(newest).to_owned()
}

fn check_version(command: Command, configuration: &Value) -> Result<(), Failure> {
    // Absent means 0.1.0 to the specification, which had no chains.
    let version = configuration["cniVersion"].as_str().unwrap_or("0.1.0");
    if command.is_in(version) {
        return Ok(());
    }
    let details = if spec::VERSIONS.contains(&version) {
        format!("{} exists from CNI {} on", command.name(), command.since())
    } else {
        format!(
            "{TYPE} speaks {}; change cniVersion in the node's CNI configuration",
            spec::VERSIONS.join(", ")
        )
    };
    let message = format!("CNI version {version:?} is not supported for {}", command.name());
    Err(Failure::new(spec::INCOMPATIBLE_VERSION, message, details))
}

fn unknown_command(command: &str) -> Failure {
    let message = match command {
        "" => "CNI_COMMAND is not set".to_owned(),
        command => format!("CNI_COMMAND {command:?} is no CNI command"),
    };
    let details = format!("{TYPE} is a CNI plugin: a container runtime calls it, people use `kubectl`");
    Failure::new(spec::ENVIRONMENT, message, details)
}

/// Asks the agent, and returns by the deadline whatever happens to the other side.
fn ask(command: Command, socket: &Path, question: &Request) -> Result<(), Failure> {
    let deadline = match command {
        Command::Add | Command::Check => ADD_DEADLINE,
        _ => SHORT_DEADLINE,
    };
    let (sender, receiver) = mpsc::channel();
    let (path, line) = (socket.to_owned(), question.to_line());
    // On a thread, since a blocking connect cannot be bounded; the process ends soon, and the thread with it.
    std::thread::spawn(move || sender.send(converse(&path, &line)));
    let answer = receiver.recv_timeout(deadline).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", deadline.as_secs())))
    });
    let failure = match answer {
        Err(error) => unreachable_agent(question, socket, &error),
        Ok(line) => match protocol::reply_from_line(&line) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(refused)) => Failure::new(refused.code, refused.message, refused.details),
            Err(malformed) => Failure::new(
                spec::DECODE,
                "the node agent's answer cannot be understood",
                format!("{malformed}; are {TYPE} and the agent of the same release?"),
            ),
        },
    };
    // The one code that STATUS has for "no ADD now".
    Err(if command == Command::Status { Failure { code: spec::NOT_AVAILABLE, ..failure } } else { failure })
}

fn converse(socket: &Path, line: &str) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(line.as_bytes())?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(protocol::MAX_REPLY as u64 + 1)).read_until(b'\n', &mut answer)?;
    match answer.pop() {
        Some(b'\n') => Ok(answer),
        None => {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection without an answer"))
        }
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "its answer was cut off or too long")),
    }
}

fn unreachable_agent(question: &Request, socket: &Path, error: &io::Error) -> Failure {
    let subject = match question {
        Request::Add(pod) | Request::Check(pod) => format!("pod {}/{}", pod.namespace, pod.name),
        _ => "the node".to_owned(),
    };
    let cause = match error.kind() {
        io::ErrorKind::NotFound => "its socket is not there: it has not started since the node booted",
        io::ErrorKind::ConnectionRefused => "nothing listens on its socket: it is restarting or has crashed",
        io::ErrorKind::TimedOut => "it is stuck or waits for its ztunnel",
        _ => "see the error",
    };
    let message = format!("{subject}: Ambit's node agent cannot be reached at {}: {error}", socket.display());
    let details = format!(
        "{cause}. Pods of the mesh wait for it rather than start outside the mesh; the kubelet retries. \
         Next: kubectl -n ambit-system get pods -l app=node-agent -o wide"
    );
    Failure::new(spec::TRY_AGAIN, message, details)
}

const CHAIN_HINT: &str =
    "mesh-cni must come after the plugin that makes the pod's interface in the node's CNI configuration";

#[cfg(test)]
mod tests;
