//! Values of objects as the language sees them: by their schema, so that a whole number of type `number` is a double,
//! and with only those fields that the schema names.
//! Reference: `k8s.io/apiserver/pkg/cel/common/values.go`, `k8s.io/apiserver/pkg/cel/escaping.go`.

use std::collections::HashMap;
use std::sync::Arc;

use cel::objects::{Key, Map};
use cel::{Context, Program, Value as Cel};
use serde_json::Value;

use super::super::meta;
use super::super::structure::{Schema, Type};
use super::expression::ENVIRONMENT;

/// The value of a node; of a whole object also what every object has.
pub(super) fn of(schema: &Schema, value: &Value, resource: bool) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(value) => Cel::Bool(*value),
        Value::Number(number) => match number.as_i64().filter(|_| schema.kind != Some(Type::Number)) {
            Some(whole) => Cel::Int(whole),
            None => Cel::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => string(&schema.format, text),
        Value::Array(items) => {
            let none = Schema::default();
            let of_items = schema.items.as_deref().unwrap_or(&none);
            Cel::List(Arc::new(items.iter().map(|item| of(of_items, item, of_items.embedded)).collect()))
        }
        Value::Object(fields) => {
            let mut all = HashMap::new();
            for (name, value) in fields {
                if let Some(schema) = schema.properties.get(name) {
                    all.insert(Key::from(escaped(name)), of(schema, value, schema.embedded));
                } else if let Some(schema) = schema.additional() {
                    all.insert(Key::from(name.as_str()), of(schema, value, schema.embedded));
                }
            }
            if resource {
                all.extend(of_resource(value));
            }
            Cel::Map(Map { map: Arc::new(all) })
        }
    }
}

/// What rules may know of any object.
fn of_resource(object: &Value) -> impl Iterator<Item = (Key, Cel)> {
    let texts = |object: &Value, names: &[&str]| -> HashMap<Key, Cel> {
        let found = names.iter().filter_map(|name| Some((*name, object.get(*name)?.as_str()?)));
        found.map(|(name, text)| (Key::from(name), Cel::from(text))).collect()
    };
    let metadata = Map { map: Arc::new(texts(&object["metadata"], &["name", "generateName"])) };
    let metadata = (Key::from("metadata"), Cel::Map(metadata));
    texts(object, &["apiVersion", "kind"]).into_iter().chain([metadata])
}

fn string(format: &str, text: &str) -> Cel {
    let plain = || Cel::from(text);
    match format {
        "byte" => meta::from_base64(text).map_or_else(plain, |bytes| Cel::Bytes(Arc::new(bytes))),
        "date-time" => converted("timestamp(text)", text).unwrap_or_else(plain),
        "date" => converted("timestamp(text + 'T00:00:00Z')", text).unwrap_or_else(plain),
        "duration" => converted("duration(text)", text).unwrap_or_else(plain),
        _ => plain(),
    }
}

/// Times are read by the language itself.
fn converted(expression: &str, text: &str) -> Option<Cel> {
    let mut context = Context::with_env(ENVIRONMENT.clone());
    context.add_variable_from_value("text", text);
    Program::compile(expression).ok()?.execute(&context).ok()
}

/// A property's name as an identifier of the language.
pub(super) fn escaped(name: &str) -> String {
    const KEYWORDS: [&str; 20] = [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
    ];
    if KEYWORDS.contains(&name) || name == "while" {
        return format!("__{name}__");
    }
    name.replace("__", "__underscores__")
        .replace('.', "__dot__")
        .replace('-', "__dash__")
        .replace('/', "__slash__")
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn names_become_identifiers() {
        for (name, expect) in [
            ("plain_name", "plain_name"),
            ("namespace", "__namespace__"),
            ("a.b/c-d", "a__dot__b__slash__c__dash__d"),
            ("a__b", "a__underscores__b"),
        ] {
            assert_eq!(escaped(name), expect);
        }
    }
}
