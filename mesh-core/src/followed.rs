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
    /// What was to be taken over could not be read, which says nothing of what it is.
    unread: bool,
}

impl Followed {
    /// As it is now, which is to be taken over first.
    pub async fn begin(path: &Path) -> Self {
        let seen = look(path).await;
        Self { path: path.to_owned(), taken: seen, seen, unread: false }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Completes when it is another one, or can be read at last, which is then to be taken over.
    pub async fn changed(&mut self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = look(&self.path).await;
            let settled = now == self.seen;
            self.seen = now;
            let is_other = self.seen != self.taken;
            if settled && (is_other || self.unread && whole(&self.path).await.is_ok()) {
                self.taken = self.seen;
                return;
            }
        }
    }

    /// The whole of it; `None`: there was none when it was last looked at.
    ///
    /// # Errors
    /// When it cannot be read, or is longer than [`MOST`].
    pub async fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.taken == Err(io::ErrorKind::NotFound) {
            self.unread = false;
            return Ok(None);
        }
        let bytes = whole(&self.path).await;
        self.note(bytes.as_ref().err());
        bytes.map(Some)
    }

    /// A lack of descriptors or a disk's fault passes without the file's being changed; its length does not.
    fn note(&mut self, error: Option<&io::Error>) {
        self.unread = error.is_some_and(|error| error.kind() != io::ErrorKind::FileTooLarge);
    }
}

async fn whole(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    tokio::fs::File::open(path).await?.take(MOST + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MOST {
        let text = format!("it is longer than {MOST} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

async fn look(path: &Path) -> Look {
    let data = tokio::fs::metadata(path).await.map_err(|error| error.kind())?;
    let changed = (data.ctime(), data.ctime_nsec());
    Ok(Version { device: data.dev(), inode: data.ino(), size: data.size(), changed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_could_not_be_read_is_read_again() {
        let path = std::env::temp_dir().join(format!("ambit-followed-{}", std::process::id()));
        std::fs::write(&path, "lists").unwrap();
        let mut file = Followed::begin(&path).await;
        assert_eq!(file.read().await.unwrap().unwrap(), b"lists");
        // As the kernel says where a process has no more descriptors.
        file.note(Some(&io::Error::from_raw_os_error(24)));
        let again = tokio::time::timeout(20 * LOOK, file.changed()).await;
        assert!(again.is_ok(), "the file is as it was, and was not read");
        assert_eq!(file.read().await.unwrap().unwrap(), b"lists");
        for error in [None, Some(io::Error::from(io::ErrorKind::FileTooLarge))] {
            file.note(error.as_ref());
            let again = tokio::time::timeout(2 * LOOK, file.changed()).await;
            assert!(again.is_err(), "{error:?}: to read it again would change nothing");
        }
        std::fs::remove_file(&path).unwrap();
    }
}
