//! A file that others change while we run: noticed by looking, since a mounted ConfigMap is behind two links.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt;

/// Bytes that a file may have. A ConfigMap or a Secret has at most one mebibyte.
pub const MOST: u64 = 16 << 20;
/// Between two looks. A change is taken over once two looks have seen the same, so that a file that is being written is
/// let be.
const LOOK: Duration = Duration::from_millis(500);

/// By what a change is noticed: links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

type Look = Result<Version, io::ErrorKind>;

/// A file, and what it was like when it was last taken over.
#[derive(Debug)]
pub struct Followed {
    path: PathBuf,
    taken: Look,
    seen: Look,
}

impl Followed {
    /// As it is now, which is to be taken over first.
    pub async fn begin(path: &Path) -> Self {
        let seen = look(path).await;
        Self { path: path.to_owned(), taken: seen, seen }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Completes when it is another one, which is then to be taken over.
    pub async fn changed(&mut self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = look(&self.path).await;
            let settled = now == self.seen;
            self.seen = now;
            if settled && self.seen != self.taken {
                self.taken = self.seen;
                return;
            }
        }
    }

    /// The whole of it; `None`: there was none when it was last looked at.
    ///
    /// # Errors
    /// When it cannot be read, or is longer than [`MOST`].
    pub async fn read(&self) -> io::Result<Option<Vec<u8>>> {
        if self.taken == Err(io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        tokio::fs::File::open(&self.path).await?.take(MOST + 1).read_to_end(&mut bytes).await?;
        if bytes.len() as u64 > MOST {
            let text = format!("it is longer than {MOST} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        Ok(Some(bytes))
    }
}

async fn look(path: &Path) -> Look {
    let data = tokio::fs::metadata(path).await.map_err(|error| error.kind())?;
    let changed = (data.ctime(), data.ctime_nsec());
    Ok(Version { device: data.dev(), inode: data.ino(), size: data.size(), changed })
}
