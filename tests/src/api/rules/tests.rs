use serde_json::{Value, json};

use super::{exist, faults};
use crate::api::structure::Schema;

/// `expect` is `field: why` of each fault.
#[track_caller]
fn verify(schema: &Value, new: &Value, old: Option<&Value>, expect: &[&str]) {
    let parsed = Schema::parse(schema).unwrap();
    let found = faults(&parsed, new, old);
    let told: Vec<String> = found.iter().map(|(field, why)| format!("{field}: {why}")).collect();
    assert_eq!(told, expect, "{new} after {old:?}");
}

/// A schema whose `spec` has these properties and rules.
fn spec(properties: &Value, rules: &Value) -> Value {
    json!({"type": "object", "properties": {
        "spec": {"type": "object", "properties": properties, "x-kubernetes-validations": rules},
    }})
}

#[test]
fn a_rule_tells_its_field_and_message() {
    let range = json!({"min": {"type": "integer"}, "max": {"type": "integer"}, "name": {"type": "string"}});
    let wrong = json!({"spec": {"min": 3, "max": 1, "name": "x"}});
    for (rule, expect) in [
        (
            json!({"rule": "self.min <= self.max"}),
            "spec: Invalid value: \"object\": failed rule: self.min <= self.max",
        ),
        (
            json!({"rule": "self.min <= self.max", "message": "min over max"}),
            "spec: Invalid value: \"object\": min over max",
        ),
        (
            json!({"rule": "self.min <= self.max", "messageExpression": "'%d over %d'.format([self.min, self.max])"}),
            "spec: Invalid value: \"object\": 3 over 1",
        ),
        (
            json!({"rule": "self.min <= self.max", "message": "no", "messageExpression": "self.none"}),
            "spec: Invalid value: \"object\": no",
        ),
        (
            json!({"rule": "self.min <= self.max", "message": "no", "reason": "FieldValueForbidden", "fieldPath": ".max"}),
            "spec.max: Forbidden: no",
        ),
        (
            json!({"rule": "has(self.other)", "message": "needed", "reason": "FieldValueRequired", "fieldPath": "['other']"}),
            "spec.other: Required value: needed",
        ),
        (
            json!({"rule": "self.other == 1", "message": "m"}),
            "spec: Invalid value: \"object\": No such key: other evaluating rule: m",
        ),
        (
            json!({"rule": "self.name", "message": "m"}),
            "spec: Invalid value: \"object\": rule evaluated to String(\"x\"), which is no boolean: self.name",
        ),
    ] {
        let schema = spec(&range, &json!([rule]));
        verify(&schema, &wrong, None, &[expect]);
    }
    let schema = spec(&range, &json!([{"rule": "self.min <= self.max"}]));
    verify(&schema, &json!({"spec": {"min": 1, "max": 1}}), None, &[]);
    verify(&schema, &json!({}), None, &[]);
    assert!(exist(&Schema::parse(&schema).unwrap()));
}

#[test]
fn rules_that_do_not_compile_are_refused() {
    for (rule, expect) in [
        ("self.a ==", "compilation failed"),
        ("slef.a == 1", "undeclared reference to 'slef'"),
        ("self.all(x, y == 1)", "undeclared reference to 'y'"),
    ] {
        let refused = Schema::parse(&spec(&json!({}), &json!([{"rule": rule}]))).unwrap_err();
        assert!(refused.contains(expect), "{rule}: {refused}");
    }
}

#[test]
fn transitions() {
    let fixed = json!({"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is fixed"}]});
    let item = json!({
        "type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": fixed},
    });
    let schema = json!({"type": "object", "properties": {
        "f": fixed,
        "map": {"type": "array", "items": item, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]},
        "list": {"type": "array", "items": item},
        "once": {"type": "integer", "x-kubernetes-validations": [
            {"rule": "!oldSelf.hasValue() || self >= oldSelf.value()", "optionalOldSelf": true, "message": "grows"},
        ]},
    }});
    let both = |field: &str, old: Value, new: Value, expect: &[&str]| {
        verify(&schema, &json!({field: new}), Some(&json!({field: old})), expect);
    };
    verify(&schema, &json!({"f": "a", "once": 1}), None, &[]);
    verify(&schema, &json!({"f": "a"}), Some(&json!({})), &[]);
    both("f", json!("a"), json!("a"), &[]);
    both("f", json!("a"), json!("b"), &["f: Invalid value: \"string\": is fixed"]);
    let items = |first: &str, value: &str| json!([{"k": first, "v": "x"}, {"k": "b", "v": value}]);
    both(
        "map",
        items("a", "x"),
        json!([{"k": "b", "v": "y"}]),
        &["map[0].v: Invalid value: \"string\": is fixed"],
    );
    both("map", items("a", "x"), items("c", "x"), &[]);
    // Nothing tells which item of a plain list was which.
    both("list", items("a", "x"), items("a", "y"), &[]);
    both("once", json!(2), json!(1), &["once: Invalid value: \"integer\": grows"]);
    both("once", json!(2), json!(3), &[]);
}

