//! The type of an expression, from its leaves up; or what in it cannot be. Pure.
//! Where the language would ask for one type and several are possible, the type is left open: what is refused here, the
//! real server refuses too. Reference: `github.com/google/cel-go/checker`.

use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, ListExpr, LiteralValue, MapExpr, SelectExpr,
    operators,
};

use super::overloads;
use super::typed::{BOOL, STRING, Type};

/// What cannot be, and at which node of the expression.
#[derive(Debug)]
pub(super) struct Mistake {
    pub(super) node: u64,
    pub(super) why: String,
}

/// The variables that are bound, the innermost last.
pub(super) type Scope<'a> = Vec<(&'a str, Type<'a>)>;

type Found<'a> = Result<Type<'a>, Mistake>;

/// The type of `expression`.
pub(super) fn infer<'a>(expression: &'a IdedExpr, scope: &mut Scope<'a>) -> Found<'a> {
    let node = expression.id;
    match &expression.expr {
        Expr::Literal(literal) => Ok(Type::Simple(match literal {
            LiteralValue::Boolean(_) => "bool",
            LiteralValue::Bytes(_) => "bytes",
            LiteralValue::Double(_) => "double",
            LiteralValue::Int(_) => "int",
            LiteralValue::Null => "null",
            LiteralValue::String(_) => "string",
            LiteralValue::UInt(_) => "uint",
        })),
        // Other names were refused when the expression was compiled: these are types.
        Expr::Ident(name) => Ok(variable(name, scope).unwrap_or(Type::Simple("type"))),
        Expr::Select(select) => selected(node, select, scope),
        Expr::Call(call) => called(node, call, scope),
        Expr::List(list) => listed(list, scope),
        Expr::Map(map) => mapped(map, scope),
        Expr::Comprehension(comprehension) => comprehended(node, comprehension, scope),
        Expr::Struct(object) => {
            fail(node, format!("undeclared reference to '{}' (in container '')", object.type_name))
        }
        Expr::Unspecified => Ok(Type::Dyn),
    }
}

fn fail<'a>(node: u64, why: String) -> Found<'a> {
    Err(Mistake { node, why })
}

fn variable<'a>(name: &str, scope: &Scope<'a>) -> Option<Type<'a>> {
    scope.iter().rev().find(|(bound, _)| *bound == name).map(|(_, found)| found.clone())
}

fn selected<'a>(node: u64, select: &'a SelectExpr, scope: &mut Scope<'a>) -> Found<'a> {
    let found = field(node, &infer(&select.operand, scope)?, &select.field)?;
    Ok(if select.test { BOOL } else { found })
}

fn field<'a>(node: u64, operand: &Type<'a>, name: &str) -> Found<'a> {
    match operand.field(name) {
        Some(found) => Ok(found),
        None if operand.has_fields() => fail(node, format!("undefined field '{name}'")),
        None => fail(node, format!("type '{operand}' does not support field selection")),
    }
}

fn called<'a>(node: u64, call: &'a CallExpr, scope: &mut Scope<'a>) -> Found<'a> {
    if let (operators::OPT_SELECT, [operand, name]) = (call.func_name.as_str(), &call.args[..])
        && let Expr::Literal(LiteralValue::String(name)) = &name.expr
    {
        return Ok(optional(field(node, &infer(operand, scope)?, name.inner())?));
    }
    // `sets.contains(…)` is a function's name, not a call on a variable.
    let library = call.target.as_deref().and_then(|target| match &target.expr {
        Expr::Ident(library) if variable(library, scope).is_none() => {
            Some(format!("{library}.{}", call.func_name))
        }
        _ => None,
    });
    let library = library.filter(|name| overloads::exists(name));
    let target = call.target.as_deref().filter(|_| library.is_none());
    let name = match (&library, target) {
        (Some(name), _) => name.clone(),
        (None, Some(_)) => format!(".{}", call.func_name),
        (None, None) => call.func_name.clone(),
    };
    let mut arguments = Vec::with_capacity(call.args.len() + 1);
    for argument in target.into_iter().chain(&call.args) {
        arguments.push(infer(argument, scope)?);
    }
    let found = match call.func_name.as_str() {
        operators::LOGICAL_AND | operators::LOGICAL_OR => {
            arguments.iter().all(|side| side.may_be(&BOOL)).then_some(BOOL)
        }
        operators::OPT_INDEX => overloads::result(operators::INDEX, &arguments).map(optional),
        _ if !overloads::exists(&name) => {
            return fail(node, format!("undeclared reference to '{}' (in container '')", call.func_name));
        }
        _ => overloads::result(&name, &arguments),
    };
    found.map_or_else(|| fail(node, refusal(&call.func_name, &arguments, target.is_some())), Ok)
}

