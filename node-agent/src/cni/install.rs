//! Chains our plugin into the node's CNI configuration, and keeps it there when another CNI rewrites its file.
//!
//! The configuration is the one a runtime takes: the first by name in the directory. A list gets our entry in place; a
//! single configuration stays as it is, and a list made from it is put right before it.
//!
//! **Invariant:** files appear whole or not at all; stopping the agent removes nothing, so that pods wait for the next
//! agent rather than start outside the mesh.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_core::readiness::Gate;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cni::conflist::{self, Entry, InvalidConfiguration};
use crate::cni::plugin::TYPE;

/// Where the node keeps its CNI files.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Directory of the node's CNI configuration.
    #[arg(long, env = "AMBIT_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Directory of the node's CNI plugins.
    #[arg(long, env = "AMBIT_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Chain mesh-cni into the node's CNI configuration; without it, new pods join the mesh only after they started.
    #[arg(long, env = "AMBIT_CNI_INSTALL", default_value_t = true, action = clap::ArgAction::Set)]
    pub cni_install: bool,
}

/// Puts the plugin on the node.
#[derive(Clone, Debug)]
pub struct Installer {
    conf_dir: PathBuf,
    bin_dir: PathBuf,
    binary: PathBuf,
    entry: Entry,
}

/// What [`Installer::once`] found or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// Every new pod is announced to the agent.
    Chained {
        /// The file that has our entry.
        file: PathBuf,
        /// It was written just now.
        changed: bool,
    },
    /// The node has no CNI configuration (yet): no pod can start on it either.
    NoConfiguration,
}

/// Why the plugin could not be put on the node.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or directory cannot be read or written.
    #[error("cannot {act} {}: {source}", path.display())]
    File {
        /// What was tried.
        act: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The configuration that runtimes take cannot be chained.
    #[error("cannot chain {TYPE} into {}: {source}; new pods would start outside the mesh", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: InvalidConfiguration,
    },
}

impl Installer {
    /// `socket` is where [`crate::cni::server::serve`] listens.
    pub fn new(config: &Config, binary: PathBuf, socket: &Path, exclude_namespaces: Vec<String>) -> Self {
        Self {
            conf_dir: config.cni_conf_dir.clone(),
            bin_dir: config.cni_bin_dir.clone(),
            binary,
            entry: Entry { socket: socket.display().to_string(), exclude_namespaces },
        }
    }

    /// As [`Self::remove`], for whom has nothing to install.
    ///
    /// # Errors
    /// As there.
    pub fn remove_from(config: &Config) -> Result<(), InstallError> {
        Self::new(config, PathBuf::new(), Path::new(""), Vec::new()).remove()
    }

    /// Makes the node as it should be; cheap when it is already. Only call it once the agent's socket is there: a
    /// runtime may use the plugin at once.
    ///
    /// # Errors
    /// When a file cannot be read or written, or the configuration cannot be chained.
    pub fn once(&self) -> Result<Installed, InstallError> {
        self.install_binary()?;
        let Some(name) = self.current()? else {
            self.remove_derived(None)?;
            return Ok(Installed::NoConfiguration);
        };
        if conflist::is_list(&name) {
            let installed = self.rewrite(&name, &name, |text| conflist::chain(text, &self.entry))?;
            self.remove_derived(None)?;
            return Ok(installed);
        }
        let derived = conflist::derived_name(&name);
        self.remove_derived(Some(&derived))?;
        self.rewrite(&name, &derived, |text| conflist::convert(text, &self.entry).map(Some))
    }

