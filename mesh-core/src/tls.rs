//! Mutual TLS between proxies: TLS 1.3 only, HTTP/2 inside, SPIFFE names instead of host names.
//!
//! `client` and `server` make the two ends, `verify` decides whom to believe. What goes wrong is one [`TlsError`], the
//! same on the side that refuses and, from the alert, on the side that is refused.
//!
//! **Invariant:** a [`Stream`] exists only after the peer's chain, validity and name were verified.

pub mod client;
pub mod crl;
pub mod revocation;
pub mod server;
pub mod verify;

mod fault;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

pub use self::fault::{CertificateFault, TlsError};
use self::revocation::Presented;

/// The only protocol inside, as ALPN names it.
pub const ALPN: &[u8] = b"h2";

/// Ciphertext that one write may queue, in bytes: 16 full records, so that a bulk transfer needs one system call for
/// them.
const WRITE_LIMIT: usize = 256 * 1024;

/// The one crypto provider: AES-256 before AES-128, hybrid post-quantum key exchange before the classic ones, nothing
/// else (the order of Istio's ztunnel but for the hybrid group, which it offers last).
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}

/// An established connection. It remembers why it broke: HTTP/2 above it keeps only the text of an I/O error, and a
/// client learns only here, after its own handshake is done, that the server refused its certificate.
#[derive(Debug)]
pub struct Stream<IO> {
    inner: TlsStream<IO>,
    broken: Broken,
    presented: Option<Presented>,
}

/// Why a [`Stream`] broke, readable after the stream has gone into HTTP/2.
#[derive(Clone, Debug, Default)]
pub struct Broken(Arc<OnceLock<TlsError>>);

impl Broken {
    /// The first error, if there was one.
    pub fn reason(&self) -> Option<&TlsError> {
        self.0.get()
    }

    /// Says why before the stream is ended from this side.
    pub(crate) fn because(&self, reason: TlsError) {
        let _ = self.0.set(reason);
    }
}

impl<IO> Stream<IO> {
    fn new(mut inner: TlsStream<IO>, presented: Option<Presented>) -> Self {
        match &mut inner {
            TlsStream::Client(stream) => stream.get_mut().1.set_buffer_limit(Some(WRITE_LIMIT)),
            TlsStream::Server(stream) => stream.get_mut().1.set_buffer_limit(Some(WRITE_LIMIT)),
        }
        Self { inner, broken: Broken::default(), presented }
    }

    /// A view of what breaks it later.
    pub fn broken(&self) -> Broken {
        self.broken.clone()
    }

    /// What the peer proved itself with, if that may be revoked while the stream is open.
    pub fn presented(&self) -> Option<Presented> {
        self.presented.clone()
    }

    /// What is left of the time of the peer's certificate.
    pub fn proved_for(&self) -> Duration {
        let leaf = self.inner.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let until = leaf.and_then(verify::not_after);
        until.and_then(|until| until.duration_since(SystemTime::now()).ok()).unwrap_or_default()
    }

    /// What the handshake settled on, for logs and tests: cipher suite and key exchange group.
    pub fn negotiated(&self) -> (Option<rustls::CipherSuite>, Option<rustls::NamedGroup>) {
        let connection = self.inner.get_ref().1;
        let suite = connection.negotiated_cipher_suite().map(|suite| suite.suite());
        (suite, connection.negotiated_key_exchange_group().map(|group| group.name()))
    }

    fn noted<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &polled {
            let _ = self.broken.0.set(TlsError::from_io(error));
        }
        polled
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.noted(polled)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.noted(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.noted(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.noted(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.noted(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
