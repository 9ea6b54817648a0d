//! The functions of the language by the types that they take and give, of those that `functions` and the crate have.
//! Reference: the language's specification, "List of Standard Definitions"; kubernetes.io, "Common Expression Language
//! in Kubernetes".

use std::collections::HashMap;
use std::sync::LazyLock;

use super::typed::Type;

/// `name parameters result` on each line; a name with a dot before it is called on its first parameter. Capitals stand
/// for any type, the same one throughout.
const TABLE: &str = "
    _==_ A A bool
    _!=_ A A bool
    _<_ N M bool
    _<=_ N M bool
    _>_ N M bool
    _>=_ N M bool
    _+_ int int int
    _+_ uint uint uint
    _+_ double double double
    _+_ string string string
    _+_ bytes bytes bytes
    _+_ list<A> list<A> list<A>
    _+_ timestamp duration timestamp
    _+_ duration timestamp timestamp
    _+_ duration duration duration
    _-_ int int int
    _-_ uint uint uint
    _-_ double double double
    _-_ timestamp timestamp duration
    _-_ timestamp duration timestamp
    _-_ duration duration duration
    _*_ int int int
    _*_ uint uint uint
    _*_ double double double
    _/_ int int int
    _/_ uint uint uint
    _/_ double double double
    _%_ int int int
    _%_ uint uint uint
    -_ int int
    -_ double double
    !_ bool bool
    _?_:_ bool A A A
    _[_] list<A> int A
    _[_] map<A,B> A B
    _[_] optional<list<A>> int optional<A>
    _[_] optional<map<A,B>> A optional<B>
    @in A list<A> bool
    @in A map<A,B> bool
    @not_strictly_false bool bool
    size string int
    size bytes int
    size list<A> int
    size map<A,B> int
    .size string int
    .size bytes int
    .size list<A> int
    .size map<A,B> int
    bool bool bool
    bool string bool
    bytes bytes bytes
    bytes string bytes
    double double double
    double int double
    double uint double
    double string double
    duration duration duration
    duration string duration
    dyn A dyn
    int int int
    int uint int
    int double int
    int string int
    int timestamp int
    string string string
    string bool string
    string int string
    string uint string
    string double string
    string bytes string
    string timestamp string
    string duration string
    string net.IP string
    string net.CIDR string
    timestamp timestamp timestamp
    timestamp string timestamp
    timestamp int timestamp
    type A type
    uint uint uint
    uint int uint
    uint double uint
    uint string uint
    matches string string bool
    .matches string string bool
    .contains string string bool
    .startsWith string string bool
    .endsWith string string bool
    .charAt string int string
    .indexOf string string int
    .indexOf string string int int
    .indexOf list<A> A int
    .lastIndexOf string string int
    .lastIndexOf string string int int
    .lastIndexOf list<A> A int
    .join list<string> string
    .join list<string> string string
    .lowerAscii string string
    .upperAscii string string
    .replace string string string string
    .replace string string string int string
    .split string string list<string>
    .split string string int list<string>
    .substring string int string
    .substring string int int string
    .trim string string
    .reverse string string
    .format string list<dyn> string
    strings.quote string string
    .find string string string
    .findAll string string list<string>
    .isSorted list<A> bool
    .sum list<A> A
    .min list<A> A
    .max list<A> A
    sets.contains list<A> list<A> bool
    sets.equivalent list<A> list<A> bool
    sets.intersects list<A> list<A> bool
    optional.of A optional<A>
    optional.ofNonZeroValue A optional<A>
    optional.none optional<A>
    .hasValue optional<A> bool
    .value optional<A> A
    .or optional<A> optional<A> optional<A>
    .orValue optional<A> A A
    .getFullYear timestamp int
    .getFullYear timestamp string int
    .getMonth timestamp int
    .getMonth timestamp string int
    .getDayOfYear timestamp int
    .getDayOfYear timestamp string int
    .getDayOfMonth timestamp int
    .getDayOfMonth timestamp string int
    .getDate timestamp int
    .getDate timestamp string int
    .getDayOfWeek timestamp int
    .getDayOfWeek timestamp string int
    .getHours timestamp int
    .getHours timestamp string int
    .getHours duration int
    .getMinutes timestamp int
    .getMinutes timestamp string int
    .getMinutes duration int
    .getSeconds timestamp int
    .getSeconds timestamp string int
    .getSeconds duration int
    .getMilliseconds timestamp int
    .getMilliseconds timestamp string int
    .getMilliseconds duration int
    isURL string bool
    url string kubernetes.URL
    .getScheme kubernetes.URL string
    .getHost kubernetes.URL string
    .getHostname kubernetes.URL string
    .getPort kubernetes.URL string
    .getEscapedPath kubernetes.URL string
    isIP string bool
    ip string net.IP
    ip.isCanonical string bool
    .family net.IP int
    .isUnspecified net.IP bool
    .isLoopback net.IP bool
    .isLinkLocalUnicast net.IP bool
    .isLinkLocalMulticast net.IP bool
    .isGlobalUnicast net.IP bool
    isCIDR string bool
    cidr string net.CIDR
    .ip net.CIDR net.IP
    .masked net.CIDR net.CIDR
    .prefixLength net.CIDR int
    .containsIP net.CIDR string bool
    .containsIP net.CIDR net.IP bool
    .containsCIDR net.CIDR string bool
    .containsCIDR net.CIDR net.CIDR bool
    isQuantity string bool
    quantity string kubernetes.Quantity
    .sign kubernetes.Quantity int
    .isInteger kubernetes.Quantity bool
    .asInteger kubernetes.Quantity int
    .asApproximateFloat kubernetes.Quantity double
    .isGreaterThan kubernetes.Quantity kubernetes.Quantity bool
    .isLessThan kubernetes.Quantity kubernetes.Quantity bool
    .add kubernetes.Quantity kubernetes.Quantity kubernetes.Quantity
    .add kubernetes.Quantity int kubernetes.Quantity
    .sub kubernetes.Quantity kubernetes.Quantity kubernetes.Quantity
    .sub kubernetes.Quantity int kubernetes.Quantity
    .compareTo kubernetes.Quantity kubernetes.Quantity int
