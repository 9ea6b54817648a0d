use serde_json::{Value, json};

use super::faults;
use crate::api::structure::Schema;

/// `expect` is `field: why` of each fault.
fn verify(schema: &Value, cases: &[(Value, &[&str])]) {
    let parsed = Schema::parse(schema).unwrap();
    for (value, expect) in cases {
        let found = faults(&parsed, value, None, "f");
        let told: Vec<String> = found.iter().map(|(field, why)| format!("{field}: {why}")).collect();
        assert_eq!(told, *expect, "{value} against {schema}");
    }
}

#[test]
fn types() {
    verify(
        &json!({"type": "integer"}),
        &[
            (json!(3), &[]),
            (json!(3.0), &[]),
            (json!("x"), &["f: Invalid value: \"string\": f in body must be of type integer: \"string\""]),
            (json!(3.5), &["f: Invalid value: \"number\": f in body must be of type integer: \"number\""]),
            (json!(null), &["f: Invalid value: \"null\": f in body must be of type integer: \"null\""]),
        ],
    );
    verify(&json!({"type": "string", "nullable": true}), &[(json!(null), &[])]);
    verify(
        &json!({"x-kubernetes-int-or-string": true}),
        &[
            (json!(3), &[]),
            (json!("3%"), &[]),
            (
                json!(true),
                &["f: Invalid value: \"boolean\": f in body must be of type integer,string: \"boolean\""],
            ),
        ],
    );
}

#[test]
fn strings_and_numbers() {
    verify(
        &json!({"type": "string", "enum": ["a", "bc"], "pattern": "^[a-c]+$", "minLength": 1, "maxLength": 2}),
        &[
            (json!("bc"), &[]),
            (
                json!("abd"),
                &[
                    "f: Unsupported value: \"abd\": supported values: \"a\", \"bc\"",
                    "f: Invalid value: \"abd\": f in body should match '^[a-c]+$'",
                    "f: Too long: may not be more than 2 bytes",
                ],
            ),
            (
                json!(""),
                &[
                    "f: Unsupported value: \"\": supported values: \"a\", \"bc\"",
                    "f: Invalid value: \"\": f in body should match '^[a-c]+$'",
                    "f: Invalid value: \"\": f in body should be at least 1 chars long",
                ],
            ),
        ],
    );
    verify(
        &json!({"type": "number", "minimum": 1, "maximum": 10, "exclusiveMaximum": true, "multipleOf": 0.5}),
        &[
            (json!(1), &[]),
            (json!(0), &["f: Invalid value: 0: f in body should be greater than or equal to 1"]),
            (json!(10), &["f: Invalid value: 10: f in body should be less than 10"]),
            (json!(1.2), &["f: Invalid value: 1.2: f in body should be a multiple of 0.5"]),
        ],
    );
    verify(
        &json!({"type": "string", "format": "date-time"}),
        &[(json!("x"), &["f: Invalid value: \"x\": f in body must be of type date-time: \"x\""])],
    );
}

#[test]
fn lists() {
    let item = json!({
        "type": "object", "required": ["name"],
        "properties": {"name": {"type": "string"}, "protocol": {"type": "string", "default": "TCP"}},
    });
    verify(
        &json!({
            "type": "array", "minItems": 1, "maxItems": 2, "items": item,
            "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name", "protocol"],
        }),
        &[
            (json!([{"name": "a"}, {"name": "a", "protocol": "UDP"}]), &[]),
            (json!([]), &["f: Invalid value: 0: f in body should have at least 1 items"]),
            (
                json!([{"name": "a"}, {"name": "a", "protocol": "TCP"}]),
                &["f[1]: Duplicate value: {\"name\":\"a\",\"protocol\":\"TCP\"}"],
            ),
            (
                json!([{"name": "a"}, {}, {"name": 1}]),
                &[
                    "f: Too many: 3: must have at most 2 items",
                    "f[1].name: Required value",
                    "f[2].name: Invalid value: \"integer\": f[2].name in body must be of type string: \"integer\"",
                ],
            ),
        ],
    );
    verify(
        &json!({"type": "array", "items": {"type": "integer"}, "x-kubernetes-list-type": "set"}),
        &[(json!([1, 2, 1]), &["f[2]: Duplicate value: 1"])],
    );
}

