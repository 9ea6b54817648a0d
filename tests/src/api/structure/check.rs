//! Whether a value is what its schema says, in the words of the real server.
//! Reference: `k8s.io/kube-openapi/pkg/validation/errors` and `apiextensions-apiserver/pkg/apiserver/validation`.

use serde_json::{Map, Number, Value};

use super::{ListType, Schema, Type, below, format};

/// Faults found: field path and what is wrong.
pub(in super::super) type Faults = Vec<(String, String)>;

/// The faults of `value`, which is at `path` of its object (empty for the object itself) and takes the place of `old`.
/// What has not changed is not looked at ("validation ratcheting"): a definition may have become stricter meanwhile.
pub(in super::super) fn faults(schema: &Schema, value: &Value, old: Option<&Value>, path: &str) -> Faults {
    let mut faults = Vec::new();
    check(schema, value, old, path, &mut faults);
    faults
}

fn check(schema: &Schema, value: &Value, old: Option<&Value>, path: &str, faults: &mut Faults) {
    if value.is_null() && schema.nullable || old == Some(value) {
        return;
    }
    if let Some(wanted) = mistyped(schema, value) {
        let found = type_name(value);
        let why = format!("{path} in body must be of type {wanted}: \"{found}\"");
        return faults.push(fault(path, &format!("Invalid value: \"{found}\": {why}")));
    }
    if let Some(values) = &schema.values
        && !values.contains(value)
    {
        let supported: Vec<String> = values.iter().map(Value::to_string).collect();
        let why = format!("Unsupported value: {value}: supported values: {}", supported.join(", "));
        faults.push(fault(path, &why));
    }
    match value {
        Value::String(text) => string(schema, text, path, faults),
        Value::Number(value) => number(schema, value, path, faults),
        Value::Array(items) => array(schema, items, old, path, faults),
        Value::Object(fields) => object(schema, fields, old, path, faults),
        Value::Null | Value::Bool(_) => {}
    }
    junctions(schema, value, path, faults);
}

/// A fault at a path, which is empty for the object itself.
pub(in super::super) fn fault(path: &str, why: &str) -> (String, String) {
    (if path.is_empty() { "<nil>" } else { path }.to_owned(), why.to_owned())
}

/// The type the value should have had.
fn mistyped(schema: &Schema, value: &Value) -> Option<&'static str> {
    if schema.int_or_string {
        return (!value.is_string() && !is_integer(value)).then_some("integer,string");
    }
    let wanted = schema.kind?;
    let fits = match wanted {
        Type::Array => value.is_array(),
        Type::Boolean => value.is_boolean(),
        Type::Integer => is_integer(value),
        Type::Number => value.is_number(),
        Type::Object => value.is_object(),
        Type::String => value.is_string(),
    };
    (!fits).then_some(wanted.name())
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_integer(value) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn string(schema: &Schema, text: &str, path: &str, faults: &mut Faults) {
    let value = Value::from(text);
    let mut invalid =
        |why: &str| faults.push(fault(path, &format!("Invalid value: {value}: {path} in body {why}")));
    if let Some(pattern) = schema.pattern.as_ref().filter(|pattern| !pattern.0.is_match(text)) {
        invalid(&format!("should match '{}'", pattern.0.as_str()));
    }
    if !format::holds(&schema.format, text) {
        invalid(&format!("must be of type {}: {value}", schema.format));
    }
    let length = text.chars().count();
    if let Some(least) = schema.min_length.filter(|least| length < *least) {
        invalid(&format!("should be at least {least} chars long"));
    }
    if let Some(most) = schema.max_length.filter(|most| length > *most) {
        faults.push(fault(path, &format!("Too long: may not be more than {most} bytes")));
    }
}

fn number(schema: &Schema, value: &Number, path: &str, faults: &mut Faults) {
    let Some(number) = value.as_f64() else { return };
    let mut invalid = |why: String| {
        faults.push(fault(path, &format!("Invalid value: {value}: {path} in body should be {why}")));
    };
    if let Some(least) = schema.minimum {
        if schema.exclusive_minimum && number <= least {
            invalid(format!("greater than {least}"));
        } else if number < least {
            invalid(format!("greater than or equal to {least}"));
        }
    }
    if let Some(most) = schema.maximum {
        if schema.exclusive_maximum && number >= most {
            invalid(format!("less than {most}"));
        } else if number > most {
            invalid(format!("less than or equal to {most}"));
        }
    }
    if let Some(step) = schema.multiple_of.filter(|step| *step != 0.0 && (number / step).fract() != 0.0) {
        invalid(format!("a multiple of {step}"));
    }
}