    /// Takes our entry out of every list, and our lists and binary off the node: only for an uninstall, since pods that
    /// start afterwards are outside the mesh.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn remove(&self) -> Result<(), InstallError> {
        self.remove_derived(None)?;
        for name in self.names()?.iter().filter(|name| conflist::is_list(name)) {
            // A list that we cannot read has no entry that we wrote.
            match self.rewrite(name, name, conflist::unchain) {
                Err(InstallError::Configuration { .. }) | Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
        remove_if_there(&self.bin_dir.join(TYPE))
    }

    /// The configuration that a runtime takes, our own lists aside: the first by name that is one at all.
    fn current(&self) -> Result<Option<String>, InstallError> {
        for name in self.names()? {
            if conflist::is_derived(&name) {
                continue;
            }
            let text = self.read(&name)?;
            let usable = match conflist::is_list(&name) {
                true => conflist::chain(&text, &self.entry).map(drop),
                false => conflist::convert(&text, &self.entry).map(drop),
            };
            match usable {
                Ok(()) | Err(InvalidConfiguration::Version { .. }) => return Ok(Some(name)),
                Err(error) => warn!(file = name, %error, "not a CNI configuration: skipped, as runtimes do"),
            }
        }
        Ok(None)
    }

    fn rewrite(
        &self,
        from: &str,
        to: &str,
        edit: impl Fn(&str) -> Result<Option<String>, InvalidConfiguration>,
    ) -> Result<Installed, InstallError> {
        let invalid = |source| InstallError::Configuration { path: self.conf_dir.join(from), source };
        let text = edit(&self.read(from)?).map_err(invalid)?;
        // Through a link to the file it names: replacing the link would cut off whoever owns the target.
        let path = self.conf_dir.join(to);
        let file = fs::canonicalize(&path).unwrap_or(path);
        let changed = match text {
            Some(text) if fs::read_to_string(&file).is_ok_and(|there| there == text) => false,
            Some(text) => write_whole(&file, text.as_bytes(), 0o644).map(|()| true)?,
            None => false,
        };
        Ok(Installed::Chained { file, changed })
    }

    fn remove_derived(&self, except: Option<&str>) -> Result<(), InstallError> {
        for name in self.names()? {
            if conflist::is_derived(&name) && Some(name.as_str()) != except {
                remove_if_there(&self.conf_dir.join(name))?;
            }
        }
        Ok(())
    }

    fn install_binary(&self) -> Result<(), InstallError> {
        let target = self.bin_dir.join(TYPE);
        let length = |path: &Path| fs::metadata(path).map(|m| (m.len(), m.permissions().mode() & 0o111 != 0));
        let source = length(&self.binary).map_err(file("find", &self.binary))?;
        // Same length and modified no earlier: it is what this agent or its like put there.
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
        let current = length(&target).is_ok_and(|there| there == source)
            && matches!((modified(&self.binary), modified(&target)), (Ok(a), Ok(b)) if a <= b);
        if current {
            return Ok(());
        }
        let bytes = fs::read(&self.binary).map_err(file("read", &self.binary))?;
        fs::create_dir_all(&self.bin_dir).map_err(file("make", &self.bin_dir))?;
        write_whole(&target, &bytes, 0o755)
    }

    fn names(&self) -> Result<Vec<String>, InstallError> {
        let failed = file("list", &self.conf_dir);
        let entries = match fs::read_dir(&self.conf_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string()));
        let names = names.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let mut names: Vec<_> =
            names.into_iter().flatten().filter(|name| conflist::is_configuration(name)).collect();
        names.sort();
        Ok(names)
    }

    fn read(&self, name: &str) -> Result<String, InstallError> {
        let path = self.conf_dir.join(name);
        fs::read_to_string(&path).map_err(file("read", &path))
    }
}

/// The plugin's binary that came with this agent: beside its own.
///
/// # Errors
/// When this process's own binary is not known.
pub fn bundled_binary() -> io::Result<PathBuf> {
    std::env::current_exe().map(|agent| agent.with_file_name(TYPE))
}

/// Installs, and looks again each `period` until `shutdown`, for a CNI that rewrites its configuration (Calico and Cilium
/// do so when they restart). `chained` is open while every new pod is announced to the agent, and else says why not.
pub async fn keep(installer: Installer, period: Duration, chained: Gate, shutdown: CancellationToken) {
    let mut last = None;
    loop {
        let installer = installer.clone();
        let done = tokio::task::spawn_blocking(move || installer.once()).await;
        let Ok(done) = done else { return };
        let rewritten = matches!(done, Ok(Installed::Chained { changed: true, .. }));
        let now = match done {
            Ok(Installed::Chained { file, .. }) => Ok(file),
            Ok(Installed::NoConfiguration) => Err("the node has no CNI configuration yet".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        if rewritten || last.as_ref() != Some(&now) {
            match &now {
                Ok(file) => {
                    info!(file = %file.display(), "{TYPE} is chained");
                    chained.open();
                }
                Err(reason) => {
                    warn!("new pods are not announced to this agent: {reason}");
                    chained.close(reason);
                }
            }
            last = Some(now);
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(period) => {}
        }
    }
}

/// Writes beside the target under a name no runtime reads, then renames.
fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<(), InstallError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let mode = fs::metadata(path).map_or(mode, |there| there.permissions().mode() & 0o777 | mode & 0o111);
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        // A node may lose power right after; an empty configuration would keep every pod of it from starting.
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        InstallError::File { act: "write", path: path.to_owned(), source }
    })
}

fn remove_if_there(path: &Path) -> Result<(), InstallError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", path)(error)),
        _ => Ok(()),
    }
}

fn file(act: &'static str, path: &Path) -> impl Fn(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File { act, path: path.clone(), source }
}

/// How long a pod may start without us after another CNI wrote its configuration anew; those are found as running pods.
pub const PERIOD: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