";

/// A type in the table.
#[derive(Debug)]
enum Term {
    Dyn,
    /// Any type, the same for the same letter.
    Any(&'static str),
    Simple(&'static str),
    List(Box<Term>),
    Map(Box<Term>, Box<Term>),
    Optional(Box<Term>),
}

#[derive(Debug)]
struct Overload {
    parameters: Vec<Term>,
    result: Term,
}

static OVERLOADS: LazyLock<HashMap<&str, Vec<Overload>>> = LazyLock::new(|| {
    let mut all = HashMap::<&str, Vec<Overload>>::new();
    for line in TABLE.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(result)) = (words.next(), words.next_back()) {
            let parameters = words.map(Term::parse).collect();
            all.entry(name).or_default().push(Overload { parameters, result: Term::parse(result) });
        }
    }
    all
});

/// Whether there is a function of this name.
pub(super) fn exists(name: &str) -> bool {
    OVERLOADS.contains_key(name)
}

/// The type of a function's result; none if it does not take these arguments.
pub(super) fn result<'a>(name: &str, arguments: &[Type<'a>]) -> Option<Type<'a>> {
    let fitting = OVERLOADS.get(name)?.iter().filter_map(|overload| overload.apply(arguments));
    fitting.reduce(|one, other| one.join(&other).unwrap_or(Type::Dyn))
}

impl Overload {
    fn apply<'a>(&self, arguments: &[Type<'a>]) -> Option<Type<'a>> {
        if arguments.len() != self.parameters.len() {
            return None;
        }
        let mut bound = HashMap::new();
        let fits = self.parameters.iter().zip(arguments).all(|(term, given)| term.takes(given, &mut bound));
        (fits && are_comparable(&bound)).then(|| self.result.applied(&bound))
    }
}

/// Two sides of an order, N and M: numbers of any type, or values of the same type that has an order.
fn are_comparable(bound: &HashMap<&str, Type<'_>>) -> bool {
    let (Some(one), Some(other)) = (bound.get("N"), bound.get("M")) else { return true };
    let number = |given: &Type<'_>| matches!(given, Type::Simple("int" | "uint" | "double"));
    let ordered = |given: &Type<'_>| {
        matches!(
            given,
            Type::Dyn | Type::Nothing | Type::Simple("bool" | "string" | "bytes" | "timestamp" | "duration")
        ) || number(given)
    };
    ordered(one) && ordered(other) && (number(one) && number(other) || one.may_be(other))
}

