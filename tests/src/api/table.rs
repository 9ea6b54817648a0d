//! `meta.k8s.io/v1` Table: what `kubectl get` prints. The columns of each kind are in `columns`.

use serde_json::{Value, json};

use super::columns::{self, Column};
use super::form;
use super::jsonpath::Path;
use super::kinds::Kind;
use super::meta::text;

/// Which object each row carries: `includeObject` of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Include {
    Metadata,
    Object,
    None,
}

impl Include {
    pub(super) fn parse(parameter: &str) -> Self {
        match parameter {
            "Object" => Self::Object,
            "None" => Self::None,
            _ => Self::Metadata,
        }
    }
}

/// A table of `objects`, with the list metadata given.
pub(super) fn table(kind: &Kind, objects: &[Value], metadata: &Value, include: Include) -> Value {
    let rows: Vec<Value> = if kind.custom.is_some() {
        objects.iter().map(|object| row(custom_cells(kind, object), object, include)).collect()
    } else {
        let columns = columns::of(kind);
        objects
            .iter()
            .map(|object| row(columns.iter().map(|column| (column.cell)(object)).collect(), object, include))
            .collect()
    };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions(kind), "rows": rows,
    })
}

fn row(cells: Vec<Value>, object: &Value, include: Include) -> Value {
    let object = match include {
        Include::None => return json!({"cells": cells}),
        Include::Object => object.clone(),
        Include::Metadata => form::partial(object),
    };
    json!({"cells": cells, "object": object})
}

fn definitions(kind: &Kind) -> Vec<Value> {
    let definition = |name: &str, format: &str, kind: &str, priority: i64| json!({"name": name, "type": kind, "format": format, "description": "", "priority": priority});
    if kind.custom.is_none() {
        let column = |column: &Column| {
            let format = if column.name == "Name" { "name" } else { "" };
            definition(column.name, format, column.kind, i64::from(column.wide))
        };
        return columns::of(kind).iter().map(column).collect();
    }
    let mut all = vec![definition("Name", "name", "string", 0)];
    for column in &kind.columns {
        let priority = column["priority"].as_i64().unwrap_or(0);
        let mut told =
            definition(text(column, "/name"), text(column, "/format"), text(column, "/type"), priority);
        told["description"] = text(column, "/description").into();
        all.push(told);
    }
    if kind.columns.is_empty() {
        all.push(definition("Age", "", "date", 0));
    }
    all
}

fn custom_cells(kind: &Kind, object: &Value) -> Vec<Value> {
    let mut cells = vec![text(object, "/metadata/name").into()];
    for column in &kind.columns {
        let path = Path::parse(text(column, "/jsonPath")).ok();
        let found = path.and_then(|path| path.find(object).first().copied());
        cells.push(match (found, text(column, "/type")) {
            (Some(Value::String(time)), "date") => columns::age(time).into(),
            (Some(Value::String(word)), "string") => word.as_str().into(),
            (Some(value), "string") => value.to_string().into(),
            (Some(value), "integer" | "number") if value.is_number() => value.clone(),
            (Some(value), "boolean") if value.is_boolean() => value.clone(),
            _ => Value::Null,
        });
    }
    if kind.columns.is_empty() {
        cells.push(columns::age(text(object, "/metadata/creationTimestamp")).into());
    }
    cells
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Include, table};
    use crate::api::kinds::Kinds;

    #[test]
    fn a_pod_as_a_row() {
        let pod = json!({
            "metadata": {"name": "a", "namespace": "n"},
            "spec": {"nodeName": "node1", "containers": [{"name": "c"}, {"name": "d"}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [
                {"name": "c", "ready": true, "restartCount": 2, "state": {"running": {}}},
                {"name": "d", "ready": false, "restartCount": 1,
                 "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
            ]},
        });
        let kind = Kinds::new().named("pods").unwrap();
        let table = table(&kind, &[pod], &json!({}), Include::None);
        let cells = &table["rows"][0]["cells"];
        assert_eq!(cells[0], "a");
        assert_eq!(
            (&cells[1], &cells[2], &cells[3]),
            (&json!("1/2"), &json!("CrashLoopBackOff"), &json!("3"))
        );
        assert_eq!((&cells[5], &cells[6]), (&json!("10.0.0.1"), &json!("node1")));
    }
}
