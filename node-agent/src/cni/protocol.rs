//! What the plugin and the agent say to each other: one line of JSON each way over a unix stream socket.
//!
//! Both ends are installed by the same agent, but an old plugin may meet a new agent while a node is upgraded, so the
//! request names the protocol's version and an agent that does not speak it says so.

use std::net::IpAddr;

use serde_json::{Value, json};

/// Version that requests carry.
pub const VERSION: u64 = 1;
/// Longest request in bytes, without its newline.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Longest reply in bytes, without its newline.
pub const MAX_REPLY: usize = 16 * 1024;
/// Addresses one interface may have; more is a mistake in the chain before us.
pub const MAX_ADDRESSES: usize = 64;

/// A pod as the container runtime names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// CNI_CONTAINERID, the pod sandbox.
    pub container_id: String,
    /// CNI_IFNAME inside the pod.
    pub ifname: String,
}

/// The facts of an ADD or CHECK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddRequest {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Pod UID, if the runtime passes it (containerd and CRI-O do).
    pub uid: Option<String>,
    /// Path of the pod's network namespace, as the runtime sees it.
    pub netns_path: String,
    /// Sandbox and interface.
    pub attachment: Attachment,
    /// The pod's addresses, from the results of the plugins before us.
    pub addresses: Vec<IpAddr>,
}

/// The facts of a DEL; all but the attachment may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DelRequest {
    /// Kubernetes namespace, or empty.
    pub namespace: String,
    /// Pod name, or empty.
    pub name: String,
    /// Pod UID, if the runtime passes it.
    pub uid: Option<String>,
    /// Sandbox and interface.
    pub attachment: Attachment,
}

/// What the plugin asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Enrol this pod, or say that it is none of the mesh's.
    Add(AddRequest),
    /// Is it still as ADD left it?
    Check(AddRequest),
    /// It is going.
    Del(DelRequest),
    /// Could an ADD be answered now?
    Status,
    /// These are all that the runtime still has.
    Gc(Vec<Attachment>),
}

/// Why the agent did not do it, in the terms of a CNI error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {details}")]
pub struct Refused {
    /// CNI error code; [`crate::cni::spec::TRY_AGAIN`] when a retry may succeed.
    pub code: u32,
    /// One line: what did not happen, and to whom.
    pub message: String,
    /// Probable cause and what to do.
    pub details: String,
}

/// A line that is not a request or a reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// Another version of the protocol.
    #[error("the plugin speaks version {0} of the agent's CNI protocol, this agent speaks {VERSION}")]
    Version(String),
    /// A field that is missing, or has another type or value than it must.
    #[error("field {0:?} is missing or not what it must be")]
    Field(&'static str),
}

impl Request {
    /// The request as a line, newline included.
    pub fn to_line(&self) -> String {
        let mut value = match self {
            Self::Add(add) | Self::Check(add) => json!({
                "namespace": add.namespace,
                "name": add.name,
                "uid": add.uid,
                "netns": add.netns_path,
                "containerId": add.attachment.container_id,
                "ifname": add.attachment.ifname,
                "addresses": add.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>(),
            }),
            Self::Del(del) => json!({
                "namespace": del.namespace,
                "name": del.name,
                "uid": del.uid,
                "containerId": del.attachment.container_id,
                "ifname": del.attachment.ifname,
            }),
            Self::Status => json!({}),
            Self::Gc(valid) => json!({
                "valid": valid
                    .iter()
                    .map(|a| json!({"containerId": a.container_id, "ifname": a.ifname}))
                    .collect::<Vec<_>>(),
            }),
        };
        value["version"] = VERSION.into();
        value["verb"] = self.verb().into();
        format!("{value}\n")
    }

    /// # Errors
    /// When the line is not a request of this version.
    pub fn from_line(line: &[u8]) -> Result<Self, Malformed> {
        let value: Value =
            serde_json::from_slice(line).map_err(|error| Malformed::Json(error.to_string()))?;
        if value["version"].as_u64() != Some(VERSION) {
            return Err(Malformed::Version(value["version"].to_string()));
        }
        match value["verb"].as_str() {
            Some("add") => Ok(Self::Add(add(&value)?)),
            Some("check") => Ok(Self::Check(add(&value)?)),
            Some("del") => Ok(Self::Del(DelRequest {
                namespace: text(&value, "namespace")?,
                name: text(&value, "name")?,
                uid: uid(&value)?,
                attachment: attachment(&value)?,
            })),
            Some("status") => Ok(Self::Status),
            Some("gc") => {
                let valid = value["valid"].as_array().ok_or(Malformed::Field("valid"))?;
                Ok(Self::Gc(valid.iter().map(attachment).collect::<Result<_, _>>()?))
            }
            _ => Err(Malformed::Field("verb")),
        }
    }