#[test]
fn rules_see_what_the_schema_names() {
    let schema = json!({
        "type": "object",
        "properties": {
            "namespace": {"type": "string"}, "a-b": {"type": "number"}, "any": {"x-kubernetes-int-or-string": true},
            "at": {"type": "string", "format": "date-time"}, "for": {"type": "string", "format": "duration"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        },
        "x-kubernetes-validations": [
            {"rule": "self.__namespace__ == 'n' && self.a__dash__b == 1.0"},
            {"rule": "self.kind == 'K' && self.metadata.name == 'm' && !has(self.metadata.labels)"},
            {"rule": "self.at > timestamp('2020-01-01T00:00:00Z') && self.__for__ == duration('90s')"},
            {"rule": "type(self.any) == int ? self.any < 100 : self.any.endsWith('%')"},
            {"rule": "self.labels.all(k, k.startsWith('x/') && size(self.labels[k]) > 0)"},
            {"rule": "!has(self.open.hidden)"},
        ],
    });
    let value = |any: Value, label: &str| {
        json!({
            "kind": "K", "metadata": {"name": "m", "labels": {}}, "namespace": "n", "a-b": 1, "any": any,
            "at": "2025-01-01T00:00:00Z", "for": "1m30s", "labels": {"x/a": label}, "open": {"hidden": 1},
        })
    };
    verify(&schema, &value(json!(3), "v"), None, &[]);
    verify(&schema, &value(json!("3%"), "v"), None, &[]);
    let failed = |rule: &str| format!("<nil>: Invalid value: \"object\": failed rule: {rule}");
    verify(
        &schema,
        &value(json!("3"), ""),
        None,
        &[
            &failed("type(self.any) == int ? self.any < 100 : self.any.endsWith('%')"),
            &failed("self.labels.all(k, k.startsWith('x/') && size(self.labels[k]) > 0)"),
        ],
    );
}

#[test]
fn the_functions_of_kubernetes() {
    for rule in [
        "self.s.matches('^a.c') && self.s.find('b.*') == 'bc' && self.s.findAll('[a-c]').size() == 3",
        "'a,b'.split(',').join('-') == 'a-b' && self.s.upperAscii() == 'ABC' && self.s.indexOf('c') == 2",
        "[1, 2, 3].isSorted() && [1, 2, 3].sum() == 6 && [3, 1].min() == 1 && [3, 1].max() == 3",
        "[1, 2, 1].indexOf(1) == 0 && [1, 2, 1].lastIndexOf(1) == 2 && [1].indexOf(9) == -1",
        "sets.contains([1, 2], [2]) && sets.equivalent([1, 2], [2, 1, 1]) && !sets.intersects([1], [2])",
        "isURL('https://a.b:80/c') && url('https://a.b:80/c').getHost() == 'a.b:80' && !isURL('a b')",
        "url('https://[::1]:80/c').getHostname() == '::1' && url('https://a/c').getScheme() == 'https'",
        "url('https://a:1/c/d').getPort() == '1' && url('https://a/c/d').getEscapedPath() == '/c/d'",
        "isIP('::1') && !isIP('1.2.3') && ip('127.0.0.1').isLoopback() && ip('::1').family() == 6",
        "ip('10.0.0.1').isGlobalUnicast() && ip.isCanonical('::1') && !ip.isCanonical('::0:1')",
        "isCIDR('10.0.0.0/8') && cidr('10.0.0.0/8').containsIP('10.1.2.3') && !cidr('::/64').containsIP('10.0.0.1')",
        "cidr('10.0.0.0/8').containsCIDR('10.1.0.0/16') && cidr('10.0.0.0/8').containsIP(ip('10.0.0.1'))",
        "cidr('10.1.0.0/8').masked() == cidr('10.0.0.0/8') && cidr('10.1.0.0/8').ip() == ip('10.1.0.0')",
        "cidr('10.1.0.0/8').prefixLength() == 8",
        "isQuantity('1Gi') && quantity('1Gi').isGreaterThan(quantity('1G')) && quantity('2k').asInteger() == 2000",
        "quantity('1').add(quantity('2k')) == quantity('2001') && quantity('1').sub(2) == quantity('-1')",
        "ip('224.0.0.5').isLinkLocalMulticast() && ip('ff02::1').isLinkLocalMulticast() && !ip('ff05::1').isLinkLocalMulticast()",
        "quantity('1').compareTo(quantity('2')) == -1 && quantity('-1').sign() == -1 && !isQuantity('x')",
        "[1, 2].exists_one(x, x == 2) && [1, 2].map(x, x * 2) == [2, 4] && {'a': 1}.exists(k, k == 'a')",
        "self.?none.orValue('d') == 'd' && optional.of(1).hasValue()",
        "duration('1h') > duration('59m') && timestamp('2025-01-01T00:00:00Z').getFullYear() == 2025",
    ] {
        let schema = spec(&json!({"s": {"type": "string"}}), &json!([{"rule": rule}]));
        verify(&schema, &json!({"spec": {"s": "abc"}}), None, &[]);
    }
}

#[test]
fn what_was_broken_before_may_stay_so() {
    let rule = json!([{"rule": "self < 3"}, {"rule": "self >= oldSelf", "message": "grows"}]);
    let schema = json!({"type": "object", "properties": {
        "n": {"type": "integer", "x-kubernetes-validations": rule}, "m": {"type": "integer"},
    }});
    let old = json!({"n": 5, "m": 1});
    verify(&schema, &json!({"n": 5, "m": 2}), Some(&old), &[]);
    verify(&schema, &json!({"n": 6}), Some(&old), &["n: Invalid value: \"integer\": failed rule: self < 3"]);
    verify(&schema, &json!({"n": 1}), Some(&old), &["n: Invalid value: \"integer\": grows"]);
}
