//! Puts WDS resources into the store, and what was wrong with the others.

use prost::Message;

use super::{Effect, Handler, Rejected, Update};
use crate::authz::Rules;
use crate::convert::{self, Names};
use crate::proto::workload::address::Type;
use crate::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, security, workload};
use crate::service::ServiceName;
use crate::store::{Changes, Claims, Writer};

/// The only owner of the store's writer.
pub struct Mesh<Told> {
    writer: Writer,
    names: Names,
    root_namespace: String,
    told: Told,
}

impl<Told: FnMut(&Changes)> Mesh<Told> {
    /// Takes the writer for good. Policies of the root namespace may be about all of the mesh; `told` is called after
    /// each response, when readers see it.
    pub fn new(writer: Writer, root_namespace: &str, told: Told) -> Self {
        Self { writer, names: Names::default(), root_namespace: root_namespace.to_owned(), told }
    }

    fn address(&mut self, update: Update) -> Result<(), Rejected> {
        let message = decode::<workload::Address>(&update);
        let put = match &message {
            Ok(message) => self.put_address(&update.name, message),
            Err(reason) => Err(reason.clone()),
        };
        match put {
            Ok(()) => {
                self.writer.absolve(&update.name);
                Ok(())
            }
            Err(reason) => Err(self.refuse_address(update.name, message.ok(), reason)),
        }
    }

    fn put_address(&mut self, name: &str, message: &workload::Address) -> Result<(), String> {
        match message.r#type.as_ref().ok_or("it is neither a workload nor a service")? {
            Type::Workload(message) => {
                let workload =
                    convert::workload::convert(message, &mut self.names).map_err(|e| e.to_string())?;
                same_name(name, workload.uid.as_str())?;
                self.writer.put_workload(workload);
            }
            Type::Service(message) => {
                let service =
                    convert::service::convert(message, &mut self.names).map_err(|e| e.to_string())?;
                same_name(name, &service.key.to_string())?;
                self.writer.put_service(service);
            }
        }
        Ok(())
    }

    fn refuse_address(
        &mut self,
        name: String,
        message: Option<workload::Address>,
        reason: String,
    ) -> Rejected {
        let claims = match message.and_then(|message| message.r#type) {
            Some(Type::Workload(message)) => convert::workload::claims(&message, &mut self.names),
            Some(Type::Service(message)) => convert::service::claims(&message, &mut self.names),
            None => Claims { unreadable: true, ..Default::default() },
        };
        let (count, unreadable) = (claims.addresses.len(), claims.unreadable);
        let effect = match self.writer.refuse(&name, &reason, claims) {
            true => Effect::LastGood,
            false if unreadable => Effect::Unreadable,
            false if count > 0 => Effect::AddressesRefused(count),
            false => Effect::Nothing,
        };
        Rejected { name, reason, effect }
    }

    fn authorization(&mut self, update: Update) -> Result<(), Rejected> {
        let message = decode::<security::Authorization>(&update);
        let policy = match &message {
            Ok(message) => convert::authz::convert(message, &mut self.names)
                .map_err(|error| error.to_string())
                .and_then(|policy| same_name(&update.name, &policy.key).map(|()| policy)),
            Err(reason) => Err(reason.clone()),
        };
        match policy {
            Ok(policy) => {
                self.writer.put_authorization(policy);
                Ok(())
            }
            Err(reason) => Err(self.refuse_authorization(update.name, message.ok().as_ref(), reason)),
        }
    }

    fn refuse_authorization(
        &mut self,
        name: String,
        message: Option<&security::Authorization>,
        reason: String,
    ) -> Rejected {
        if self.writer.authorization(&name).is_some_and(|known| !matches!(known.rules, Rules::Refused(_))) {
            return Rejected { name, reason, effect: Effect::LastGood };
        }
        let refused = convert::authz::refused(&name, message, &reason, &self.root_namespace, &mut self.names);
        let effect = if refused.dry_run { Effect::Nothing } else { Effect::Denied };
        self.writer.put_authorization(refused);
        Rejected { name, reason, effect }
    }

    /// A name says not what it names: a workload's uid is tried first, then a service's key.
    fn remove_address(&mut self, name: &str) {
        self.writer.absolve(name);
        if self.writer.remove_workload(name) {
            return;
        }
        if let Some((namespace, hostname)) = name.split_once('/') {
            let key = ServiceName { namespace: namespace.into(), hostname: hostname.into() };
            self.writer.remove_service(&key);
        }
    }
}

impl<Told: FnMut(&Changes)> Handler for Mesh<Told> {
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
                ADDRESS_TYPE => self.address(update),
                AUTHORIZATION_TYPE => self.authorization(update),
                other => Err(Rejected {
                    name: update.name,
                    reason: format!("resources of type {other} are not understood"),
                    effect: Effect::Nothing,
                }),
            };
            rejected.extend(result.err());
        }
        let changes = self.writer.commit();
        (self.told)(&changes);
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
mod tests;
