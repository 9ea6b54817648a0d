//! Label and field selectors: parsing what clients send and matching objects, as pure functions.
//! A field selector may name any scalar by its path (`spec.nodeName`); what is missing counts as "".

use serde_json::Value;

use super::meta;
use super::status::Status;

/// Which objects a list or watch is about. The default selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    labels: Vec<Requirement>,
    pub(super) fields: Vec<FieldRequirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    rule: Rule,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Missing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FieldRequirement {
    pub(super) path: String,
    value: String,
    equal: bool,
}

impl Selector {
    /// Selects everything.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Parses `labelSelector` and `fieldSelector` as sent by clients; either may be empty.
    pub fn parse(labels: &str, fields: &str) -> Result<Self, Status> {
        Ok(Self { labels: parse_labels(labels)?, fields: parse_fields(fields)? })
    }

    /// A label selector such as `app=a,tier in (x,y),!old`.
    pub fn labels(selector: &str) -> Result<Self, Status> {
        Self::parse(selector, "")
    }

    /// A field selector such as `spec.nodeName=node1`.
    pub fn fields(selector: &str) -> Result<Self, Status> {
        Self::parse("", selector)
    }

    /// A `metav1.LabelSelector` (`matchLabels`, `matchExpressions`), as in a Deployment's `spec.selector`.
    pub fn of_label_selector(selector: &Value) -> Self {
        let equal =
            selector["matchLabels"].as_object().into_iter().flatten().map(|(key, value)| Requirement {
                key: key.clone(),
                rule: Rule::In(vec![value.as_str().unwrap_or_default().to_owned()]),
            });
        let expressions = meta::items(selector, "/matchExpressions").map(expression);
        Self { labels: equal.chain(expressions).collect(), fields: Vec::new() }
    }

    /// A plain map of labels, all of which must be equal, as in a Service's `spec.selector`.
    pub fn of_labels(labels: &Value) -> Self {
        Self::of_label_selector(&serde_json::json!({"matchLabels": labels}))
    }

    /// Whether `object` is selected.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.labels.iter().all(|requirement| requirement.matches(labels))
            && self.fields.iter().all(|requirement| requirement.matches(object))
    }
}

/// As `kubectl -l` takes the labels.
impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = |Requirement { key, rule }: &Requirement| match rule {
            Rule::In(values) if values.len() == 1 => format!("{key}={}", values[0]),
            Rule::In(values) => format!("{key} in ({})", values.join(",")),
            Rule::NotIn(values) => format!("{key} notin ({})", values.join(",")),
            Rule::Exists => key.clone(),
            Rule::Missing => format!("!{key}"),
        };
        f.write_str(&self.labels.iter().map(part).collect::<Vec<_>>().join(","))
    }
}

impl Requirement {
    fn matches(&self, labels: &Value) -> bool {
        let value = labels.get(&self.key).and_then(Value::as_str);
        match &self.rule {
            Rule::In(values) => value.is_some_and(|value| values.iter().any(|wanted| wanted == value)),
            Rule::NotIn(values) => !value.is_some_and(|value| values.iter().any(|wanted| wanted == value)),
            Rule::Exists => value.is_some(),
            Rule::Missing => value.is_none(),
        }
    }
}

impl FieldRequirement {
    fn matches(&self, object: &Value) -> bool {
        let pointer = format!("/{}", self.path.replace('.', "/"));
        let equal = match object.pointer(&pointer) {
            Some(Value::String(value)) => *value == self.value,
            Some(Value::Bool(value)) => value.to_string() == self.value,
            Some(Value::Number(value)) => value.to_string() == self.value,
            // What is not set is false where it is one or the other.
            _ if ["spec.unschedulable", "spec.hostNetwork"].contains(&self.path.as_str()) => {
                self.value == "false"
            }
            _ => self.value.is_empty(),
        };
        equal == self.equal
    }
}

fn expression(expression: &Value) -> Requirement {
    let values = || meta::items(expression, "/values").filter_map(Value::as_str).map(str::to_owned).collect();
    let rule = match meta::text(expression, "/operator") {
        "NotIn" => Rule::NotIn(values()),
        "Exists" => Rule::Exists,
        "DoesNotExist" => Rule::Missing,
        _ => Rule::In(values()),
    };
    Requirement { key: meta::text(expression, "/key").to_owned(), rule }
}

