//! `x-kubernetes-validations`: rules of a schema in the Common Expression Language, over `self` and, for changes,
//! `oldSelf`. Pure. Reference: `k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel`.
//! The interpreter has no types: `infer` finds what misuses one when the rule is defined.

mod expression;
mod functions;
mod infer;
mod lists;
mod network;
mod overloads;
mod quantity;
mod typed;
mod value;

use cel::objects::OptionalValue;
use cel::{Context, Value as Cel};
use serde::Deserialize;
use serde_json::Value;

use super::jsonpath::Path;
use super::structure::check::{Faults, fault};
use super::structure::{Schema, Type, below};
use expression::Expression;
use typed::Type as Typed;

/// One rule of a schema.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule {
    rule: Expression,
    #[serde(default)]
    message: String,
    message_expression: Option<Expression>,
    #[serde(default)]
    reason: Reason,
    #[serde(default)]
    field_path: String,
    /// Holds also where there is no old value; `oldSelf` is an optional then.
    #[serde(default)]
    optional_old_self: bool,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum Reason {
    #[default]
    #[serde(rename = "FieldValueInvalid")]
    Invalid,
    #[serde(rename = "FieldValueForbidden")]
    Forbidden,
    #[serde(rename = "FieldValueRequired")]
    Required,
    #[serde(rename = "FieldValueDuplicate")]
    Duplicate,
}

/// The rules that `new` breaks, as it is or as the change from `old`.
pub(super) fn faults(schema: &Schema, new: &Value, old: Option<&Value>) -> Faults {
    let mut faults = Vec::new();
    check(schema, new, old, ("", true), &mut faults);
    faults
}

/// Whether there is a rule in the schema at all.
pub(super) fn exist(schema: &Schema) -> bool {
    !schema.rules.is_empty()
        || schema.properties.values().chain(schema.additional()).chain(schema.items.as_deref()).any(exist)
}

/// `resource` tells a whole object, of which rules see more than its schema says.
fn check(
    schema: &Schema,
    new: &Value,
    old: Option<&Value>,
    (path, resource): (&str, bool),
    faults: &mut Faults,
) {
    if new.is_null() {
        return;
    }
    let old = old.filter(|old| !old.is_null());
    // What was broken before and has not changed may stay so.
    let unchanged = old == Some(new);
    for rule in schema.rules.iter().filter(|rule| !unchanged || rule.is_transition()) {
        faults.extend(rule.fault(schema, new, old, (path, resource)));
    }
    match new {
        Value::Object(fields) => {
            for (name, value) in fields {
                let Some(of_field) = schema.property(name) else { continue };
                check(
                    of_field,
                    value,
                    schema.old_field(name, old),
                    (&below(path, name), of_field.embedded),
                    faults,
                );
            }
        }
        Value::Array(items) => {
            let Some(of_items) = &schema.items else { return };
            for (index, item) in items.iter().enumerate() {
                let old = schema.old_item(item, old);
                check(of_items, item, old, (&format!("{path}[{index}]"), of_items.embedded), faults);
            }
        }
        _ => {}
    }
}

impl Rule {
    /// The rule as written.
    pub(super) fn text(&self) -> &str {
        &self.rule.text
    }

    /// Whether it is about a change.
    pub(super) fn is_transition(&self) -> bool {
        self.rule.names("oldSelf")
    }

    /// What is wrong with the rule for values of this schema: a field of the rule, and why.
    pub(super) fn mistakes(&self, schema: &Schema, resource: bool) -> Vec<(&'static str, String)> {
        let own = Typed::of(schema, resource).unwrap_or(Typed::Dyn);
        let mut found = Vec::new();
        let expressions =
            [("rule", Some(&self.rule)), ("messageExpression", self.message_expression.as_ref())];
        for (field, expression) in expressions {
            let Some(expression) = expression else { continue };
            let scope = infer::scope(own.clone(), self.optional_old_self);
            if let Err(mistake) = infer::check(expression.parsed(), scope, field != "rule") {
                let why = expression.located(mistake.node, &mistake.why);
                found.push((
                    field,
                    format!("Invalid value: {:?}: compilation failed: {why}", expression.text),
                ));
            }
        }
        if self.message.contains('\n') {
            let why = "message must not contain line breaks";
            found.push(("message", format!("Invalid value: {:?}: {why}", self.message)));
        }
        if !self.field_path.is_empty() && !leads_somewhere(schema, &self.field_path) {
            let why = "fieldPath must be a valid path: does not refer to a valid field";
            found.push(("fieldPath", format!("Invalid value: {:?}: {why}", self.field_path)));
        }
        found
    }

    fn fault(
        &self,
        schema: &Schema,
        new: &Value,
        old: Option<&Value>,
        (path, resource): (&str, bool),
    ) -> Option<(String, String)> {
        let transition = self.is_transition();
        if transition && old.is_none() && !self.optional_old_self {
            return None;
        }
        let mut context = functions::context();
        context.add_variable_from_value("self", value::of(schema, new, resource));
        if transition {
            let old = old.map(|old| value::of(schema, old, resource));
            context.add_variable_from_value("oldSelf", self.old(old));
        }
        let why = match self.rule.evaluate(&context) {
            Ok(Cel::Bool(true)) => return None,
            Ok(Cel::Bool(false)) => self.told(&context),
            Ok(other) => format!("rule evaluated to {other:?}, which is no boolean: {}", self.rule.text),
            Err(error) => format!("{error} evaluating rule: {}", self.message_or_rule()),
        };
        let kind = if schema.int_or_string { "" } else { schema.kind.map_or("", Type::name) };
        let why = match self.reason {
            Reason::Invalid => format!("Invalid value: \"{kind}\": {why}"),
            Reason::Forbidden => format!("Forbidden: {why}"),
            Reason::Required => format!("Required value: {why}"),
            Reason::Duplicate => format!("Duplicate value: \"{kind}\""),
        };
        let field = format!("{path}{}", self.field_path.replace("['", ".").replace("']", ""));
        Some(fault(field.trim_start_matches('.'), &why))
    }

    fn old(&self, old: Option<Cel>) -> Cel {
        match (self.optional_old_self, old) {
            (true, Some(old)) => Cel::Opaque(std::sync::Arc::new(OptionalValue::of(old))),
            (true, None) => Cel::Opaque(std::sync::Arc::new(OptionalValue::none())),
            (false, old) => old.unwrap_or(Cel::Null),
        }
    }

    /// The message, computed if it is an expression that evaluates to a line of text.
    fn told(&self, context: &Context<'_, '_>) -> String {
        let computed = self.message_expression.as_ref().and_then(|message| message.evaluate(context).ok());
        match computed {
            Some(Cel::String(text)) if !text.trim().is_empty() && !text.contains('\n') => text.to_string(),
            _ => self.message_or_rule(),
        }
    }

    fn message_or_rule(&self) -> String {
        if self.message.is_empty() {
            format!("failed rule: {}", self.rule.text.trim())
        } else {
            self.message.clone()
        }
    }
}

/// Whether a path of names leads to a field of the schema.
fn leads_somewhere(schema: &Schema, path: &str) -> bool {
    let Ok(path) = Path::parse(path) else { return false };
    let end = path
        .names()
        .and_then(|names| names.into_iter().try_fold(schema, |schema, name| schema.property(name)));
    end.is_some()
}

#[cfg(test)]
mod tests;