fn optional(inner: Type<'_>) -> Type<'_> {
    if matches!(inner, Type::Optional(_)) { inner } else { Type::Optional(inner.into()) }
}

fn refusal(name: &str, arguments: &[Type<'_>], on_target: bool) -> String {
    let told: Vec<String> = arguments.iter().map(Type::to_string).collect();
    let told = match told.split_first() {
        Some((target, rest)) if on_target => format!("{target}.({})", rest.join(", ")),
        _ => format!("({})", told.join(", ")),
    };
    format!("found no matching overload for '{name}' applied to '{told}'")
}

fn listed<'a>(list: &'a ListExpr, scope: &mut Scope<'a>) -> Found<'a> {
    let mut all = Type::Nothing;
    for (index, element) in list.elements.iter().enumerate() {
        let mut found = infer(element, scope)?;
        if list.optional_indices.contains(&index) {
            found = held(found);
        }
        all = joined(element.id, &all, &found)?;
    }
    Ok(Type::List(all.into()))
}

fn mapped<'a>(map: &'a MapExpr, scope: &mut Scope<'a>) -> Found<'a> {
    let (mut keys, mut values) = (Type::Nothing, Type::Nothing);
    for entry in &map.entries {
        let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
        keys = joined(entry.key.id, &keys, &infer(&entry.key, scope)?)?;
        let mut value = infer(&entry.value, scope)?;
        if entry.optional {
            value = held(value);
        }
        values = joined(entry.value.id, &values, &value)?;
    }
    Ok(Type::Map(keys.into(), values.into()))
}

/// What an optional holds.
fn held(found: Type<'_>) -> Type<'_> {
    match found {
        Type::Optional(inner) => *inner,
        other => other,
    }
}

fn joined<'a>(node: u64, one: &Type<'a>, other: &Type<'a>) -> Found<'a> {
    one.join(other).map_or_else(|| fail(node, format!("expected type '{one}' but found '{other}'")), Ok)
}

/// `all`, `exists`, `map`, `filter` and their like.
fn comprehended<'a>(node: u64, loops: &'a ComprehensionExpr, scope: &mut Scope<'a>) -> Found<'a> {
    let int = Type::Simple("int");
    let (first, second) = match infer(&loops.iter_range, scope)? {
        Type::List(item) if loops.iter_var2.is_some() => (int, *item),
        Type::List(item) => (*item, Type::Dyn),
        Type::Map(key, value) => (*key, *value),
        Type::Dyn | Type::Nothing => (Type::Dyn, Type::Dyn),
        other => {
            let why = format!(
                "expression of type '{other}' cannot be range of a comprehension (must be list, map, or dynamic)"
            );
            return fail(loops.iter_range.id, why);
        }
    };
    let start = infer(&loops.accu_init, scope)?;
    let outer = scope.len();
    scope.push((&loops.accu_var, start.clone()));
    scope.push((&loops.iter_var, first));
    scope.extend(loops.iter_var2.as_deref().map(|name| (name, second)));
    let inner = infer(&loops.loop_cond, scope).and_then(|_| infer(&loops.loop_step, scope));
    scope.truncate(outer);
    let accumulated = joined(node, &start, &inner?)?;
    scope.push((&loops.accu_var, accumulated));
    let found = infer(&loops.result, scope);
    scope.truncate(outer);
    found
}

/// The scope of a rule: `self`, and `oldSelf` as an optional if it may be missing.
pub(super) fn scope(own: Type<'_>, optional_old: bool) -> Scope<'_> {
    let old = if optional_old { optional(own.clone()) } else { own.clone() };
    vec![("self", own), ("oldSelf", old)]
}

/// What stands against a rule, or against an expression for its message, being one by its type.
pub(super) fn check<'a>(
    expression: &'a IdedExpr,
    mut scope: Scope<'a>,
    message: bool,
) -> Result<(), Mistake> {
    let found = infer(expression, &mut scope)?;
    let (wanted, why) = if message {
        (STRING, "messageExpression must evaluate to a string")
    } else {
        (BOOL, "cel expression must evaluate to a bool")
    };
    if found.may_be(&wanted) { Ok(()) } else { Err(Mistake { node: expression.id, why: why.to_owned() }) }
}