    /// The CNI verb in lower case.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Check(_) => "check",
            Self::Del(_) => "del",
            Self::Status => "status",
            Self::Gc(_) => "gc",
        }
    }
}

/// A reply as a line, newline included.
pub fn reply_to_line(reply: &Result<(), Refused>) -> String {
    let value = match reply {
        Ok(()) => json!({"ok": true}),
        Err(refused) => json!({
            "error": {"code": refused.code, "msg": refused.message, "details": refused.details},
        }),
    };
    format!("{value}\n")
}

/// # Errors
/// When the line is not a reply.
pub fn reply_from_line(line: &[u8]) -> Result<Result<(), Refused>, Malformed> {
    let value: Value = serde_json::from_slice(line).map_err(|error| Malformed::Json(error.to_string()))?;
    if value["ok"] == Value::Bool(true) {
        return Ok(Ok(()));
    }
    let error = &value["error"];
    let code = error["code"].as_u64().and_then(|code| u32::try_from(code).ok());
    Ok(Err(Refused {
        code: code.ok_or(Malformed::Field("code"))?,
        message: text(error, "msg")?,
        details: text(error, "details")?,
    }))
}

fn add(value: &Value) -> Result<AddRequest, Malformed> {
    let addresses = value["addresses"].as_array().filter(|a| a.len() <= MAX_ADDRESSES);
    let addresses = addresses.ok_or(Malformed::Field("addresses"))?;
    let address = |value: &Value| value.as_str()?.parse().ok();
    Ok(AddRequest {
        namespace: filled(value, "namespace")?,
        name: filled(value, "name")?,
        uid: uid(value)?,
        netns_path: filled(value, "netns")?,
        attachment: attachment(value)?,
        addresses: addresses
            .iter()
            .map(address)
            .collect::<Option<_>>()
            .ok_or(Malformed::Field("addresses"))?,
    })
}

fn attachment(value: &Value) -> Result<Attachment, Malformed> {
    Ok(Attachment { container_id: text(value, "containerId")?, ifname: text(value, "ifname")? })
}

fn uid(value: &Value) -> Result<Option<String>, Malformed> {
    if value["uid"].is_null() { Ok(None) } else { filled(value, "uid").map(Some) }
}

fn filled(value: &Value, field: &'static str) -> Result<String, Malformed> {
    text(value, field).and_then(|text| if text.is_empty() { Err(Malformed::Field(field)) } else { Ok(text) })
}

fn text(value: &Value, field: &'static str) -> Result<String, Malformed> {
    value[field].as_str().map(str::to_owned).ok_or(Malformed::Field(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment { container_id: "c1".into(), ifname: "eth0".into() }
    }

    fn sample() -> AddRequest {
        AddRequest {
            namespace: "payments".into(),
            name: "payment-1".into(),
            uid: Some("8b0d".into()),
            netns_path: "/run/netns/x".into(),
            attachment: attachment(),
            addresses: vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        }
    }

    #[test]
    fn requests_round_trip() {
        let del =
            DelRequest { namespace: String::new(), name: String::new(), uid: None, attachment: attachment() };
        for request in [
            Request::Add(sample()),
            Request::Check(AddRequest { uid: None, addresses: vec![], ..sample() }),
            Request::Del(del),
            Request::Status,
            Request::Gc(vec![attachment()]),
        ] {
            let line = request.to_line();
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert_eq!(Request::from_line(line.as_bytes()), Ok(request));
        }
    }

    #[test]
    fn replies_round_trip() {
        let refused = Refused { code: 11, message: "a\nb".into(), details: "\"c\"".into() };
        for reply in [Ok(()), Err(refused)] {
            assert_eq!(reply_from_line(reply_to_line(&reply).as_bytes()), Ok(reply));
        }
        for bad in
            ["", "{}", "[]", "null", r#"{"ok":false}"#, r#"{"error":{"code":-1,"msg":"","details":""}}"#]
        {
            assert!(reply_from_line(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn refuses_what_is_no_request() {
        let good = Request::Add(sample()).to_line();
        let with = |field: &str, value: Value| {
            let mut line: Value = serde_json::from_str(&good).unwrap();
            line[field] = value;
            line.to_string()
        };
        for (line, reason) in [
            ("{".to_owned(), "not JSON"),
            ("[1]".to_owned(), "version null"),
            (with("version", 2.into()), "speaks version 2"),
            (with("verb", "mul".into()), "\"verb\""),
            (with("namespace", "".into()), "\"namespace\""),
            (with("name", 1.into()), "\"name\""),
            (with("uid", "".into()), "\"uid\""),
            (with("netns", Value::Null), "\"netns\""),
            (with("addresses", json!(["10.0.0.1/24"])), "\"addresses\""),
            (with("addresses", json!(vec!["10.0.0.1"; MAX_ADDRESSES + 1])), "\"addresses\""),
        ] {
            let error = Request::from_line(line.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }
}
