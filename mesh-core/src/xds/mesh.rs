//! Puts WDS resources into the store.

use prost::Message;

use super::{Handler, Rejected, Update};
use crate::convert::{self, Names};
use crate::proto::workload::address::Type;
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, security, workload};
use crate::service::ServiceName;
use crate::store::Writer;

/// The only owner of the store's writer.
#[derive(Debug)]
pub struct Mesh {
    writer: Writer,
    names: Names,
}

impl Mesh {
    /// Takes the writer for good.
    pub fn new(writer: Writer) -> Self {
        Self { writer, names: Names::default() }
    }

    fn put_address(&mut self, update: &Update) -> Result<(), String> {
        let message: workload::Address = decode(update)?;
        match message.r#type.ok_or("it is neither a workload nor a service")? {
            Type::Workload(message) => {
                let workload =
                    convert::workload::convert(&message, &mut self.names).map_err(|e| e.to_string())?;
                same_name(&update.name, workload.uid.as_str())?;
                self.writer.put_workload(workload);
            }
            Type::Service(message) => {
                let service =
                    convert::service::convert(&message, &mut self.names).map_err(|e| e.to_string())?;
                same_name(&update.name, &service.key.to_string())?;
                self.writer.put_service(service);
            }
        }
        Ok(())
    }

    fn put_authorization(&mut self, update: &Update) -> Result<(), String> {
        let message: security::Authorization = decode(update)?;
        let policy = convert::authz::convert(&message, &mut self.names).map_err(|e| e.to_string())?;
        same_name(&update.name, &policy.key())?;
        self.writer.put_authorization(policy);
        Ok(())
    }

    /// A name says not what it names: a workload's uid is tried first, then a service's key.
    fn remove_address(&mut self, name: &str) {
        if self.writer.remove_workload(name) {
            return;
        }
        if let Some((namespace, hostname)) = name.split_once('/') {
            let key = ServiceName { namespace: namespace.into(), hostname: hostname.into() };
            self.writer.remove_service(&key);
        }
    }
}

impl Handler for Mesh {
    fn apply(&mut self, type_url: &str, updates: Vec<Update>, removed: &[String]) -> Vec<Rejected> {
        for name in removed {
            match type_url {
                ADDRESS_TYPE => self.remove_address(name),
                _ => drop(self.writer.remove_authorization(name)),
            }
        }
        let mut rejected = Vec::new();
        for update in updates {
            let result = match type_url {
                ADDRESS_TYPE => self.put_address(&update),
                AUTHORIZATION_TYPE => self.put_authorization(&update),
                other => Err(format!("resources of type {other} are not understood")),
            };
            if let Err(reason) = result {
                rejected.push(Rejected { name: update.name, reason });
            }
        }
        self.writer.commit();
        self.names.prune();
        rejected
    }
}

fn decode<M: Message + Default>(update: &Update) -> Result<M, String> {
    let body = update.body.as_ref().ok_or("it has no body")?;
    M::decode(body.value.as_slice()).map_err(|error| format!("its body cannot be decoded: {error}"))
}

/// A resource could never be removed if it was filed under another name than it was sent with.
fn same_name(sent: &str, own: &str) -> Result<(), String> {
    if sent == own { Ok(()) } else { Err(format!("its body names another resource, {own}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Network, NetworkAddress};
    use crate::store;

    fn update(name: &str, message: &workload::Address) -> Update {
        let body = prost_types::Any { type_url: ADDRESS_TYPE.into(), value: message.encode_to_vec() };
        Update { name: name.into(), body: Some(body) }
    }

    fn pod(uid: &str, last: u8) -> workload::Address {
        workload::Address {
            r#type: Some(Type::Workload(workload::Workload {
                uid: uid.into(),
                namespace: "shop".into(),
                addresses: vec![vec![10, 0, 0, last]],
                ..Default::default()
            })),
        }
    }

    fn service(hostname: &str) -> workload::Address {
        workload::Address {
            r#type: Some(Type::Service(workload::Service {
                namespace: "shop".into(),
                hostname: hostname.into(),
                ..Default::default()
            })),
        }
    }

    #[test]
    fn bad_resources_are_named_and_the_others_applied() {
        let (writer, reader) = store::new();
        let mut mesh = Mesh::new(writer);
        let garbage = prost_types::Any { type_url: ADDRESS_TYPE.into(), value: vec![0xff; 4] };
        let updates = vec![
            update("c//Pod/shop/a", &pod("c//Pod/shop/a", 1)),
            update("c//Pod/shop/b", &pod("c//Pod/shop/other", 2)),
            Update { name: "garbage".into(), body: Some(garbage) },
            Update { name: "empty".into(), body: None },
            update("neither", &workload::Address::default()),
            update("shop/web", &service("web")),
        ];
        let rejected = mesh.apply(ADDRESS_TYPE, updates, &[]);
        let names: Vec<&str> = rejected.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["c//Pod/shop/b", "garbage", "empty", "neither"]);
        let size = reader.size();
        assert_eq!((size.workloads, size.services), (1, 1));
        let address = NetworkAddress::new(Network::default(), "10.0.0.1".parse().unwrap());
        assert!(reader.workload_at(&address).is_some());
    }

    #[test]
    fn removal_by_uid_or_service_key() {
        let (writer, reader) = store::new();
        let mut mesh = Mesh::new(writer);
        let updates =
            vec![update("c//Pod/shop/a", &pod("c//Pod/shop/a", 1)), update("shop/web", &service("web"))];
        assert!(mesh.apply(ADDRESS_TYPE, updates, &[]).is_empty());
        mesh.apply(ADDRESS_TYPE, vec![], &["c//Pod/shop/a".into(), "shop/web".into(), "unknown".into()]);
        assert_eq!(reader.size(), store::Size::default());
    }

    #[test]
    fn policies_are_kept_by_name() {
        let (writer, reader) = store::new();
        let mut mesh = Mesh::new(writer);
        let policy =
            security::Authorization { name: "p".into(), namespace: "shop".into(), ..Default::default() };
        let body = prost_types::Any { type_url: AUTHORIZATION_TYPE.into(), value: policy.encode_to_vec() };
        let updates = vec![Update { name: "shop/p".into(), body: Some(body) }];
        assert!(mesh.apply(AUTHORIZATION_TYPE, updates, &[]).is_empty());
        assert!(reader.authorizations().contains_key("shop/p"));
        mesh.apply(AUTHORIZATION_TYPE, vec![], &["shop/p".into()]);
        assert_eq!(reader.size().authorizations, 0);
    }
}
