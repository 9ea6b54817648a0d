//! The volumes of a pod, as directories of its node: host paths, empty directories, and files made of ConfigMaps,
//! Secrets, tokens and the pod's own fields.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, HostPathVolumeSource, KeyToPath, Pod, Secret,
    ServiceAccountTokenProjection, Volume, VolumeProjection,
};

use super::env::{self, Place};
use crate::cluster::{Cluster, Kind};
use crate::node::Node;

/// Lifetime of a token that asks for none, in seconds.
const TOKEN_SECONDS: i64 = 3600;

/// Make every volume of the pod; where each is on the node, by volume name.
pub(super) fn prepare(
    node: &Node,
    cluster: &Cluster,
    pod: &Pod,
    place: &Place,
) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .map(|volume| {
            let path =
                one(node, cluster, pod, place, volume).with_context(|| format!("volume {}", volume.name))?;
            Ok((volume.name.clone(), path))
        })
        .collect()
}

/// Rewrite the files that may have changed since. The error names the first volume that has lost its source; its
/// files stay as they are.
pub(super) fn refresh(node: &Node, cluster: &Cluster, pod: &Pod, place: &Place) -> anyhow::Result<()> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    for volume in volumes.filter(|volume| volume.config_map.is_some() || volume.secret.is_some()) {
        one(node, cluster, pod, place, volume).with_context(|| format!("volume {}", volume.name))?;
    }
    Ok(())
}

fn one(node: &Node, cluster: &Cluster, pod: &Pod, place: &Place, volume: &Volume) -> anyhow::Result<PathBuf> {
    if let Some(host) = &volume.host_path {
        return host_path(node, host);
    }
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let in_node = PathBuf::from(format!("/var/lib/kubelet/pods/{uid}/volumes/{}", volume.name));
    let directory = node.path(&in_node.to_string_lossy());
    fs::create_dir_all(&directory)?;
    if volume.empty_dir.is_some() {
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
        return Ok(in_node);
    }
    let source = Source { cluster, pod, place };
    write(&directory, source.files(volume)?)?;
    Ok(in_node)
}

fn host_path(node: &Node, host: &HostPathVolumeSource) -> anyhow::Result<PathBuf> {
    let kind = host.type_.as_deref().unwrap_or_default();
    if kind == "DirectoryOrCreate" {
        let path = node.path(&host.path);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    }
    Ok(PathBuf::from(&host.path))
}

type Files = BTreeMap<String, Vec<u8>>;

struct Source<'a> {
    cluster: &'a Cluster,
    pod: &'a Pod,
    place: &'a Place,
}

impl Source<'_> {
    fn files(&self, volume: &Volume) -> anyhow::Result<Files> {
        if let Some(map) = &volume.config_map {
            return self.config_map(&map.name, map.items.as_deref(), map.optional);
        }
        if let Some(secret) = &volume.secret {
            let name = secret.secret_name.as_deref().unwrap_or_default();
            return self.secret(name, secret.items.as_deref(), secret.optional);
        }
        if let Some(downward) = &volume.downward_api {
            return Ok(self.downward(downward.items.as_deref().unwrap_or_default()));
        }
        let projected = volume.projected.as_ref().context("the lab knows no volume of this kind")?;
        let mut files = Files::new();
        for projection in projected.sources.iter().flatten() {
            files.extend(self.projection(projection)?);
        }
        Ok(files)
    }

    fn projection(&self, projection: &VolumeProjection) -> anyhow::Result<Files> {
        if let Some(token) = &projection.service_account_token {
            return Ok(Files::from([(token.path.clone(), self.token(token)?.into_bytes())]));
        }
        if let Some(map) = &projection.config_map {
            return self.config_map(&map.name, map.items.as_deref(), map.optional);
        }
        if let Some(secret) = &projection.secret {
            return self.secret(&secret.name, secret.items.as_deref(), secret.optional);
        }
        if let Some(downward) = &projection.downward_api {
            return Ok(self.downward(downward.items.as_deref().unwrap_or_default()));
        }
        anyhow::bail!("the lab knows no projection of this kind")
    }

    fn token(&self, token: &ServiceAccountTokenProjection) -> anyhow::Result<String> {
        let account =
            self.pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
        let seconds = token.expiration_seconds.unwrap_or(TOKEN_SECONDS).max(600);
        let name = self.pod.metadata.name.as_deref().unwrap_or_default();
        // A day: the lab does not rotate tokens.
        let lifetime = Duration::from_secs(seconds.unsigned_abs().max(86_400));
        self.cluster.token(self.namespace(), account, name, token.audience.as_deref(), lifetime)
    }

    fn config_map(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> anyhow::Result<Files> {
        let map: anyhow::Result<ConfigMap> = self.cluster.get(Kind::ConfigMap, self.namespace(), name);
        let Some(map) = found(map, optional)? else { return Ok(Files::new()) };
        let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
        let bytes = map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
        chosen(text.chain(bytes).collect(), items)
    }

    fn secret(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> anyhow::Result<Files> {
        let secret: anyhow::Result<Secret> = self.cluster.get(Kind::Secret, self.namespace(), name);
        let Some(secret) = found(secret, optional)? else { return Ok(Files::new()) };
        chosen(secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect(), items)
    }

    fn downward(&self, items: &[DownwardAPIVolumeFile]) -> Files {
        items
            .iter()
            .filter_map(|item| {
                let value = env::field(self.pod, &item.field_ref.as_ref()?.field_path, self.place)?;
                Some((item.path.clone(), value.into_bytes()))
            })
            .collect()
    }

    fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or_default()
    }
}

fn found<T>(object: anyhow::Result<T>, optional: Option<bool>) -> anyhow::Result<Option<T>> {
    match object {
        Ok(object) => Ok(Some(object)),
        Err(_) if optional == Some(true) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Only the keys that were asked for, at the paths that were asked for.
fn chosen(files: Files, items: Option<&[KeyToPath]>) -> anyhow::Result<Files> {
    let Some(items) = items else { return Ok(files) };
    items
        .iter()
        .map(|item| {
            let content = files.get(&item.key).with_context(|| format!("no key {}", item.key))?;
            Ok((item.path.clone(), content.clone()))
        })
        .collect()
}

/// Whole files appear at once, so that a reader never sees half of one.
fn write(directory: &Path, files: Files) -> anyhow::Result<()> {
    for (name, content) in files {
        let path = directory.join(&name);
        if fs::read(&path).is_ok_and(|now| now == content) {
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let new = directory.join("..new");
        fs::write(&new, content)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644))?;
        fs::rename(&new, &path)?;
    }
    Ok(())
}
