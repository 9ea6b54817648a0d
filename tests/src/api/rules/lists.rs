//! Kubernetes' functions of lists and sets: `sum`, `min`, `max`, `isSorted`, `indexOf`, `lastIndexOf`, `sets.*`.

use std::cmp::Ordering;

use cel::common::types::{CelInt, DYN_TYPE, LIST_TYPE};
use cel::common::value::CowVal;
use cel::extractors::This;
use cel::{Context, DeclarationError, Env, ExecutionError, Value as Cel};

use super::functions::{List, Outcome, failed};

pub(super) fn declare(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("isSorted", |This(list): This<List>| -> bool {
        list.windows(2).all(|pair| pair[0].partial_cmp(&pair[1]) != Some(Ordering::Greater))
    })?;
    context.add_function("min", |This(list): This<List>| extreme("min", &list, Ordering::Less))?;
    context.add_function("max", |This(list): This<List>| extreme("max", &list, Ordering::Greater))?;
    context.add_function("sum", |This(list): This<List>| sum(&list))?;
    context
        .add_function("sets.contains", |all: List, some: List| some.iter().all(|item| all.contains(item)))?;
    context.add_function("sets.intersects", |a: List, b: List| a.iter().any(|item| b.contains(item)))?;
    context.add_function("sets.equivalent", |a: List, b: List| {
        a.iter().all(|item| b.contains(item)) && b.iter().all(|item| a.contains(item))
    })
}

fn extreme(function: &str, list: &[Cel], wanted: Ordering) -> Outcome<Cel> {
    let first = list.first().cloned();
    let found = list
        .iter()
        .cloned()
        .reduce(|best, item| if item.partial_cmp(&best) == Some(wanted) { item } else { best });
    found.or(first).map_or_else(|| failed(function, format!("{function} called on empty list")), Ok)
}

fn sum(list: &[Cel]) -> Outcome<Cel> {
    list.iter().try_fold(Cel::Int(0), |sum, item| match (sum, item) {
        (Cel::Int(0), Cel::Float(item)) => Ok(Cel::Float(*item)),
        (Cel::Float(sum), Cel::Float(item)) => Ok(Cel::Float(sum + item)),
        (Cel::Int(sum), Cel::Int(item)) => {
            sum.checked_add(*item).map(Cel::Int).map_or_else(|| failed("sum", "integer overflow"), Ok)
        }
        (_, item) => failed("sum", format!("no sum of {item:?}")),
    })
}

/// `indexOf` and `lastIndexOf` are functions of strings as well, so they are told apart by the type they are called on.
pub(super) fn positions(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_member_overload("indexOf", "list.indexOf(dyn)", LIST_TYPE, vec![DYN_TYPE], |args| {
        position(&args, |list, wanted| list.iter().position(|item| item == wanted))
    })?;
    env.add_member_overload("lastIndexOf", "list.lastIndexOf(dyn)", LIST_TYPE, vec![DYN_TYPE], |args| {
        position(&args, |list, wanted| list.iter().rposition(|item| item == wanted))
    })
}

fn position<'b, 'v>(
    args: &[CowVal<'b, 'v>],
    find: fn(&[Cel], &Cel) -> Option<usize>,
) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [list, wanted] = args else { return Err(ExecutionError::invalid_argument_count(2, args.len())) };
    let (list, wanted) = (Cel::try_from(list.as_ref())?, Cel::try_from(wanted.as_ref())?);
    let found = if let Cel::List(list) = &list { find(list, &wanted) } else { None };
    let found = found.and_then(|at| i64::try_from(at).ok()).unwrap_or(-1);
    Ok(CowVal::owned(CelInt::from(found)))
}
