//! What can be wrong between two proxies, in words for people and in cases for metrics.

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError};

use crate::identity::{Identity, InvalidIdentity, TrustDomain};

/// Why a connection was not established, or broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// We refuse the peer's certificate.
    #[error("the peer's certificate is refused: {0}")]
    Peer(CertificateFault),
    /// The peer refuses ours; the alert says no more than this.
    #[error("the peer refuses our certificate: {0}")]
    Ours(CertificateFault),
    /// What the peer sends is not TLS.
    #[error("the peer does not speak TLS on this port ({0})")]
    NotTls(String),
    /// No version, cipher suite, key exchange group or application protocol that both allow.
    #[error("the peer offers nothing that is allowed here (TLS 1.3, AES-GCM, h2): {0}")]
    Incompatible(String),
    /// The peer closed before the handshake was over.
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    /// The peer did not finish the handshake in time.
    #[error("the TLS handshake was not finished in time")]
    Timeout,
    /// The connection under it failed.
    #[error("connection failed: {0}")]
    Io(String),
    /// Any other breach of the protocol, in rustls's words.
    #[error("TLS failed: {0}")]
    Other(String),
}

/// What is wrong with a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateFault {
    /// Its time is over.
    Expired,
    /// Its time has not come; clocks may differ.
    NotYetValid,
    /// It does not lead to a root that is trusted here.
    UnknownIssuer,
    /// Its SPIFFE name is of another trust domain.
    WrongTrustDomain {
        /// Ours.
        expected: TrustDomain,
        /// What it names.
        actual: Identity,
    },
    /// Its SPIFFE name is none of those that may answer here.
    WrongIdentity {
        /// Who may.
        expected: Vec<Identity>,
        /// What it names.
        actual: Identity,
    },
    /// It has no URI name.
    NoIdentity,
    /// It has several URI names, so that it depends on the reader whose it is.
    SeveralNames(usize),
    /// Its URI name is not of the form that the mesh uses.
    BadIdentity(InvalidIdentity),
    /// There is none.
    NoCertificate,
    /// It, or one that it was issued by, is on a revocation list.
    Revoked,
    /// There may be revocation lists, and what is on them has never been known here.
    RevocationUnknown,
    /// Refused by the peer without a reason: it may expect another identity or trust domain.
    Unexplained(String),
    /// Anything else, in rustls's words.
    Other(String),
}

impl fmt::Display for CertificateFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired => f.write_str("it has expired"),
            Self::NotYetValid => f.write_str("it is not valid yet (compare the clocks of the two nodes)"),
            Self::UnknownIssuer => f.write_str("its issuer is unknown (the two sides trust different roots)"),
            Self::WrongTrustDomain { expected, actual } => {
                write!(f, "wrong trust domain: expected {expected}, got {actual}")
            }
            Self::WrongIdentity { expected, actual } => {
                write!(f, "wrong identity: expected {}, got {actual}", Names(expected))
            }
            Self::NoIdentity => f.write_str("it carries no SPIFFE identity"),
            Self::SeveralNames(count) => write!(f, "it carries {count} URI names, where SPIFFE allows one"),
            Self::BadIdentity(error) => write!(f, "it carries no SPIFFE identity of a workload: {error}"),
            Self::NoCertificate => f.write_str("none was presented"),
            Self::Revoked => f.write_str("it, or the certificate of its issuer, is revoked"),
            Self::RevocationUnknown => {
                f.write_str("it may be revoked: no revocation list could be read yet (see --crl-path)")
            }
            Self::Unexplained(alert) => {
                write!(f, "alert {alert} (it may expect another identity or trust domain)")
            }
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// So that a verifier can hand it through rustls.
impl std::error::Error for CertificateFault {}

struct Names<'a>(&'a [Identity]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            [first, rest @ ..] => {
                write!(f, "{first}")?;
                rest.iter().try_for_each(|name| write!(f, " or {name}"))
            }
        }
    }
}

impl TlsError {
    /// Reads an I/O error of a TLS stream.
    pub fn from_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error) => Self::from(error),
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Closed,
            None => Self::Io(error.to_string()),
        }
    }

    /// Whether a certificate of either side is revoked.
    pub fn is_revoked(&self) -> bool {
        matches!(self, Self::Peer(CertificateFault::Revoked) | Self::Ours(CertificateFault::Revoked))
    }

    /// A short constant for a metric label or a log field.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Peer(fault) | Self::Ours(fault) => fault.reason(),
            Self::NotTls(_) => "not_tls",
            Self::Incompatible(_) => "incompatible",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
            Self::Io(_) => "io",
            Self::Other(_) => "other",
        }
    }
}

impl CertificateFault {
    fn reason(&self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::WrongTrustDomain { .. } => "wrong_trust_domain",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::NoIdentity => "no_identity",
            Self::SeveralNames(_) => "several_names",
            Self::BadIdentity(_) => "bad_identity",
            Self::NoCertificate => "no_certificate",
            Self::Revoked => "revoked",
            Self::RevocationUnknown => "revocation_unknown",
            Self::Unexplained(_) => "refused",
            Self::Other(_) => "bad_certificate",
        }
    }
}

impl From<&rustls::Error> for TlsError {
    fn from(error: &rustls::Error) -> Self {
        use rustls::Error;
        match error {
            Error::InvalidCertificate(error) => Self::Peer(error.into()),
            Error::NoCertificatesPresented => Self::Peer(CertificateFault::NoCertificate),
            Error::AlertReceived(alert) => alert_received(*alert),
            Error::InvalidMessage(what) => Self::NotTls(format!("{what:?}")),
            Error::PeerIncompatible(what) => Self::Incompatible(format!("{what:?}")),
            Error::NoApplicationProtocol => Self::Incompatible("no common application protocol".into()),
            other => Self::Other(other.to_string()),
        }
    }
}

fn alert_received(alert: AlertDescription) -> TlsError {
    let fault = match alert {
        // Also sent for one that is not valid yet (RFC 8446 6.2).
        AlertDescription::CertificateExpired => CertificateFault::Expired,
        AlertDescription::UnknownCA => CertificateFault::UnknownIssuer,
        AlertDescription::CertificateRequired => CertificateFault::NoCertificate,
        AlertDescription::CertificateRevoked => CertificateFault::Revoked,
        AlertDescription::CertificateUnknown
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => CertificateFault::Unexplained(format!("{alert:?}")),
        AlertDescription::ProtocolVersion
        | AlertDescription::HandshakeFailure
        | AlertDescription::NoApplicationProtocol => {
            return TlsError::Incompatible(format!("alert {alert:?}"));
        }
        other => return TlsError::Other(format!("alert {other:?}")),
    };
    TlsError::Ours(fault)
}

impl From<&CertificateError> for CertificateFault {
    fn from(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::Other(other) => match other.0.downcast_ref::<Self>() {
                Some(fault) => fault.clone(),
                None => Self::Other(other.to_string()),
            },
            other => Self::Other(other.to_string()),
        }
    }
}
