//! The functions that Kubernetes adds to the language.
//! Reference: kubernetes.io, "Common Expression Language in Kubernetes"; `k8s.io/apiserver/pkg/cel/library`.

use std::sync::Arc;

use cel::extractors::This;
use cel::{Context, ExecutionError, Value as Cel};
use regex::Regex;

use super::expression::ENVIRONMENT;
use super::{lists, network, quantity};

pub(super) type Text = Arc<String>;
pub(super) type List = Arc<Vec<Cel>>;
pub(super) type Outcome<T> = Result<T, ExecutionError>;

/// A context with all functions and no variables.
pub(super) fn context() -> Context<'static, 'static> {
    let mut context = Context::with_env(ENVIRONMENT.clone());
    for declare in [regexes, lists::declare, network::declare, quantity::declare] {
        declare(&mut context).expect("no function of these is declared twice");
    }
    context
}

/// What went wrong in a function.
pub(super) fn failed<T>(function: &str, why: impl ToString) -> Outcome<T> {
    Err(ExecutionError::function_error(function, why))
}

fn regexes(context: &mut Context<'_, '_>) -> Result<(), cel::DeclarationError> {
    let compiled =
        |pattern: &str| Regex::new(pattern).map_err(|error| ExecutionError::function_error("find", error));
    context.add_function("find", move |This(text): This<Text>, pattern: Text| -> Outcome<Cel> {
        Ok(compiled(&pattern)?.find(&text).map_or("", |found| found.as_str()).into())
    })?;
    context.add_function("findAll", move |This(text): This<Text>, pattern: Text| -> Outcome<Cel> {
        let found: Vec<Cel> =
            compiled(&pattern)?.find_iter(&text).map(|found| found.as_str().into()).collect();
        Ok(Cel::List(Arc::new(found)))
    })
}
