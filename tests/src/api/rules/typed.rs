//! Types of values in the language, and what a schema says of the type of its values. Pure.
//! Reference: `k8s.io/apiserver/pkg/cel/common/schemas.go`; the language's specification, "Gradual type checking".

use std::fmt;

use super::super::structure::{Schema, Type as Kind};
use super::value::escaped;

#[derive(Clone, Debug)]
pub(super) enum Type<'a> {
    /// Any; only the evaluation tells.
    Dyn,
    /// Of the items of an empty list: any type will do.
    Nothing,
    /// By its name.
    Simple(&'static str),
    List(Box<Self>),
    Map(Box<Self>, Box<Self>),
    Optional(Box<Self>),
    /// What has this schema; whether it is a whole object, of which rules see more than its schema says.
    Object(&'a Schema, bool),
    /// `metadata` of a whole object.
    Metadata,
}

pub(super) const BOOL: Type<'static> = Type::Simple("bool");
pub(super) const STRING: Type<'static> = Type::Simple("string");

impl<'a> Type<'a> {
    /// The type of values with this schema; none for what has no type, which rules do not see.
    pub(super) fn of(schema: &'a Schema, resource: bool) -> Option<Self> {
        if schema.int_or_string {
            return Some(Self::Dyn);
        }
        Some(match schema.kind? {
            Kind::Boolean => BOOL,
            Kind::Integer => Self::Simple("int"),
            Kind::Number => Self::Simple("double"),
            Kind::String => match schema.format.as_str() {
                "byte" => Self::Simple("bytes"),
                "date" | "date-time" => Self::Simple("timestamp"),
                "duration" => Self::Simple("duration"),
                _ => STRING,
            },
            Kind::Array => {
                let items = schema.items.as_deref()?;
                Self::List(Self::of(items, items.embedded)?.into())
            }
            Kind::Object => match schema.additional() {
                Some(values) => Self::Map(STRING.into(), Self::of(values, values.embedded)?.into()),
                None => Self::Object(schema, resource),
            },
        })
    }

    /// The type of a field; none if there is none of this name.
    pub(super) fn field(&self, name: &str) -> Option<Self> {
        match self {
            Self::Dyn | Self::Nothing => Some(Self::Dyn),
            Self::Map(_, value) => Some((**value).clone()),
            Self::Optional(inner) => Some(Self::Optional(inner.field(name)?.into())),
            Self::Object(_, true) if ["apiVersion", "kind"].contains(&name) => Some(STRING),
            Self::Object(_, true) if name == "metadata" => Some(Self::Metadata),
            Self::Object(schema, _) => {
                let (_, schema) = schema.properties.iter().find(|(property, _)| escaped(property) == name)?;
                Self::of(schema, schema.embedded)
            }
            Self::Metadata => ["name", "generateName"].contains(&name).then_some(STRING),
            Self::Simple(_) | Self::List(_) => None,
        }
    }

    /// Whether values of the type have fields at all.
    pub(super) fn has_fields(&self) -> bool {
        match self {
            Self::Simple(_) | Self::List(_) => false,
            Self::Optional(inner) => inner.has_fields(),
            _ => true,
        }
    }

    /// The type that values of both are of; none if there is none.
    pub(super) fn join(&self, other: &Self) -> Option<Self> {
        let both = |a: &Self, b: &Self| Some(Box::new(a.join(b)?));
        Some(match (self, other) {
            (Self::Nothing | Self::Simple("null"), known) | (known, Self::Nothing | Self::Simple("null")) => {
                known.clone()
            }
            (Self::Dyn, _) | (_, Self::Dyn) => Self::Dyn,
            (Self::Simple(a), Self::Simple(b)) if a == b => self.clone(),
            (Self::List(a), Self::List(b)) => Self::List(both(a, b)?),
            (Self::Map(key, value), Self::Map(other_key, other_value)) => {
                Self::Map(both(key, other_key)?, both(value, other_value)?)
            }
            (Self::Optional(a), Self::Optional(b)) => Self::Optional(both(a, b)?),
            (Self::Object(a, _), Self::Object(b, _)) if std::ptr::eq(*a, *b) => self.clone(),
            // They may be alike.
            (Self::Object(..), Self::Object(..)) => Self::Dyn,
            (Self::Metadata, Self::Metadata) => Self::Metadata,
            _ => return None,
        })
    }

    /// Whether a value of this type can be of the other.
    pub(super) fn may_be(&self, other: &Self) -> bool {
        self.join(other).is_some()
    }
}

/// As the real server tells types.
impl fmt::Display for Type<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dyn | Self::Nothing => f.write_str("dyn"),
            Self::Simple(name) => f.write_str(name),
            Self::List(item) => write!(f, "list({item})"),
            Self::Map(key, value) => write!(f, "map({key}, {value})"),
            Self::Optional(inner) => write!(f, "optional_type({inner})"),
            Self::Object(..) | Self::Metadata => f.write_str("object"),
        }
    }
}
