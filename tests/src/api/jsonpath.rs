//! The JSON paths of printer columns and scales: `.a.b`, `['a.b']`, `[0]`, `[-1]`, `[*]`, `[?(@.type=="Ready")]`. Pure.
//! Reference: `k8s.io/client-go/util/jsonpath`, of which this is the part that definitions use.

use serde_json::Value;

/// A path, parsed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Path(Vec<Step>);

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    /// From the end if negative.
    Index(i64),
    Every,
    /// Items whose value at the path is equal to the text (or, if false, is not).
    Where(Path, String, bool),
}

impl Path {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let malformed = || format!("{text:?} is no JSON path that starts with a dot");
        let mut steps = Vec::new();
        let mut rest = text;
        if !rest.starts_with(['.', '[']) {
            return Err(malformed());
        }
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let (inside, after) = bracket(inner).ok_or_else(malformed)?;
                steps.push(Step::parse(inside.trim()).ok_or_else(malformed)?);
                rest = after;
            } else {
                let name = rest.strip_prefix('.').ok_or_else(malformed)?;
                let end = field_end(name);
                let field = name[..end].replace('\\', "");
                match field.as_str() {
                    "" if name.starts_with('[') => {}
                    "" => return Err(malformed()),
                    "*" => steps.push(Step::Every),
                    _ => steps.push(Step::Field(field)),
                }
                rest = &name[end..];
            }
        }
        Ok(Self(steps))
    }

    /// What the path leads to, in order.
    pub(super) fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        self.0
            .iter()
            .fold(vec![value], |found, step| found.into_iter().flat_map(|value| step.find(value)).collect())
    }

    /// The names of a path that has fields only.
    pub(super) fn names(&self) -> Option<Vec<&str>> {
        let names =
            self.0.iter().map(|step| if let Step::Field(name) = step { Some(name.as_str()) } else { None });
        names.collect()
    }

    /// The JSON pointer of a path that has fields only.
    pub(super) fn pointer(&self) -> Option<String> {
        let names = self.names()?.into_iter();
        Some(names.map(|name| format!("/{}", name.replace('~', "~0").replace('/', "~1"))).collect())
    }
}

impl Step {
    fn parse(inside: &str) -> Option<Self> {
        if inside == "*" {
            return Some(Self::Every);
        }
        if let Some(name) = quoted(inside) {
            return Some(Self::Field(name.to_owned()));
        }
        if let Some(condition) = inside.strip_prefix("?(").and_then(|inside| inside.strip_suffix(')')) {
            let (path, wanted, equal) = match condition.split_once("==") {
                Some((path, wanted)) => (path, wanted, true),
                None => condition.split_once("!=").map(|(path, wanted)| (path, wanted, false))?,
            };
            let path = Path::parse(path.trim().strip_prefix('@')?).ok()?;
            let wanted = wanted.trim();
            return Some(Self::Where(path, quoted(wanted).unwrap_or(wanted).to_owned(), equal));
        }
        inside.parse().ok().map(Self::Index)
    }

    fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match (self, value) {
            (Self::Field(name), Value::Object(fields)) => fields.get(name).into_iter().collect(),
            (Self::Index(index), Value::Array(items)) => {
                let from_end = usize::try_from(index.unsigned_abs()).ok();
                let at = if *index < 0 {
                    from_end.and_then(|back| items.len().checked_sub(back))
                } else {
                    from_end
                };
                at.and_then(|at| items.get(at)).into_iter().collect()
            }
            (Self::Every, Value::Array(items)) => items.iter().collect(),
            (Self::Every, Value::Object(fields)) => fields.values().collect(),
            (Self::Where(path, wanted, equal), Value::Array(items)) => {
                let fits = |item: &&Value| {
                    let text =
                        |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    path.find(item).first().is_some_and(|found| (text(found) == *wanted) == *equal)
                };
                items.iter().filter(fits).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Splits at the bracket that closes, looking over quotes.
fn bracket(text: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (at, letter) in text.char_indices() {
        match (quote, letter) {
            (None, '\'' | '"') => quote = Some(letter),
            (Some(open), letter) if open == letter => quote = None,
            (None, ']') => return Some((&text[..at], &text[at + 1..])),
            _ => {}
        }
    }
    None
}

/// Where a field's name ends; a backslash keeps the dot after it in the name.
fn field_end(name: &str) -> usize {
    let mut escaped = false;
    for (at, letter) in name.char_indices() {
        if !escaped && (letter == '.' || letter == '[') {
            return at;
        }
        escaped = !escaped && letter == '\\';
    }
    name.len()
}

fn quoted(text: &str) -> Option<&str> {
    ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Path;

    #[test]
    fn paths_lead_to_values() {
        let object = json!({
            "spec": {"ports": [{"name": "a", "n": 1}, {"name": "b", "n": 2}], "a.b/c": 3},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Done", "status": "False"}]},
        });
        for (path, expect) in [
            (".spec.ports[0].n", json!([1])),
            (".spec.ports[-1].n", json!([2])),
            (".spec.ports[9].n", json!([])),
            (".spec.ports[*].n", json!([1, 2])),
            (r".spec.a\.b/c", json!([3])),
            (".spec['a.b/c']", json!([3])),
            (r#".status.conditions[?(@.type=="Ready")].status"#, json!(["True"])),
            (".status.conditions[?(@.type=='Done')].status", json!(["False"])),
            (".status.conditions[?(@.type!='Done')].status", json!(["True"])),
            (".none.at.all", json!([])),
        ] {
            let found: Vec<Value> = Path::parse(path).unwrap().find(&object).into_iter().cloned().collect();
            assert_eq!(Value::from(found), expect, "{path}");
        }
        for path in ["", "spec", ".", ".a..b", ".a[", ".a[x]", ".a[?(x)]"] {
            assert!(Path::parse(path).is_err(), "{path}");
        }
    }

    #[test]
    fn paths_of_fields_are_pointers() {
        assert_eq!(Path::parse(".spec.a/b").unwrap().pointer().as_deref(), Some("/spec/a~1b"));
        assert_eq!(Path::parse(".spec[0]").unwrap().pointer(), None);
    }
}
