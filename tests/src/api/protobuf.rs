//! Bodies in protobuf, which the typed commands of `kubectl` send (`create namespace`, `create token`, `auth can-i`):
//! decoded to the JSON that the same object has. What the table in `messages` does not have is refused. Pure.
//! Reference: protobuf.dev, "Encoding"; `k8s.io/apimachinery/pkg/runtime/serializer/protobuf`.

mod messages;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value};

use super::meta;
use messages::{Field, Shape};

pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// What each body starts with.
const MAGIC: &[u8] = b"k8s\0";

/// Why a body could not be decoded.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("the body is no protobuf of Kubernetes")]
    Malformed,
    #[error("field {1} of {0} is not one that the lab's API server decodes")]
    Unknown(String, u64),
}

/// Decodes a body.
pub(super) fn decode(body: &[u8]) -> Result<Value, Unreadable> {
    let envelope = message("Unknown", body.strip_prefix(MAGIC).ok_or(Unreadable::Malformed)?)?;
    let (version, kind) =
        (meta::text(&envelope, "/typeMeta/apiVersion"), meta::text(&envelope, "/typeMeta/kind"));
    let name = if version == "events.k8s.io/v1" { "NewEvent" } else { kind };
    let raw = meta::from_base64(meta::text(&envelope, "/raw")).ok_or(Unreadable::Malformed)?;
    let mut object = message(name, &raw)?;
    object["apiVersion"] = version.into();
    object["kind"] = kind.into();
    Ok(object)
}

/// One part of a message: its number, and what it holds.
enum Part<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn message(name: &str, mut bytes: &[u8]) -> Result<Value, Unreadable> {
    let mut fields = Map::new();
    while !bytes.is_empty() {
        let (number, part) = next(&mut bytes)?;
        let field =
            messages::field(name, number).ok_or_else(|| Unreadable::Unknown(name.to_owned(), number))?;
        add(&mut fields, &field, &part)?;
    }
    Ok(fields.into())
}

fn add(fields: &mut Map<String, Value>, field: &Field<'_>, part: &Part<'_>) -> Result<(), Unreadable> {
    match field.shape {
        Shape::One => {
            let value = value(field.kind, part)?;
            // What Go has no pointer for is always sent; JSON leaves it out when it is empty.
            if field.pointer || !is_zero(&value) {
                fields.insert(field.name.to_owned(), value);
            }
        }
        Shape::List => {
            let slot = fields.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = slot {
                list.push(value(field.kind, part)?);
            }
        }
        Shape::Map => {
            let &Part::Bytes(mut entry) = part else { return Err(Unreadable::Malformed) };
            let (mut key, mut held) = (String::new(), None);
            while !entry.is_empty() {
                match next(&mut entry)? {
                    (1, part) => key = text(&part)?,
                    (2, part) => held = Some(value(field.kind, &part)?),
                    _ => return Err(Unreadable::Malformed),
                }
            }
            let map = meta::map(fields.entry(field.name).or_insert(Value::Null));
            map.insert(key, held.unwrap_or_else(|| "".into()));
        }
    }
    Ok(())
}

fn value(kind: &str, part: &Part<'_>) -> Result<Value, Unreadable> {
    Ok(match (kind, part) {
        ("string", part) => text(part)?.into(),
        ("bytes", Part::Bytes(bytes)) => meta::base64(bytes).into(),
        ("bool", Part::Number(number)) => (*number != 0).into(),
        ("int", Part::Number(number)) => number.cast_signed().into(),
        // A status, which the server does not take from a new object anyway.
        ("Nothing", _) => Value::Null,
        ("Time", Part::Bytes(bytes)) => time(&message("Time", bytes)?),
        ("Quantity", Part::Bytes(bytes)) => message("Quantity", bytes)?["string"].take(),
        ("IntOrString", Part::Bytes(bytes)) => {
            let mut both = message("IntOrString", bytes)?;
            if both["type"] == 1 { both["strVal"].take() } else { both["intVal"].take() }
        }
        (_, Part::Bytes(bytes)) => message(kind, bytes)?,
        _ => return Err(Unreadable::Malformed),
    })
}

/// RFC 3339, in whole seconds or microseconds; null for no time.
fn time(parts: &Value) -> Value {
    let part = |name: &str| parts[name].as_i64();
    let Some(seconds) = part("seconds") else { return Value::Null };
    let nanos = part("nanos").and_then(|nanos| i32::try_from(nanos).ok()).unwrap_or(0);
    Timestamp::new(seconds, nanos).map_or(Value::Null, |time| time.to_string().into())
}

fn text(part: &Part<'_>) -> Result<String, Unreadable> {
    let Part::Bytes(bytes) = part else { return Err(Unreadable::Malformed) };
    String::from_utf8(bytes.to_vec()).map_err(|_| Unreadable::Malformed)
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Takes one part off the front: the tag, and what follows it.
fn next<'a>(bytes: &mut &'a [u8]) -> Result<(u64, Part<'a>), Unreadable> {
    let tag = varint(bytes)?;
    let part = match tag & 7 {
        0 => Part::Number(varint(bytes)?),
        2 => {
            let length = usize::try_from(varint(bytes)?).map_err(|_| Unreadable::Malformed)?;
            let (held, rest) = bytes.split_at_checked(length).ok_or(Unreadable::Malformed)?;
            *bytes = rest;
            Part::Bytes(held)
        }
        // No message here has fields of fixed width.
        _ => return Err(Unreadable::Malformed),
    };
    Ok((tag >> 3, part))
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Unreadable> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or(Unreadable::Malformed)?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Unreadable::Malformed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Unreadable, decode, varint};

    /// A field of bytes.
    fn held(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        field.extend(bytes);
        field
    }

    fn body(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [held(1, version.as_bytes()), held(2, kind.as_bytes())].concat();
        [b"k8s\0".to_vec(), held(1, &types), held(2, raw)].concat()
    }

    #[test]
    fn a_config_map() {
        let metadata = [held(1, b"m"), held(3, b""), held(8, b"")].concat();
        let entry = [held(1, b"a"), held(2, b"b")].concat();
        let raw = [held(1, &metadata), held(2, &entry)].concat();
        assert_eq!(
            decode(&body("v1", "ConfigMap", &raw)).unwrap(),
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a": "b"}})
        );
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (bytes, expect) in [
            (b"{}".to_vec(), Unreadable::Malformed),
            (body("v1", "ConfigMap", &[0x0a, 0x7f]), Unreadable::Malformed),
            (body("v1", "ConfigMap", &[0x0d, 1, 1, 1, 1]), Unreadable::Malformed),
            (body("v1", "ConfigMap", &held(15, b"x")), Unreadable::Unknown("ConfigMap".to_owned(), 15)),
            (body("v1", "Strange", &held(1, b"x")), Unreadable::Unknown("Strange".to_owned(), 1)),
        ] {
            assert_eq!(decode(&bytes).unwrap_err(), expect, "{bytes:?}");
        }
        assert_eq!(varint(&mut &[0xff; 11][..]), Err(Unreadable::Malformed));
        assert_eq!(varint(&mut &[0xac, 0x02][..]), Ok(300));
    }
}
