//! Keeps revocation lists as a file has them.
//!
//! **Invariant:** a file that cannot be used changes nothing; only one that is not there lifts the lists. One that could
//! not be used from the start leaves unknown who is revoked.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncReadExt;

use super::Revocations;
use crate::tls::crl::Lists;

/// Bytes that a file may have. A ConfigMap or a Secret has at most one mebibyte.
pub const MOST: u64 = 16 << 20;
/// Between two looks. A change is taken over once two looks have seen the same, so that a file that is being written is
/// let be.
const LOOK: Duration = Duration::from_millis(500);

/// By what a change is noticed: links (a mounted ConfigMap is behind two) are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Takes over what is there. To be awaited before the first connection.
pub async fn load(revocations: &Revocations, path: &Path) -> Follow {
    let seen = look(path).await;
    take_over(revocations, path, &seen).await;
    Follow { taken: seen, seen }
}

/// What a file was like.
#[derive(Debug)]
pub struct Follow {
    taken: Look,
    seen: Look,
}

type Look = Result<Version, io::ErrorKind>;

impl Follow {
    /// Takes over changes of the file, for ever.
    pub async fn run(mut self, revocations: &Revocations, path: &Path) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = look(path).await;
            let settled = now == self.seen;
            self.seen = now;
            if settled && self.seen != self.taken {
                take_over(revocations, path, &self.seen).await;
                self.taken = self.seen;
            }
        }
    }
}

async fn look(path: &Path) -> Look {
    let data = tokio::fs::metadata(path).await.map_err(|error| error.kind())?;
    let changed = (data.ctime(), data.ctime_nsec());
    Ok(Version { device: data.dev(), inode: data.ino(), size: data.size(), changed })
}

async fn take_over(revocations: &Revocations, path: &Path, seen: &Look) {
    let path_shown = path.display();
    if *seen == Err(io::ErrorKind::NotFound) {
        tracing::info!(path = %path_shown, "no file with revocation lists: no certificate is revoked");
        return revocations.replace(Lists::default());
    }
    let lists = match read(path).await {
        Ok(bytes) => Lists::parse(&bytes).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match lists {
        Ok(lists) => {
            let (count, revoked) = lists.facts().fold((0, 0), |(n, sum), facts| (n + 1, sum + facts.revoked));
            tracing::info!(path = %path_shown, lists = count, revoked, "revocation lists are in force");
            revocations.replace(lists);
        }
        Err(error) => {
            let until = match revocations.are_unknown() {
                true => "nobody is believed until there are some that can be used, or no file",
                false => "those before stay in force",
            };
            tracing::error!(path = %path_shown, error, "revocation lists cannot be used: {until}");
            revocations.failed(format!("{path_shown}: {error}"));
        }
    }
}

/// The whole file, if it is not too long.
async fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    tokio::fs::File::open(path).await?.take(MOST + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MOST {
        let text = format!("it is longer than {MOST} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}