#[test]
fn objects() {
    verify(
        &json!({"type": "object", "maxProperties": 1, "additionalProperties": {"type": "string"}}),
        &[
            (json!({"a": "x"}), &[]),
            (
                json!({"a": 1}),
                &["f.a: Invalid value: \"integer\": f.a in body must be of type string: \"integer\""],
            ),
            (json!({"a": "x", "b": "y"}), &["f: Too many: 2: must have at most 1 items"]),
        ],
    );
    verify(
        &json!({"type": "object", "x-kubernetes-embedded-resource": true}),
        &[(json!({"kind": "A"}), &["f.apiVersion: Required value: must not be empty"])],
    );
}

#[test]
fn junctions() {
    let one = json!({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]});
    verify(
        &one,
        &[
            (json!({"a": 1}), &[]),
            (
                json!({}),
                &[
                    "f: Invalid value: \"\": \"f\" must validate one and only one schema (oneOf). Found none valid",
                    "f.a: Required value",
                ],
            ),
            (
                json!({"a": 1, "b": 1}),
                &["f: Invalid value: \"\": \"f\" must validate one and only one schema (oneOf). \
                   Found 2 valid alternatives"],
            ),
        ],
    );
    verify(
        &json!({"type": "integer", "anyOf": [{"maximum": 1}, {"minimum": 5}], "not": {"enum": [7]}}),
        &[
            (json!(0), &[]),
            (json!(6), &[]),
            (
                json!(3),
                &[
                    "f: Invalid value: \"\": \"f\" must validate at least one schema (anyOf)",
                    "f: Invalid value: 3: f in body should be less than or equal to 1",
                ],
            ),
            (json!(7), &["f: Invalid value: \"\": \"f\" must not validate the schema (not)"]),
        ],
    );
    verify(
        &json!({"type": "integer", "allOf": [{"maximum": 1}, {"minimum": 0}]}),
        &[(
            json!(3),
            &[
                "f: Invalid value: \"\": \"f\" must validate all the schemas (allOf)",
                "f: Invalid value: 3: f in body should be less than or equal to 1",
            ],
        )],
    );
}

#[test]
fn what_has_not_changed_is_let_be() {
    let item = json!({
        "type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": {"type": "integer", "maximum": 1}},
    });
    let schema = Schema::parse(&json!({
        "type": "object", "required": ["n", "m"], "properties": {
            "n": {"type": "integer", "maximum": 1},
            "map": {"type": "array", "items": item, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]},
            "list": {"type": "array", "items": item},
        },
        "not": {"required": ["n", "x"]},
    }))
    .unwrap();
    let items = |value: i64, other: i64| json!([{"k": "a", "v": value}, {"k": "b", "v": other}]);
    let old = json!({"n": 5, "m": 0, "map": items(5, 5), "list": items(5, 5)});
    for (change, expect) in [
        (json!({}), &[][..]),
        (json!({"other": 1}), &[]),
        (json!({"n": 6}), &["n"]),
        (json!({"map": items(5, 6)}), &["map[1].v"]),
        // Nothing tells which item of a plain list was which.
        (json!({"list": items(5, 6)}), &["list[0].v", "list[1].v"]),
        (json!({"m": null}), &["m"]),
        (json!({"x": 1}), &["<nil>"]),
    ] {
        let mut new = old.clone();
        crate::api::patch::merge(&mut new, &change);
        let found = faults(&schema, &new, Some(&old), "");
        assert_eq!(found.iter().map(|(field, _)| field.as_str()).collect::<Vec<_>>(), expect, "{change}");
    }
}
