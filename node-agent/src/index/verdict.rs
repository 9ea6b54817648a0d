//! What became of a policy, for its users to read: the condition `ZtunnelAccepted` of its status, as Istio has it; and of
//! a ServiceEntry the addresses that were made up for it.

use serde_json::{Value, json};

use super::entry::EXHAUSTED;
use super::event::{Custom, Kind, ObjectName};
use super::{Changes, Index, Problem};

/// The condition's type.
pub const CONDITION: &str = "ZtunnelAccepted";
/// What is said where nothing is wrong. Whether it has a say is another question: it may be on trial, or another counts.
const ACCEPTED: &str = "accepted by ztunnel, for layer 4";
/// So many faults are told; more are counted. Whoever may write a policy has a say in their number and length.
const MOST: usize = 10;
/// So many characters of each.
const LONGEST: usize = 300;

/// A policy as it was read, and what its status says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reading {
    faults: Vec<String>,
    /// Why nothing of it is in force, which another object's change can change.
    left_out: Option<&'static str>,
    /// There is no address for something of it.
    exhausted: bool,
    /// What `status.addresses` is to say; none: what it says.
    addresses: Option<Vec<Value>>,
    api_version: String,
    generation: i64,
    resource_version: String,
    conditions: Vec<Value>,
}

/// A policy whose status does not say what became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
    /// `group/version` that it was read in.
    pub api_version: String,
    /// The version of the object that was read: a status is written for no other.
    pub resource_version: String,
    /// All conditions as they should be; where the status of ours is new it has no time yet.
    pub conditions: Vec<Value>,
    /// All of `status.addresses` as it should be; none: it stays as it is.
    pub addresses: Option<Vec<Value>>,
}

impl Reading {
    fn new(object: &Custom, faults: Vec<String>) -> Self {
        Self {
            faults: bounded(faults),
            left_out: None,
            exhausted: false,
            addresses: None,
            api_version: object.api_version.clone(),
            generation: object.metadata.generation.unwrap_or_default(),
            resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
            conditions: object.status["conditions"].as_array().cloned().unwrap_or_default(),
        }
    }

    fn is_said(&self) -> bool {
        self.addresses.is_none() && self.wanted().is_none()
    }

    /// All conditions. None: the status says so already.
    fn wanted(&self) -> Option<Vec<Value>> {
        let ours = |condition: &&Value| condition["type"] == CONDITION;
        let mut wanted = self.condition();
        let told = self.conditions.iter().find(ours);
        // Agents of two versions may put it in other words: whose are there first stay.
        let says = |told: &&Value, key: &str| told[key] == wanted[key];
        if told
            .is_some_and(|told| ["status", "reason", "observedGeneration"].iter().all(|key| says(&told, key)))
        {
            return None;
        }
        // The time is when the status changed, not the words.
        if let Some(told) = told.filter(|told| says(told, "status")) {
            wanted["lastTransitionTime"] = told["lastTransitionTime"].clone();
        }
        let others = self.conditions.iter().filter(|condition| !ours(condition)).cloned();
        Some(others.chain([wanted]).collect())
    }

    fn condition(&self) -> Value {
        let exhausted = self.exhausted.then_some(EXHAUSTED);
        let told = self.left_out.into_iter().chain(exhausted);
        let faults: Vec<&str> = told.chain(self.faults.iter().map(String::as_str)).collect();
        let (status, reason, message) = match faults.is_empty() {
            true => ("True", "Accepted", ACCEPTED.to_owned()),
            false if self.left_out.is_some() => ("False", "OverBudget", faults.join("; ")),
            false if self.exhausted => ("False", "AddressesExhausted", faults.join("; ")),
            false => ("False", "UnsupportedValue", faults.join("; ")),
        };
        json!({
            "type": CONDITION, "status": status, "reason": reason, "message": message,
            "observedGeneration": self.generation,
        })
    }
}

fn bounded(faults: Vec<String>) -> Vec<String> {
    let more = faults.len().saturating_sub(MOST);
    let short = |fault: String| match fault.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &fault[..end]),
        None => fault,
    };
    let told = faults.into_iter().take(MOST).map(short);
    told.chain((more > 0).then(|| format!("and {more} more"))).collect()
}

impl Index {
    /// Notes what was read of a policy, and reports what is wrong with it, unless that is known.
    pub(super) fn note(
        &mut self,
        kind: Kind,
        name: &ObjectName,
        object: &Custom,
        faults: Vec<String>,
        changes: &mut Changes,
    ) {
        let mut reading = Reading::new(object, faults);
        if let Some(known) = self.readings.get(&(kind, name.clone())) {
            (reading.left_out, reading.exhausted) = (known.left_out, known.exhausted);
        }
        let known = self.readings.insert((kind, name.clone()), reading.clone());
        changes.verdicts |= known.as_ref() != Some(&reading) && !reading.is_said();
        if known.is_none_or(|known| known.faults != reading.faults) {
            let problem = |reason| Problem { kind, name: name.clone(), skipped: false, reason };
            changes.problems.extend(reading.faults.into_iter().map(problem));
        }
    }

    /// Notes why nothing of an object is in force, or that it is; whether that is news.
    pub(super) fn amend(
        &mut self,
        kind: Kind,
        name: &ObjectName,
        left_out: Option<&'static str>,
        changes: &mut Changes,
    ) -> bool {
        let reading = self.readings.get_mut(&(kind, name.clone()));
        let Some(reading) = reading.filter(|reading| reading.left_out != left_out) else { return false };
        reading.left_out = left_out;
        changes.verdicts |= !reading.is_said();
        true
    }

    /// Notes what the status of a ServiceEntry is to say of addresses, and whether there are too few.
    pub(super) fn amend_addresses(
        &mut self,
        name: &ObjectName,
        addresses: Option<Vec<Value>>,
        exhausted: bool,
        changes: &mut Changes,
    ) {
        let Some(reading) = self.readings.get_mut(&(Kind::ServiceEntry, name.clone())) else { return };
        let is_news = reading.addresses != addresses || reading.exhausted != exhausted;
        (reading.addresses, reading.exhausted) = (addresses, exhausted);
        changes.verdicts |= is_news && !reading.is_said();
    }

    /// The policies whose status is to be written. Takes time in proportion to the number of policies.
    pub fn unsaid(&self) -> Vec<(Kind, ObjectName)> {
        let unsaid = self.readings.iter().filter(|(_, reading)| !reading.is_said());
        unsaid.map(|(policy, _)| policy.clone()).collect()
    }

    /// What is to be written into the status of a policy; none if it is there.
    pub fn verdict(&self, policy: &(Kind, ObjectName)) -> Option<Verdict> {
        let reading = self.readings.get(policy).filter(|reading| !reading.is_said())?;
        let (kind, name) = policy.clone();
        Some(Verdict {
            kind,
            name,
            api_version: reading.api_version.clone(),
            resource_version: reading.resource_version.clone(),
            conditions: reading.wanted().unwrap_or_else(|| reading.conditions.clone()),
            addresses: reading.addresses.clone(),
        })
    }

    /// How many nodes there are, each with an agent that writes verdicts.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }
}
