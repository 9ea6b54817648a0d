//! Small readers and makers for the metadata that all objects share, on plain JSON values.
//! Readers return an empty string for what is missing, which is what Go's zero values mean in this API.

use k8s_openapi::ByteString;
use k8s_openapi::jiff::Timestamp;
use rand::RngExt;
use serde_json::{Map, Value};

/// The string at a JSON pointer, or "".
pub(super) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`.
pub(super) fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `metadata.namespace`, empty for cluster-scoped objects.
pub(super) fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

/// `metadata.uid`.
pub(super) fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

/// Whether `metadata.deletionTimestamp` is set.
pub(super) fn is_terminating(object: &Value) -> bool {
    !text(object, "/metadata/deletionTimestamp").is_empty()
}

/// Whether `metadata.finalizers` holds any.
pub(super) fn has_finalizers(object: &Value) -> bool {
    items(object, "/metadata/finalizers").next().is_some()
}

/// The items of the array at a JSON pointer; none when it is missing or no array.
pub(super) fn items<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// The object's map, making it one when it is null or of another type.
pub(super) fn map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// The object's `metadata` as a map, making it when missing.
pub(super) fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    map(map(object).entry("metadata").or_insert(Value::Null))
}

/// Sets `key` of an object unless it holds something other than null.
pub(super) fn default(object: &mut Value, key: &str, value: impl Into<Value>) {
    let slot = map(object).entry(key).or_insert(Value::Null);
    if slot.is_null() {
        *slot = value.into();
    }
}

/// Appends to the array at `key` of an object, making it when missing.
pub(super) fn push(object: &mut Value, key: &str, item: Value) {
    let slot = map(object).entry(key).or_insert(Value::Null);
    match slot {
        Value::Array(list) => list.push(item),
        _ => *slot = Value::Array(vec![item]),
    }
}

/// The time `seconds` from now as `metav1.Time`: RFC 3339 in whole seconds, UTC.
pub(super) fn time_after(seconds: i64) -> String {
    let now = Timestamp::now().as_second();
    Timestamp::from_second(now.saturating_add(seconds)).unwrap_or_default().to_string()
}

/// Now as `metav1.Time`.
pub(super) fn now() -> String {
    time_after(0)
}

/// A random UUID, version 4.
pub(super) fn new_uid() -> String {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// `length` random characters of the alphabet Kubernetes uses for generated names.
pub(super) fn random_suffix(length: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    (0..length).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect()
}

/// Standard base64 with padding, as in Secrets and kubeconfigs.
pub(super) fn base64(bytes: &[u8]) -> String {
    match serde_json::to_value(ByteString(bytes.to_vec())) {
        Ok(Value::String(encoded)) => encoded,
        _ => String::new(),
    }
}

/// Decodes standard base64 with padding.
pub(super) fn from_base64(encoded: &str) -> Option<Vec<u8>> {
    serde_json::from_value::<ByteString>(Value::String(encoded.to_owned())).ok().map(|bytes| bytes.0)
}
