//! Kubernetes' functions of resource quantities: `quantity("1.5Gi")`.
//! Reference: `k8s.io/apimachinery/pkg/api/resource/quantity.go`.

use std::cmp::Ordering;
use std::sync::Arc;

use cel::extractors::This;
use cel::objects::Opaque;
use cel::{Context, DeclarationError, Value as Cel};

use super::functions::{Outcome, Text, failed};

/// In units of 10⁻⁹, which is the smallest step of a quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Quantity(i128);

const NANO: i128 = 1_000_000_000;

impl Opaque for Quantity {
    fn runtime_type_name(&self) -> &str {
        "kubernetes.Quantity"
    }
}

impl Quantity {
    fn parse(text: &str) -> Option<Self> {
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let end =
            unsigned.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(unsigned.len());
        let (digits, suffix) = unsigned.split_at(end);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let number: i128 = format!("{whole}{fraction}").parse().ok()?;
        let (factor, divisor) = scale(suffix)?;
        let divisor = divisor.checked_mul(10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?)?;
        let exact = number.checked_mul(factor)?.checked_mul(NANO)?;
        // What is smaller than the smallest step is rounded up, as in the reference.
        let rounded = exact.checked_add(divisor - 1)? / divisor;
        Some(Self(if negative { -rounded } else { rounded }))
    }

    fn of(function: &str, value: &Cel) -> Outcome<Self> {
        let found = if let Cel::Opaque(value) = value { value.downcast_ref::<Self>().copied() } else { None };
        found.map_or_else(|| failed(function, format!("no such overload for {value:?}")), Ok)
    }

    fn whole(self) -> Option<i64> {
        (self.0 % NANO == 0).then(|| i64::try_from(self.0 / NANO).ok()).flatten()
    }
}

/// What a suffix multiplies with, and divides by.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    if let Some(exponent) = suffix.strip_prefix(['e', 'E']).filter(|exponent| !exponent.is_empty()) {
        let exponent: i32 = exponent.parse().ok()?;
        let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
        return Some(if exponent < 0 { (1, power) } else { (power, 1) });
    }
    let thousand = |power: u32| 1000_i128.pow(power);
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, thousand(3)),
        "u" => (1, thousand(2)),
        "m" => (1, thousand(1)),
        "k" => (thousand(1), 1),
        "M" => (thousand(2), 1),
        "G" => (thousand(3), 1),
        "T" => (thousand(4), 1),
        "P" => (thousand(5), 1),
        "E" => (thousand(6), 1),
        _ => {
            let power = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].iter().position(|binary| *binary == suffix)?;
            (1024_i128.pow(u32::try_from(power).ok()? + 1), 1)
        }
    })
}

pub(super) fn declare(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("isQuantity", |text: Text| Quantity::parse(&text).is_some())?;
    context.add_function("quantity", |text: Text| -> Outcome<Cel> {
        let why =
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
        Quantity::parse(&text)
            .map_or_else(|| failed("quantity", why), |quantity| Ok(Cel::Opaque(Arc::new(quantity))))
    })?;
    let compare = |name: &'static str, holds: fn(Ordering) -> Cel| {
        move |This(value): This<Cel>, other: Cel| -> Outcome<Cel> {
            Ok(holds(Quantity::of(name, &value)?.cmp(&Quantity::of(name, &other)?)))
        }
    };
    context.add_function("compareTo", compare("compareTo", |order| Cel::Int(order as i64)))?;
    context.add_function("isGreaterThan", compare("isGreaterThan", |order| Cel::Bool(order.is_gt())))?;
    context.add_function("isLessThan", compare("isLessThan", |order| Cel::Bool(order.is_lt())))?;
    for (name, sign) in [("add", 1), ("sub", -1)] {
        context.add_function(name, move |This(value): This<Cel>, other: Cel| -> Outcome<Cel> {
            // A whole number counts as a quantity.
            let other = match other {
                Cel::Int(whole) => Quantity(i128::from(whole) * NANO),
                other => Quantity::of(name, &other)?,
            };
            match Quantity::of(name, &value)?.0.checked_add(sign * other.0) {
                Some(sum) => Ok(Cel::Opaque(Arc::new(Quantity(sum)))),
                None => failed(name, "the result is too large"),
            }
        })?;
    }
    context.add_function("sign", |This(value): This<Cel>| -> Outcome<Cel> {
        Ok(Cel::Int(Quantity::of("sign", &value)?.0.signum() as i64))
    })?;
    context.add_function("isInteger", |This(value): This<Cel>| -> Outcome<Cel> {
        Ok(Cel::Bool(Quantity::of("isInteger", &value)?.whole().is_some()))
    })?;
    context.add_function("asInteger", |This(value): This<Cel>| -> Outcome<Cel> {
        let whole = Quantity::of("asInteger", &value)?.whole();
        whole.map_or_else(
            || failed("asInteger", "cannot convert value to integer"),
            |whole| Ok(Cel::Int(whole)),
        )
    })?;
    context.add_function("asApproximateFloat", |This(value): This<Cel>| -> Outcome<Cel> {
        Ok(Cel::Float(Quantity::of("asApproximateFloat", &value)?.0 as f64 / NANO as f64))
    })
}

#[cfg(test)]
mod tests {
    use super::{NANO, Quantity};

    #[test]
    fn quantities() {
        for (text, expect) in [
            ("1", Some(NANO)),
            ("1.5", Some(NANO * 3 / 2)),
            ("-2k", Some(-2000 * NANO)),
            ("100m", Some(NANO / 10)),
            ("1Ki", Some(1024 * NANO)),
            ("1e3", Some(1000 * NANO)),
            ("1E", Some(NANO * 1_000_000_000_000_000_000)),
            ("5e-1", Some(NANO / 2)),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("1Xi", None),
            ("ten", None),
        ] {
            assert_eq!(Quantity::parse(text).map(|quantity| quantity.0), expect, "{text}");
        }
    }
}
