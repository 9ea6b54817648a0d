//! Keeps revocation lists as a file has them.
//!
//! **Invariant:** a file that cannot be used changes nothing; only one that is not there lifts the lists. One that could
//! not be used from the start leaves unknown who is revoked.

use std::path::Path;

use super::Revocations;
use crate::followed::Followed;
use crate::tls::crl::Lists;

/// Takes over what is there. To be awaited before the first connection.
pub async fn load(revocations: &Revocations, path: &Path) -> Follow {
    let mut file = Followed::begin(path).await;
    take_over(revocations, &mut file).await;
    Follow(file)
}

/// The file, as it was taken over.
#[derive(Debug)]
pub struct Follow(Followed);

impl Follow {
    /// Takes over changes of the file, for ever.
    pub async fn run(mut self, revocations: &Revocations) -> std::convert::Infallible {
        loop {
            self.0.changed().await;
            take_over(revocations, &mut self.0).await;
        }
    }
}

async fn take_over(revocations: &Revocations, file: &mut Followed) {
    let read = file.read().await;
    let path = file.path().display();
    let lists = match read {
        Ok(None) => {
            tracing::info!(%path, "no file with revocation lists: no certificate is revoked");
            return revocations.replace(Lists::default());
        }
        Ok(Some(bytes)) => Lists::parse(&bytes).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match lists {
        Ok(lists) => {
            let (count, revoked) = lists.facts().fold((0, 0), |(n, sum), facts| (n + 1, sum + facts.revoked));
            tracing::info!(%path, lists = count, revoked, "revocation lists are in force");
            revocations.replace(lists);
        }
        Err(error) => {
            let until = match revocations.are_unknown() {
                true => "nobody is believed until there are some that can be used, or no file",
                false => "those before stay in force",
            };
            tracing::error!(%path, error, "revocation lists cannot be used: {until}");
            revocations.failed(format!("{path}: {error}"));
        }
    }
}
