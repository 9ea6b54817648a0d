//! The type in k8s-openapi of each built-in kind: one table for all that looks at types.

use k8s_openapi::api::{
    apps, authentication, authorization, batch, coordination, core, discovery, events, networking, rbac,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions;
use k8s_openapi::schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};

use super::kinds::Kind;

/// Something to do with a type.
pub(super) trait Visit {
    type Output;
    fn visit<T: DeserializeOwned + Serialize + JsonSchema>(self) -> Self::Output;
}

/// Visits the type of `kind`; none for a custom one.
pub(super) fn of<V: Visit>(kind: &Kind, visit: V) -> Option<V::Output> {
    if kind.custom.is_some() {
        return None;
    }
    Some(match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Namespace") => visit.visit::<core::v1::Namespace>(),
        ("", "Node") => visit.visit::<core::v1::Node>(),
        ("", "Pod") => visit.visit::<core::v1::Pod>(),
        ("", "Service") => visit.visit::<core::v1::Service>(),
        ("", "Endpoints") => visit.visit::<core::v1::Endpoints>(),
        ("", "ServiceAccount") => visit.visit::<core::v1::ServiceAccount>(),
        ("", "Secret") => visit.visit::<core::v1::Secret>(),
        ("", "ConfigMap") => visit.visit::<core::v1::ConfigMap>(),
        ("", "Event") => visit.visit::<core::v1::Event>(),
        ("events.k8s.io", "Event") => visit.visit::<events::v1::Event>(),
        (_, "EndpointSlice") => visit.visit::<discovery::v1::EndpointSlice>(),
        (_, "NetworkPolicy") => visit.visit::<networking::v1::NetworkPolicy>(),
        (_, "Deployment") => visit.visit::<apps::v1::Deployment>(),
        (_, "ReplicaSet") => visit.visit::<apps::v1::ReplicaSet>(),
        (_, "DaemonSet") => visit.visit::<apps::v1::DaemonSet>(),
        (_, "Job") => visit.visit::<batch::v1::Job>(),
        (_, "CronJob") => visit.visit::<batch::v1::CronJob>(),
        (_, "Role") => visit.visit::<rbac::v1::Role>(),
        (_, "RoleBinding") => visit.visit::<rbac::v1::RoleBinding>(),
        (_, "ClusterRole") => visit.visit::<rbac::v1::ClusterRole>(),
        (_, "ClusterRoleBinding") => visit.visit::<rbac::v1::ClusterRoleBinding>(),
        (_, "Lease") => visit.visit::<coordination::v1::Lease>(),
        (_, "CustomResourceDefinition") => visit.visit::<apiextensions::v1::CustomResourceDefinition>(),
        (_, "TokenReview") => visit.visit::<authentication::v1::TokenReview>(),
        (_, "SelfSubjectReview") => visit.visit::<authentication::v1::SelfSubjectReview>(),
        (_, "SubjectAccessReview") => visit.visit::<authorization::v1::SubjectAccessReview>(),
        (_, "SelfSubjectRulesReview") => visit.visit::<authorization::v1::SelfSubjectRulesReview>(),
        (_, "SelfSubjectAccessReview") => visit.visit::<authorization::v1::SelfSubjectAccessReview>(),
        _ => return None,
    })
}
