//! The mesh's roots as a file has them, beside those that come with each certificate: a certificate tells of new roots
//! only when it is renewed, half a day later.
//!
//! **Invariant:** the file adds roots, and takes away only those that it once had: certificates of another authority,
//! which this file knows nothing of, stay good. A file that cannot be used changes nothing.

use std::path::Path;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::watch;

use crate::followed::Followed;

/// Roots that were in the file once are remembered, the last ones of this many.
const MOST_GONE: usize = 64;

type Certs = Vec<CertificateDer<'static>>;

/// What the file says and has said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bundle {
    there: Certs,
    gone: Certs,
}

impl Bundle {
    /// What follows when the file has these roots.
    #[must_use]
    pub fn replaced_by(&self, there: Certs) -> Self {
        let gone = self.gone.iter().chain(&self.there).filter(|root| !there.contains(root)).cloned();
        let mut gone: Certs = gone.collect();
        gone.drain(..gone.len().saturating_sub(MOST_GONE));
        Self { there, gone }
    }

    /// Whom to trust with a certificate that came with the roots `own`.
    pub fn with(&self, own: &[CertificateDer<'static>]) -> Certs {
        let more = own.iter().filter(|root| !self.there.contains(root) && !self.gone.contains(root));
        self.there.iter().chain(more).cloned().collect()
    }
}

/// The roots of a file; clones are the same. The default has none and never will.
#[derive(Clone, Debug, Default)]
pub struct Roots(Option<Arc<watch::Sender<Arc<Bundle>>>>);

impl Roots {
    async fn follow(path: &Path) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (roots, mut file) = (Self(Some(Arc::default())), Followed::begin(path).await);
        roots.take_over(&mut file).await;
        let kept = roots.clone();
        let follow = async move {
            loop {
                file.changed().await;
                kept.take_over(&mut file).await;
            }
        };
        (roots, follow)
    }

    /// Those of the file, if there is to be one. Takes over what is there, to be awaited before the first certificate;
    /// the second part keeps them so for ever.
    pub async fn follow_if(path: Option<&Path>) -> (Self, BoxFuture<'static, ()>) {
        let Some(path) = path else { return (Self::default(), std::future::ready(()).boxed()) };
        let (roots, follow) = Self::follow(path).await;
        (roots, follow.boxed())
    }

    async fn take_over(&self, file: &mut Followed) {
        let bytes = file.read().await;
        let path = file.path().display();
        match bytes.map(|bytes| parse(&bytes.unwrap_or_default())) {
            Ok(Some(there)) => {
                tracing::info!(%path, roots = there.len(), "the mesh's roots are as this file has them");
                self.replace(there);
            }
            Ok(None) => tracing::error!(%path, "no file with roots (PEM): those before stay trusted"),
            Err(error) => tracing::error!(%path, %error, "roots cannot be read, those before stay trusted"),
        }
    }

    pub(super) fn replace(&self, there: Certs) {
        if let Some(sender) = &self.0 {
            sender.send_modify(|bundle| *bundle = Arc::new(bundle.replaced_by(there)));
        }
    }

    /// What the file says, and when it says something else.
    pub(super) fn watch(&self) -> watch::Receiver<Arc<Bundle>> {
        self.0.as_ref().map_or_else(|| watch::channel(Arc::default()).1, |sender| sender.subscribe())
    }

    #[cfg(test)]
    pub(super) fn of(there: Certs) -> Self {
        let roots = Self(Some(Arc::default()));
        roots.replace(there);
        roots
    }
}

/// `None` where there is none, or not all of it is certificates.
fn parse(pem: &[u8]) -> Option<Certs> {
    let roots: Result<Certs, _> = CertificateDer::pem_slice_iter(pem).collect();
    let taken = |roots: &Certs| roots.iter().all(|root| RootCertStore::empty().add(root.clone()).is_ok());
    roots.ok().filter(|roots| !roots.is_empty() && taken(roots))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_ca::TestCa;

    fn roots(names: &[u8]) -> Certs {
        names.iter().map(|name| CertificateDer::from(vec![*name])).collect()
    }

    #[test]
    fn the_file_adds_roots_and_takes_away_those_that_it_had() {
        let mut bundle = Bundle::default();
        for (there, own, expect) in [
            (None, b"a".as_slice(), b"a".as_slice()),
            (Some(b"a".as_slice()), b"a", b"a"),
            (Some(b"ab"), b"a", b"ab"),
            // Of another authority.
            (Some(b"ab"), b"xa", b"abx"),
            (Some(b"b"), b"ab", b"b"),
            (Some(b"b"), b"a", b"b"),
            // Back again.
            (Some(b"ba"), b"b", b"ba"),
            (Some(b"a"), b"ba", b"a"),
        ] {
            if let Some(there) = there {
                bundle = bundle.replaced_by(roots(there));
            }
            assert_eq!(bundle.with(&roots(own)), roots(expect), "{there:?} {own:?}");
        }
    }

    #[test]
    fn what_is_gone_is_not_remembered_without_end() {
        let all = (0..=u8::MAX).fold(Bundle::default(), |bundle, name| bundle.replaced_by(roots(&[name])));
        assert_eq!(all.gone.len(), MOST_GONE);
        assert_eq!(all.with(&roots(&[254, 0])), roots(&[255, 0]));
    }

    #[test]
    fn a_file_that_is_not_all_certificates_is_none() {
        let root = TestCa::new().root_pem();
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (text, expect) in [
            (root.clone(), Some(1)),
            (root.repeat(2), Some(2)),
            (String::new(), None),
            ("no PEM".into(), None),
            (format!("{root}{broken}"), None),
        ] {
            assert_eq!(parse(text.as_bytes()).map(|roots| roots.len()), expect, "{text}");
        }
    }
}