impl Term {
    fn parse(text: &'static str) -> Self {
        let inner = |start| text.strip_prefix(start).and_then(|rest: &str| rest.strip_suffix('>'));
        if let Some(item) = inner("list<") {
            Self::List(Self::parse(item).into())
        } else if let Some(held) = inner("optional<") {
            Self::Optional(Self::parse(held).into())
        } else if let Some((key, value)) = inner("map<").and_then(|both| both.split_once(',')) {
            Self::Map(Self::parse(key).into(), Self::parse(value).into())
        } else if text.len() == 1 {
            Self::Any(text)
        } else if text == "dyn" {
            Self::Dyn
        } else {
            Self::Simple(text)
        }
    }

    /// Whether a parameter of this type takes a value of the other.
    fn takes<'a>(&self, given: &Type<'a>, bound: &mut HashMap<&'static str, Type<'a>>) -> bool {
        match (self, given) {
            (Self::Any(letter), given) => {
                let both = bound.get(letter).map_or_else(|| Some(given.clone()), |known| known.join(given));
                both.map(|both| bound.insert(letter, both)).is_some()
            }
            (Self::Dyn, _) | (_, Type::Dyn | Type::Nothing) => true,
            (Self::Simple(wanted), Type::Simple(given)) => wanted == given,
            (Self::List(wanted), Type::List(given)) | (Self::Optional(wanted), Type::Optional(given)) => {
                wanted.takes(given, bound)
            }
            (Self::Map(key, value), Type::Map(given_key, given_value)) => {
                key.takes(given_key, bound) && value.takes(given_value, bound)
            }
            _ => false,
        }
    }

    fn applied<'a>(&self, bound: &HashMap<&'static str, Type<'a>>) -> Type<'a> {
        match self {
            Self::Dyn => Type::Dyn,
            Self::Any(letter) => bound.get(letter).cloned().unwrap_or(Type::Dyn),
            Self::Simple(name) => Type::Simple(name),
            Self::List(item) => Type::List(item.applied(bound).into()),
            Self::Map(key, value) => Type::Map(key.applied(bound).into(), value.applied(bound).into()),
            Self::Optional(held) => Type::Optional(held.applied(bound).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Term, Type, exists, result};

    #[test]
    fn overloads_by_arguments() {
        let of = |text: &'static str| Term::parse(text).applied(&[].into());
        for (name, arguments, expect) in [
            ("_+_", &["int", "int"][..], Some("int")),
            ("_+_", &["int", "string"], None),
            ("_+_", &["dyn", "string"], Some("string")),
            ("_+_", &["dyn", "dyn"], Some("dyn")),
            ("_+_", &["list<int>", "list<int>"], Some("list(int)")),
            ("_+_", &["list<int>", "list<string>"], None),
            ("_==_", &["int", "double"], None),
            ("_==_", &["int", "null"], Some("bool")),
            ("_==_", &["dyn", "double"], Some("bool")),
            ("_<_", &["int", "double"], Some("bool")),
            ("_<_", &["int", "string"], None),
            ("_<_", &["list<int>", "list<int>"], None),
            ("_<_", &["duration", "duration"], Some("bool")),
            ("_[_]", &["list<string>", "int"], Some("string")),
            ("_[_]", &["list<string>", "string"], None),
            ("_[_]", &["map<string,int>", "string"], Some("int")),
            ("@in", &["string", "list<int>"], None),
            ("_?_:_", &["bool", "int", "string"], None),
            ("_?_:_", &["bool", "int", "dyn"], Some("dyn")),
            (".orValue", &["optional<int>", "int"], Some("int")),
            (".orValue", &["optional<int>", "string"], None),
            (".size", &["int"], None),
            ("optional.none", &[], Some("optional_type(dyn)")),
        ] {
            let arguments: Vec<Type<'_>> = arguments.iter().map(|text| of(text)).collect();
            let found = result(name, &arguments).map(|found| found.to_string());
            assert_eq!(found.as_deref(), expect, "{name} {arguments:?}");
        }
        assert!(exists(".size") && exists("size") && !exists(".sise"));
    }
}