/// Splits at commas that are outside parentheses.
fn parts(selector: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    selector
        .split(|letter| {
            match letter {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            letter == ',' && depth == 0
        })
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect()
}

fn parse_labels(selector: &str) -> Result<Vec<Requirement>, Status> {
    parts(selector).into_iter().map(parse_requirement).collect()
}

fn parse_requirement(part: &str) -> Result<Requirement, Status> {
    let made = |key: &str, rule| Ok(Requirement { key: key.trim().to_owned(), rule });
    if let Some(key) = part.strip_prefix('!') {
        return made(key, Rule::Missing);
    }
    if let Some(rest) = part.strip_suffix(')') {
        let (head, values) = rest.split_once('(').ok_or_else(|| malformed(part))?;
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        return match head.split_whitespace().collect::<Vec<_>>()[..] {
            [key, "in"] => made(key, Rule::In(values)),
            [key, "notin"] => made(key, Rule::NotIn(values)),
            _ => Err(malformed(part)),
        };
    }
    let one = |value: &str| vec![value.trim().to_owned()];
    if let Some((key, value)) = part.split_once("!=") {
        return made(key, Rule::NotIn(one(value)));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return made(key, Rule::In(one(value)));
    }
    if part.contains(char::is_whitespace) { Err(malformed(part)) } else { made(part, Rule::Exists) }
}

fn parse_fields(selector: &str) -> Result<Vec<FieldRequirement>, Status> {
    parts(selector)
        .into_iter()
        .map(|part| {
            let (split, equal) = match part.split_once("!=") {
                Some(split) => (Some(split), false),
                None => (part.split_once("==").or_else(|| part.split_once('=')), true),
            };
            let (path, value) = split.ok_or_else(|| malformed(part))?;
            Ok(FieldRequirement { path: path.trim().to_owned(), value: value.trim().to_owned(), equal })
        })
        .collect()
}

fn malformed(part: &str) -> Status {
    Status::bad_request(format!("unable to parse requirement: invalid selector: '{part}'"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Selector;

    fn pod() -> serde_json::Value {
        json!({
            "metadata": {"name": "a", "namespace": "n", "labels": {"app": "web", "tier": "front"}},
            "spec": {"nodeName": "node1", "hostNetwork": true},
            "status": {"phase": "Running"},
        })
    }

    #[test]
    fn label_selectors() {
        for (selector, expect) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app=api", false),
            ("app!=api", true),
            ("missing!=x", true),
            ("app in (api, web)", true),
            ("app notin (api,web),tier", false),
            ("tier", true),
            ("!tier", false),
            ("!missing", true),
            ("tier in (back,front),app=web", true),
        ] {
            assert_eq!(Selector::labels(selector).unwrap().matches(&pod()), expect, "{selector}");
        }
    }

    #[test]
    fn field_selectors() {
        for (selector, expect) in [
            ("metadata.name=a", true),
            ("metadata.name=b", false),
            ("spec.nodeName=node1,status.phase=Running", true),
            ("spec.nodeName!=node1", false),
            ("spec.hostNetwork=true", true),
            ("spec.schedulerName=", true),
            ("status.phase!=Failed", true),
        ] {
            assert_eq!(Selector::fields(selector).unwrap().matches(&pod()), expect, "{selector}");
        }
    }

    #[test]
    fn malformed_selectors_are_refused() {
        for selector in ["app in web", "app is (web)", "two words"] {
            assert_eq!(Selector::labels(selector).unwrap_err().code, 400, "{selector}");
        }
        assert_eq!(Selector::fields("metadata.name").unwrap_err().code, 400);
    }

    #[test]
    fn label_selector_objects() {
        let selector = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["back"]}],
        });
        assert!(Selector::of_label_selector(&selector).matches(&pod()));
        assert!(!Selector::of_labels(&json!({"app": "web", "tier": "back"})).matches(&pod()));
        assert_eq!(Selector::of_label_selector(&selector).to_string(), "app=web,tier notin (back)");
    }
}
