//! Kubernetes' functions of URLs, addresses and address blocks.

use std::net::IpAddr;
use std::sync::Arc;

use cel::extractors::This;
use cel::objects::Opaque;
use cel::{Context, DeclarationError, Value as Cel};
use http::Uri;
use ipnet::IpNet;

use super::functions::{Outcome, Text, failed};

/// A value of one of the types of this library.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Net {
    Url(Uri),
    Ip(IpAddr),
    Cidr(IpNet),
}

/// A function by its name.
type Function<T, R> = (&'static str, fn(&T) -> R);

impl Opaque for Net {
    fn runtime_type_name(&self) -> &str {
        match self {
            Self::Url(_) => "kubernetes.URL",
            Self::Ip(_) => "net.IP",
            Self::Cidr(_) => "net.CIDR",
        }
    }
}

impl Net {
    fn cel(self) -> Cel {
        Cel::Opaque(Arc::new(self))
    }

    fn of<'a>(function: &str, value: &'a Cel) -> Outcome<&'a Self> {
        let found = if let Cel::Opaque(value) = value { value.downcast_ref::<Self>() } else { None };
        found.map_or_else(|| failed(function, format!("no such overload for {value:?}")), Ok)
    }
}

pub(super) fn declare(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    urls(context)?;
    addresses(context)?;
    blocks(context)
}

/// Absolute, or a path: as Go's `url.ParseRequestURI`.
fn url(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    (uri.scheme().is_some() || text.starts_with('/')).then_some(uri)
}

/// An address without zone, and not one of IPv4 in the form of IPv6.
fn address(text: &str) -> Option<IpAddr> {
    let address: IpAddr = text.parse().ok()?;
    let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
    (!mapped).then_some(address)
}

fn urls(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("isURL", |text: Text| url(&text).is_some())?;
    context.add_function("url", |text: Text| -> Outcome<Cel> {
        url(&text).map_or_else(
            || failed("url", "URL parse error during conversion from string"),
            |uri| Ok(Net::Url(uri).cel()),
        )
    })?;
    let parts: [Function<Uri, String>; 5] = [
        ("getScheme", |uri| uri.scheme_str().unwrap_or_default().to_owned()),
        ("getHost", |uri| uri.authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default()),
        ("getHostname", |uri| uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned()),
        ("getPort", |uri| uri.port().map(|port| port.to_string()).unwrap_or_default()),
        ("getEscapedPath", |uri| uri.path().to_owned()),
    ];
    for (name, part) in parts {
        context.add_function(name, move |This(value): This<Cel>| match Net::of(name, &value)? {
            Net::Url(uri) => Ok(Cel::from(part(uri))),
            _ => failed(name, "no such overload"),
        })?;
    }
    Ok(())
}

fn addresses(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("isIP", |text: Text| address(&text).is_some())?;
    context.add_function("ip.isCanonical", |text: Text| -> Outcome<bool> {
        address(&text).map_or_else(
            || {
                failed(
                    "ip.isCanonical",
                    format!("IP Address {text:?} parse error during conversion from string"),
                )
            },
            |address| Ok(address.to_string() == *text),
        )
    })?;
    // Of a text, and the address of a block.
    context.add_function("ip", |This(value): This<Cel>| -> Outcome<Cel> {
        match &value {
            Cel::String(text) => match address(text) {
                Some(address) => Ok(Net::Ip(address).cel()),
                None => {
                    failed("ip", format!("IP Address {text:?} parse error during conversion from string"))
                }
            },
            value => match Net::of("ip", value)? {
                Net::Cidr(block) => Ok(Net::Ip(block.addr()).cel()),
                _ => failed("ip", "no such overload"),
            },
        }
    })?;
    context.add_function("family", |This(value): This<Cel>| match Net::of("family", &value)? {
        Net::Ip(address) => Ok(Cel::Int(if address.is_ipv4() { 4 } else { 6 })),
        _ => failed("family", "no such overload"),
    })?;
    let questions: [Function<IpAddr, bool>; 5] = [
        ("isUnspecified", IpAddr::is_unspecified),
        ("isLoopback", IpAddr::is_loopback),
        ("isLinkLocalUnicast", |address| match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        }),
        ("isLinkLocalMulticast", |address| match address {
            IpAddr::V4(address) => address.octets().starts_with(&[224, 0, 0]),
            IpAddr::V6(address) => address.segments()[0] & 0xff0f == 0xff02,
        }),
        ("isGlobalUnicast", |address| {
            let link_local = match address {
                IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
                IpAddr::V6(address) => address.is_unicast_link_local(),
            };
            !link_local && !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
        }),
    ];
    for (name, question) in questions {
        context.add_function(name, move |This(value): This<Cel>| match Net::of(name, &value)? {
            Net::Ip(address) => Ok(Cel::Bool(question(address))),
            _ => failed(name, "no such overload"),
        })?;
    }
    Ok(())
}

fn blocks(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("isCIDR", |text: Text| text.parse::<IpNet>().is_ok())?;
    context.add_function("cidr", |text: Text| -> Outcome<Cel> {
        text.parse().map_or_else(
            |_| failed("cidr", "network address parse error during conversion from string"),
            |block| Ok(Net::Cidr(block).cel()),
        )
    })?;
    context.add_function("prefixLength", |This(value): This<Cel>| {
        match Net::of("prefixLength", &value)? {
            Net::Cidr(block) => Ok(Cel::Int(block.prefix_len().into())),
            _ => failed("prefixLength", "no such overload"),
        }
    })?;
    context.add_function("masked", |This(value): This<Cel>| match Net::of("masked", &value)? {
        Net::Cidr(block) => Ok(Net::Cidr(block.trunc()).cel()),
        _ => failed("masked", "no such overload"),
    })?;
    context.add_function("containsIP", |This(value): This<Cel>, inner: Cel| {
        contains("containsIP", &value, &inner)
    })?;
    context.add_function("containsCIDR", |This(value): This<Cel>, inner: Cel| {
        contains("containsCIDR", &value, &inner)
    })
}

/// Whether a block contains an address or block, given as text or value.
fn contains(function: &str, block: &Cel, inner: &Cel) -> Outcome<Cel> {
    let Net::Cidr(block) = Net::of(function, block)? else { return failed(function, "no such overload") };
    let inner = match inner {
        Cel::String(text) if function == "containsIP" => address(text).map(IpNet::from),
        Cel::String(text) => text.parse().ok(),
        value => match Net::of(function, value)? {
            Net::Ip(address) => Some(IpNet::from(*address)),
            Net::Cidr(block) => Some(*block),
            Net::Url(_) => None,
        },
    };
    inner.map_or_else(
        || failed(function, "parse error during conversion from string"),
        |inner| Ok(Cel::Bool(block.contains(&inner))),
    )
}
