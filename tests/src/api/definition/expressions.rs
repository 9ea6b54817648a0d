//! Whether the rules of a schema fit its types. Pure.
//! Reference: `ValidateCustomResourceDefinitionOpenAPISchema` in
//! `k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation/validation.go`.

use super::super::structure::check::Faults;
use super::super::structure::{ListType, MapType, Schema};

/// The faults of the rules of a whole object's schema, which is at `path` of the definition.
pub(super) fn check(schema: &Schema, path: &str) -> Faults {
    let mut found = Vec::new();
    node(schema, true, path, None, &mut found);
    found
}

/// `apart` is the part of the schema whose old and new values nothing tells apart, if the node is in one.
fn node(schema: &Schema, resource: bool, path: &str, apart: Option<&str>, found: &mut Faults) {
    for (index, rule) in schema.rules.iter().enumerate() {
        let path = format!("{path}.x-kubernetes-validations[{index}]");
        let mistakes = rule.mistakes(schema, resource).into_iter();
        found.extend(mistakes.map(|(field, why)| (format!("{path}.{field}"), why)));
        if let Some(apart) = apart.filter(|_| rule.is_transition()) {
            let why = "oldSelf cannot be used on the uncorrelatable portion of the schema within";
            found.push((format!("{path}.rule"), format!("Invalid value: {:?}: {why} {apart}", rule.text())));
        }
    }
    let of_fields = apart.or((schema.map_type == MapType::Atomic).then_some(path));
    for (name, property) in &schema.properties {
        node(property, property.embedded, &format!("{path}.properties[{name}]"), of_fields, found);
    }
    if let Some(values) = schema.additional() {
        node(values, values.embedded, &format!("{path}.additionalProperties"), of_fields, found);
    }
    if let Some(items) = &schema.items {
        let of_items = apart.or((schema.list_type != ListType::Map).then_some(path));
        node(items, items.embedded, &format!("{path}.items"), of_items, found);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::check;
    use crate::api::structure::Schema;

    /// Field and reason of each fault, without the source that a reason may show.
    fn told(schema: &Value) -> Vec<String> {
        let schema = Schema::parse(schema).unwrap();
        let first = |why: &str| why.lines().next().unwrap_or_default().to_owned();
        check(&schema, "s").into_iter().map(|(field, why)| format!("{field}: {}", first(&why))).collect()
    }

    fn spec(rule: &Value) -> Value {
        json!({"type": "object", "properties": {"spec": {
            "type": "object",
            "properties": {
                "n": {"type": "integer"}, "x": {"type": "number"}, "s": {"type": "string"}, "b": {"type": "boolean"},
                "any": {"x-kubernetes-int-or-string": true}, "at": {"type": "string", "format": "date-time"},
                "list": {"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}}},
                "map": {"type": "object", "additionalProperties": {"type": "integer"}},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "a-b": {"type": "string"}, "namespace": {"type": "string"},
            },
            "x-kubernetes-validations": [rule],
        }}})
    }

    #[test]
    fn rules_that_fit() {
        for rule in [
            "self.n < 3 && self.x >= 1.0 && self.n < self.x && self.s == 'a' && self.b",
            "has(self.s) ? self.s.size() > 0 : !has(self.n)",
            "self.any == 3 || self.any == 'x' || type(self.any) == int",
            "self.at > timestamp('2020-01-01T00:00:00Z') && self.at.getFullYear() > 2000",
            "self.list.all(i, i.k.startsWith('a')) && self.list[0].k in ['a', 'b'] && size(self.list) > 1",
            "self.list.map(i, i.k).exists_one(k, k == 'a') && self.list.filter(i, has(i.k)).size() == 1",
            "self.map.all(k, k.startsWith('a') && self.map[k] > 0) && 'a' in self.map && self.map.a > 0",
            "self.a__dash__b == self.__namespace__ && [self.s, self.a__dash__b] in [['a', 'b'], ['', 'b']]",
            "self == oldSelf || self.s != oldSelf.s || oldSelf.?s.orValue('x') == 'x' || self.?map[?'a'].hasValue()",
            "(has(self.n) ? 1 : 0) + (has(self.s) ? 1 : 0) <= 1 && self.n in [] && {'a': 1}.a == 1",
            "duration('1h') > duration('1m') && isURL(self.s) && url(self.s).getScheme() in ['http', 'https']",
            "!ip.isCanonical(self.s) && cidr(self.s).containsIP(ip(self.s)) && sets.contains([1], [self.n])",
            "quantity(self.s).isGreaterThan(quantity('1')) && int(self.s) < 3 && dyn(self.n) == 'x'",
            "self.s == null || [1, 2].sum() == 3 && self.s.matches(r'^a.c$') && self.s.split('.')[0] != ''",
            "self.list.all(a, self.list.exists_one(b, a.k == b.k)) && optional.of(self.n).value() == 1",
        ] {
            assert_eq!(told(&spec(&json!({"rule": rule}))), [""; 0], "{rule}");
        }
    }

    #[test]
    fn rules_that_do_not() {
        for (rule, expect) in [
            ("self.m > 1", "1:5: undefined field 'm'"),
            ("self.s == 'a' || has(self.m)", "1:21: undefined field 'm'"),
            ("self.list.all(i, i.j == 'a')", "1:19: undefined field 'j'"),
            ("self.open.a == 1", "1:10: undefined field 'a'"),
            ("self.?m.hasValue()", "1:5: undefined field 'm'"),
            ("self.metadata.name == 'a'", "1:5: undefined field 'metadata'"),
            ("self.s.k == 'a'", "1:7: type 'string' does not support field selection"),
            ("self.n > 'a'", "1:8: found no matching overload for '_>_' applied to '(int, string)'"),
            ("self.n == 1.0", "1:8: found no matching overload for '_==_' applied to '(int, double)'"),
            ("self.n && self.b", "1:8: found no matching overload for '_&&_' applied to '(int, bool)'"),
            (
                "self.n.startsWith('a')",
                "1:18: found no matching overload for 'startsWith' applied to 'int.(string)'",
            ),
            (
                "self.map['a'] == 'b'",
                "1:15: found no matching overload for '_==_' applied to '(int, string)'",
            ),
            (
                "self.list.all(i, i.k)",
                "1:14: found no matching overload for '_&&_' applied to '(bool, string)'",
            ),
            (
                "self.n.all(i, i > 1)",
                "1:5: expression of type 'int' cannot be range of a comprehension (must be list, map, or dynamic)",
            ),
            (
                "self.s in [1, 2]",
                "1:8: found no matching overload for '@in' applied to '(string, list(int))'",
            ),
            ("[1, 'a'].size() == 2", "1:5: expected type 'int' but found 'string'"),
            ("self.s.sise() == 1", "1:12: undeclared reference to 'sise' (in container '')"),
            (
                "self.list.map(i, i.k)[0] == 1",
                "1:26: found no matching overload for '_==_' applied to '(string, int)'",
            ),
            ("self.s", "1:5: cel expression must evaluate to a bool"),
            ("self.s ==\n  self.m", "2:7: undefined field 'm'"),
        ] {
            let expect = format!(
                "s.properties[spec].x-kubernetes-validations[0].rule: Invalid value: {rule:?}: compilation failed: ERROR: \
                 <input>:{expect}"
            );
            assert_eq!(told(&spec(&json!({"rule": rule}))), [expect]);
        }
    }

    #[test]
    fn the_rest_of_a_rule() {
        for (rest, expect) in [
            (json!({"messageExpression": "'n is ' + string(self.n)", "fieldPath": ".n"}), None),
            (json!({"fieldPath": ".map['a']", "message": "m"}), None),
            (
                json!({"messageExpression": "self.n"}),
                Some(
                    "messageExpression: Invalid value: \"self.n\": compilation failed: ERROR: <input>:1:5: messageExpression must evaluate to a string",
                ),
            ),
            (
                json!({"messageExpression": "self.m"}),
                Some(
                    "messageExpression: Invalid value: \"self.m\": compilation failed: ERROR: <input>:1:5: undefined field 'm'",
                ),
            ),
            (
                json!({"message": "a\nb"}),
                Some("message: Invalid value: \"a\\nb\": message must not contain line breaks"),
            ),
            (
                json!({"fieldPath": ".m"}),
                Some(
                    "fieldPath: Invalid value: \".m\": fieldPath must be a valid path: does not refer to a valid field",
                ),
            ),
            (
                json!({"fieldPath": ".list[0]"}),
                Some(
                    "fieldPath: Invalid value: \".list[0]\": fieldPath must be a valid path: does not refer to a valid field",
                ),
            ),
        ] {
            let mut rule = rest.clone();
            rule["rule"] = "self.b".into();
            let expect: Vec<String> = expect
                .iter()
                .map(|why| format!("s.properties[spec].x-kubernetes-validations[0].{why}"))
                .collect();
            assert_eq!(told(&spec(&rule)), expect, "{rest}");
        }
    }

    #[test]
    fn whole_objects_have_names() {
        let rules = json!([{"rule": "self.metadata.name.size() < 5 && self.kind == 'K' && has(self.metadata.generateName)"}]);
        let object = json!({"type": "object", "x-kubernetes-validations": rules});
        assert_eq!(told(&object), [""; 0]);
        let mut embedded = object;
        embedded["x-kubernetes-embedded-resource"] = true.into();
        assert_eq!(told(&json!({"type": "object", "properties": {"template": embedded}})), [""; 0]);
        let labels = json!([{"rule": "self.metadata.labels.size() < 5"}]);
        assert_eq!(told(&json!({"type": "object", "x-kubernetes-validations": labels})).len(), 1);
    }

    #[test]
    fn old_values_are_known_only_where_something_tells_which_is_which() {
        let item = json!({"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}]});
        let object =
            json!({"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": item}});
        let list = |kind: &str| json!({"type": "array", "items": object, "x-kubernetes-list-type": kind, "x-kubernetes-list-map-keys": ["k"]});
        for (schema, expect) in [
            (list("map"), None),
            (json!({"type": "object", "additionalProperties": item}), None),
            (list("atomic"), Some("s.properties[f].items.properties[v]")),
            (
                json!({"type": "array", "items": item, "x-kubernetes-list-type": "set"}),
                Some("s.properties[f].items"),
            ),
            (
                json!({"type": "object", "additionalProperties": item, "x-kubernetes-map-type": "atomic"}),
                Some("s.properties[f].additionalProperties"),
            ),
        ] {
            let why =
                "oldSelf cannot be used on the uncorrelatable portion of the schema within s.properties[f]";
            let expect: Vec<String> = expect
                .iter()
                .map(|at| {
                    format!(
                        "{at}.x-kubernetes-validations[0].rule: Invalid value: \"self == oldSelf\": {why}"
                    )
                })
                .collect();
            assert_eq!(told(&json!({"type": "object", "properties": {"f": schema}})), expect, "{schema}");
        }
    }
}