fn array(schema: &Schema, items: &[Value], old: Option<&Value>, path: &str, faults: &mut Faults) {
    let count = items.len();
    if let Some(least) = schema.min_items.filter(|least| count < *least) {
        let why = format!("Invalid value: {count}: {path} in body should have at least {least} items");
        faults.push(fault(path, &why));
    }
    if let Some(most) = schema.max_items.filter(|most| count > *most) {
        faults.push(fault(path, &format!("Too many: {count}: must have at most {most} items")));
    }
    if let Some(of_items) = &schema.items {
        for (index, item) in items.iter().enumerate() {
            check(of_items, item, schema.old_item(item, old), &format!("{path}[{index}]"), faults);
        }
    }
    // What identifies an item: in a set the item itself, in a map its keys, a default where the item names none.
    let identity = |item: &Value| -> Value {
        if schema.list_type == ListType::Set {
            return item.clone();
        }
        let default = |key: &String| schema.items.as_ref()?.properties.get(key)?.default.clone();
        let key = |key: &String| Some((key.clone(), item.get(key).cloned().or_else(|| default(key))?));
        schema.list_map_keys.iter().filter_map(key).collect::<Map<_, _>>().into()
    };
    if schema.list_type == ListType::Atomic {
        return;
    }
    let mut seen: Vec<Value> = Vec::with_capacity(count);
    for (index, item) in items.iter().enumerate() {
        let identity = identity(item);
        if seen.contains(&identity) {
            faults.push(fault(&format!("{path}[{index}]"), &format!("Duplicate value: {identity}")));
        }
        seen.push(identity);
    }
}

fn object(
    schema: &Schema,
    fields: &Map<String, Value>,
    old: Option<&Value>,
    path: &str,
    faults: &mut Faults,
) {
    let count = fields.len();
    if let Some(least) = schema.min_properties.filter(|least| count < *least) {
        let why = format!("Invalid value: {count}: {path} in body should have at least {least} properties");
        faults.push(fault(path, &why));
    }
    if let Some(most) = schema.max_properties.filter(|most| count > *most) {
        faults.push(fault(path, &format!("Too many: {count}: must have at most {most} items")));
    }
    for name in schema.required.iter().filter(|name| !fields.contains_key(*name)) {
        faults.push(fault(&below(path, name), "Required value"));
    }
    for (name, value) in fields {
        if let Some(of_field) = schema.property(name) {
            check(of_field, value, schema.old_field(name, old), &below(path, name), faults);
        }
    }
    if schema.embedded {
        for name in ["apiVersion", "kind"] {
            if fields.get(name).and_then(Value::as_str).is_none_or(str::is_empty) {
                faults.push(fault(&below(path, name), "Required value: must not be empty"));
            }
        }
    }
}

/// `allOf`, `anyOf`, `oneOf` and `not`.
fn junctions(schema: &Schema, value: &Value, path: &str, faults: &mut Faults) {
    let tried = |schemas: &[Schema]| -> Vec<Faults> {
        schemas.iter().map(|schema| self::faults(schema, value, None, path)).collect()
    };
    let mut composite = |why: &str, best: Option<Faults>| {
        faults.push(fault(path, &format!("Invalid value: \"\": \"{path}\" must {why}")));
        faults.extend(best.into_iter().flatten());
    };
    // Of the alternatives that fail, the nearest miss is told as well.
    let nearest = |tried: Vec<Faults>| tried.into_iter().min_by_key(Vec::len);
    let failed: Faults = tried(&schema.all_of).into_iter().flatten().collect();
    if !failed.is_empty() {
        composite("validate all the schemas (allOf)", Some(failed));
    }
    let any = tried(&schema.any_of);
    if !any.is_empty() && !any.iter().any(Vec::is_empty) {
        composite("validate at least one schema (anyOf)", nearest(any));
    }
    let one = tried(&schema.one_of);
    match one.iter().filter(|faults| faults.is_empty()).count() {
        _ if one.is_empty() => {}
        1 => {}
        0 => composite("validate one and only one schema (oneOf). Found none valid", nearest(one)),
        valid => {
            let why = format!("validate one and only one schema (oneOf). Found {valid} valid alternatives");
            composite(&why, None);
        }
    }
    if schema.not.as_ref().is_some_and(|not| self::faults(not, value, None, path).is_empty()) {
        composite("not validate the schema (not)", None);
    }
}

#[cfg(test)]
mod tests;
