//! The `baggage` header: a workload's description of itself, for its peer's metrics and logs only.

use http::{HeaderMap, HeaderName};

use super::{MAX_VALUE, insert};
use crate::workload::WorkloadType;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// What a workload says of itself; None where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<String>,
    /// `k8s.namespace.name`.
    pub namespace: Option<String>,
    /// Kind and name of the owner: `k8s.deployment.name` and the like.
    pub workload: Option<(WorkloadType, String)>,
    /// `service.name`, the canonical name.
    pub service: Option<String>,
    /// `service.version`, the canonical revision.
    pub revision: Option<String>,
    /// `cloud.region`.
    pub region: Option<String>,
    /// `cloud.availability_zone`.
    pub zone: Option<String>,
}

const OWNERS: [(&str, WorkloadType); 4] = [
    ("k8s.deployment.name", WorkloadType::Deployment),
    ("k8s.cronjob.name", WorkloadType::CronJob),
    ("k8s.pod.name", WorkloadType::Pod),
    ("k8s.job.name", WorkloadType::Job),
];

impl Baggage {
    /// Reads all `baggage` headers as one list; what is empty, too long or unknown is absent.
    pub fn parse(headers: &HeaderMap) -> Self {
        let mut baggage = Self::default();
        let lines = headers.get_all(BAGGAGE).iter().filter_map(|line| line.to_str().ok());
        for member in lines.flat_map(|line| line.split(',')) {
            // Properties after a semicolon (W3C baggage 3.3.1) are not used.
            let member = member.split(';').next().unwrap_or_default();
            if let Some((key, value)) = member.split_once('=') {
                baggage.set(key.trim(), value.trim());
            }
        }
        baggage
    }

    fn set(&mut self, key: &str, value: &str) {
        if value.is_empty() || value.len() > MAX_VALUE {
            return;
        }
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service,
            "service.version" => &mut self.revision,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            other => {
                if let Some((_, kind)) = OWNERS.iter().find(|(key, _)| *key == other) {
                    self.workload = Some((*kind, value.to_owned()));
                }
                return;
            }
        };
        *field = Some(value.to_owned());
    }

    /// Adds the header, unless there is nothing to say.
    pub fn write(&self, headers: &mut HeaderMap) {
        let owner = self.workload.as_ref().and_then(|(kind, name)| {
            let (key, _) = OWNERS.iter().find(|(_, known)| known == kind)?;
            Some((*key, name))
        });
        let members = [
            self.cluster.as_ref().map(|value| ("k8s.cluster.name", value)),
            self.namespace.as_ref().map(|value| ("k8s.namespace.name", value)),
            owner,
            self.service.as_ref().map(|value| ("service.name", value)),
            self.revision.as_ref().map(|value| ("service.version", value)),
            self.region.as_ref().map(|value| ("cloud.region", value)),
            self.zone.as_ref().map(|value| ("cloud.availability_zone", value)),
        ];
        // A value with a separator in it would be read as something else.
        let clean = |value: &str| !value.is_empty() && !value.contains([',', ';', '=']);
        let list: Vec<String> = members
            .into_iter()
            .flatten()
            .filter(|(_, value)| clean(value))
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let list = Some(list.join(",")).filter(|list| !list.is_empty());
        insert(headers, BAGGAGE, list.as_ref());
    }
}
