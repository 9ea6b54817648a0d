//! Whether addresses are made up for the hosts of a ServiceEntry.

use super::ServiceSpec;
use crate::index::event::Custom;

/// Whether the hosts of an entry get addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) enum MadeUp {
    /// It says its own, or wants none: what its status says is nobody's any more.
    #[default]
    Unwanted,
    Wanted,
    /// There is nothing that an address would lead to here. To another proxy there may be.
    NotOurs,
}

/// Label of a ServiceEntry: `false` if no addresses are to be made up for it.
const AUTOALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// As Istio decides; an address for a host that has nothing here but would otherwise be reached, by UDP or without the
/// mesh, would do harm.
pub(super) fn made_up(spec: &ServiceSpec, object: &Custom, has_ports: bool) -> MadeUp {
    let labels = object.metadata.labels.as_ref();
    let label = labels.and_then(|labels| labels.get(AUTOALLOCATE));
    match &*spec.resolution {
        _ if !spec.addresses.is_empty() => MadeUp::Unwanted,
        _ if label.is_some_and(|label| label.eq_ignore_ascii_case("false")) => MadeUp::Unwanted,
        "" | "NONE" => MadeUp::Unwanted,
        "STATIC" | "DNS" | "DNS_ROUND_ROBIN" if has_ports => MadeUp::Wanted,
        _ => MadeUp::NotOurs,
    }
}
