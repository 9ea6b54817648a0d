//! A compiled expression, refused when it cannot be parsed or names a variable that nothing binds.

use std::sync::{Arc, LazyLock};

use cel::common::ast::{EntryExpr, Expr, IdedExpr};
use cel::{Context, Env, ExecutionError, Program, Value as Cel, extensions};
use serde::{Deserialize, Deserializer, de::Error as _};

use super::lists;

/// The names a rule may use without binding them: its variables, and the types.
const NAMES: [&str; 15] = [
    "self",
    "oldSelf",
    "bool",
    "bytes",
    "double",
    "int",
    "list",
    "map",
    "null_type",
    "optional",
    "string",
    "type",
    "uint",
    "duration",
    "timestamp",
];

/// As written, and compiled.
#[derive(Clone, Debug)]
pub(super) struct Expression {
    pub(super) text: String,
    program: Arc<Program>,
}

/// The language with those of its libraries that Kubernetes has; what Kubernetes adds is in `functions`.
pub(super) static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    for extension in [extensions::strings, lists::positions] {
        env.add_extension(extension).expect("no function of these is declared twice");
    }
    Arc::new(env)
});

impl Expression {
    /// Whether the expression uses this variable.
    pub(super) fn names(&self, variable: &str) -> bool {
        self.program.references().has_variable(variable)
    }

    pub(super) fn parsed(&self) -> &IdedExpr {
        self.program.expression()
    }

    /// A mistake at a node of the expression, in the form of the reference implementation: where, what, and the line.
    pub(super) fn located(&self, node: u64, why: &str) -> String {
        let start = self.program.source_info().offset_for(node).map_or(0, |(start, _)| start);
        let before: String = self.text.chars().take(usize::try_from(start).unwrap_or(0)).collect();
        let line = before.matches('\n').count();
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count();
        let shown = self.text.lines().nth(line).unwrap_or_default();
        format!("ERROR: <input>:{}:{}: {why}\n | {shown}\n | {}^", line + 1, column + 1, ".".repeat(column))
    }

    pub(super) fn evaluate(&self, context: &Context<'_, '_>) -> Result<Cel, ExecutionError> {
        self.program.execute(context)
    }
}

impl<'de> Deserialize<'de> for Expression {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let failed = |why: String| D::Error::custom(format!("compilation failed: {text:?}: {why}"));
        let program = ENVIRONMENT.compile(&text).map_err(|errors| {
            failed(errors.errors.iter().map(|error| error.msg.as_str()).collect::<Vec<_>>().join("; "))
        })?;
        if let Some(name) = unbound(program.expression(), &mut NAMES.to_vec()) {
            return Err(failed(format!("undeclared reference to '{name}'")));
        }
        Ok(Self { program: Arc::new(program), text })
    }
}

/// The first name that is not in `bound`, to which comprehensions add theirs.
fn unbound<'a>(expression: &'a IdedExpr, bound: &mut Vec<&'a str>) -> Option<&'a str> {
    match &expression.expr {
        Expr::Ident(name) => {
            let known = name.starts_with('@') || bound.contains(&name.as_str());
            (!known).then_some(name.as_str())
        }
        Expr::Call(call) => {
            // `sets.contains(…)` is a function's name, not a variable's field.
            let target = call
                .target
                .as_deref()
                .filter(|target| !matches!(&target.expr, Expr::Ident(name) if is_library(name)));
            target.into_iter().chain(&call.args).find_map(|part| unbound(part, bound))
        }
        Expr::Select(select) => unbound(&select.operand, bound),
        Expr::List(list) => list.elements.iter().find_map(|part| unbound(part, bound)),
        Expr::Map(map) => map.entries.iter().find_map(|entry| entry_unbound(&entry.expr, bound)),
        Expr::Struct(fields) => fields.entries.iter().find_map(|entry| entry_unbound(&entry.expr, bound)),
        Expr::Comprehension(comprehension) => {
            let outer = bound.len();
            let first = unbound(&comprehension.iter_range, bound)
                .or_else(|| unbound(&comprehension.accu_init, bound));
            bound.extend([comprehension.iter_var.as_str(), comprehension.accu_var.as_str()]);
            bound.extend(comprehension.iter_var2.as_deref());
            let inner = [&comprehension.loop_cond, &comprehension.loop_step, &comprehension.result];
            let found = first.or_else(|| inner.into_iter().find_map(|part| unbound(part, bound)));
            bound.truncate(outer);
            found
        }
        Expr::Literal(_) | Expr::Unspecified => None,
    }
}

fn entry_unbound<'a>(entry: &'a EntryExpr, bound: &mut Vec<&'a str>) -> Option<&'a str> {
    match entry {
        EntryExpr::StructField(field) => unbound(&field.value, bound),
        EntryExpr::MapEntry(entry) => unbound(&entry.key, bound).or_else(|| unbound(&entry.value, bound)),
    }
}

fn is_library(name: &str) -> bool {
    ["ip", "optional", "sets", "strings"].contains(&name)
}
