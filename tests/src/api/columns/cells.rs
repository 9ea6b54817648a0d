//! What the cells of several kinds are made of. Pure, but for the clock that ages are told by.

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::super::meta::{items, text};

pub(super) fn containers(object: &Value, field: &str) -> Value {
    let names: Vec<&str> = items(object, "/spec/template/spec/containers")
        .filter_map(|container| container[field].as_str())
        .collect();
    names.join(",").into()
}

pub(super) fn subjects(binding: &Value, kind: &str) -> Value {
    let name = |subject: &Value| match text(subject, "/namespace") {
        "" => text(subject, "/name").to_owned(),
        namespace => format!("{namespace}/{}", text(subject, "/name")),
    };
    let named = items(binding, "/subjects").filter(|subject| subject["kind"] == kind);
    named.map(name).collect::<Vec<_>>().join(", ").into()
}

pub(super) fn endpoints(object: &Value) -> Value {
    let mut all = Vec::new();
    for subset in items(object, "/subsets") {
        for address in items(subset, "/addresses") {
            for port in items(subset, "/ports") {
                all.push(format!("{}:{}", text(address, "/ip"), port["port"]));
            }
        }
    }
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    or_none(&shortened(&all))
}

/// The first three, and how many more there are.
pub(super) fn shortened(all: &[&str]) -> String {
    let shown = all.iter().take(3).copied().collect::<Vec<_>>().join(",");
    if all.len() > 3 { format!("{shown} + {} more...", all.len() - 3) } else { shown }
}

pub(super) fn node_address(node: &Value, kind: &str) -> Value {
    let found = items(node, "/status/addresses").find(|address| address["type"] == kind);
    or_none(found.map(|address| text(address, "/address")).unwrap_or_default())
}

pub(super) fn pairs(labels: &Value) -> Value {
    let pair = |(key, value): (&String, &Value)| format!("{key}={}", value.as_str().unwrap_or_default());
    or_none(&labels.as_object().into_iter().flatten().map(pair).collect::<Vec<_>>().join(","))
}

pub(super) fn count(object: &Value, path: &str) -> i64 {
    object.pointer(path).and_then(Value::as_i64).unwrap_or(0)
}

pub(super) fn size(map: &Value) -> usize {
    map.as_object().map_or(0, serde_json::Map::len)
}

pub(super) fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>" } else { text }.into()
}

pub(super) fn or_unknown(text: &str) -> Value {
    if text.is_empty() { "<unknown>" } else { text }.into()
}

/// How long ago `time` was, in the short form of `kubectl`.
pub(in super::super) fn age(time: &str) -> String {
    between(time, "").unwrap_or_else(|| "<unknown>".to_owned())
}

/// From `start` to `end`, or to now when `end` is empty.
pub(super) fn between(start: &str, end: &str) -> Option<String> {
    let start: Timestamp = start.parse().ok()?;
    let end = if end.is_empty() { Timestamp::now() } else { end.parse().ok()? };
    Some(human(end.as_second().saturating_sub(start.as_second()).max(0)))
}

/// Two units at most, as `k8s.io/apimachinery/pkg/util/duration.HumanDuration`.
fn human(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: i64, unit: &str, small: i64, below: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{below}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::{human, shortened};

    #[test]
    fn durations_are_short() {
        for (seconds, expect) in [
            (0, "0s"),
            (119, "119s"),
            (125, "2m5s"),
            (3000, "50m"),
            (3 * 3600 + 60, "3h1m"),
            (10 * 3600, "10h"),
            (3 * 86_400, "3d"),
            (30 * 86_400, "30d"),
            (3 * 365 * 86_400 + 86_400, "3y1d"),
            (9 * 365 * 86_400 + 86_400, "9y"),
        ] {
            assert_eq!(human(seconds), expect);
        }
        assert_eq!(shortened(&["a", "b", "c", "d"]), "a,b,c + 1 more...");
    }
}
