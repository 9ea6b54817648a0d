//! The formats of strings that a schema can ask for; a format not known here asks for nothing, as in the real server.
//! Reference: `k8s.io/apiextensions-apiserver/pkg/apiserver/validation/formats.go`.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use k8s_openapi::jiff::{Timestamp, civil};

use super::super::meta;

/// Whether `text` has this format.
pub(super) fn holds(format: &str, text: &str) -> bool {
    match format {
        "date-time" | "datetime" => text.parse::<Timestamp>().is_ok(),
        "date" => text.parse::<civil::Date>().is_ok(),
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<IpNet>().is_ok(),
        "byte" => meta::from_base64(text).is_some(),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => is_uuid(text),
        "uri" => text.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some() || text.starts_with('/')),
        "email" => text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && !host.is_empty()),
        _ => true,
    }
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &&str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    parts.iter().all(hex) && (lengths == [8, 4, 4, 4, 12] || lengths == [32])
}

#[cfg(test)]
mod tests {
    use super::holds;

    #[test]
    fn formats() {
        for (format, good, bad) in [
            ("date-time", "2025-01-02T03:04:05Z", "2025-01-02"),
            ("date", "2025-01-02", "2025-13-02"),
            ("ipv4", "10.0.0.1", "::1"),
            ("ipv6", "::1", "10.0.0.1"),
            ("cidr", "10.0.0.0/8", "10.0.0.0"),
            ("byte", "aGVsbG8=", "a"),
            ("uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6ba7b810"),
            ("uri", "https://a.b/c", "a b"),
            ("email", "a@b", "a"),
        ] {
            assert!(holds(format, good), "{format} {good}");
            assert!(!holds(format, bad), "{format} {bad}");
        }
        assert!(holds("of-our-own", "anything"));
    }
}
