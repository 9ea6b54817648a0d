//! Which objects of a kind are in force: of each namespace the oldest ones, as far as what they may cost together goes.
//!
//! **Invariant:** that depends on the objects alone, never on the order in which they came, so that all agents leave out
//! the same. A change takes time in proportion to what it brings into force and takes out of it, however many there are.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use super::super::by_namespace::ByNamespace;
use super::super::event::ObjectName;
use super::budget::MOST_OF_NAMESPACE;

/// What an object asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Seconds since 1970: the older goes before, of equals the first by name.
    pub(super) created: i64,
    /// Bytes.
    pub(super) cost: usize,
}

/// What has a claim.
pub(super) trait Claimant: PartialEq {
    fn claim(&self) -> Claim;
}

/// All objects of one kind.
#[derive(Debug)]
pub(super) struct Claimed<T> {
    read: ByNamespace<Arc<T>>,
    budget: Budget,
    in_force: ByNamespace<Arc<T>>,
}

/// What was in force of one object, and what is now.
pub(super) struct Turn<T> {
    pub(super) name: ObjectName,
    pub(super) old: Option<Arc<T>>,
    pub(super) new: Option<Arc<T>>,
    /// It is there, and not in force.
    pub(super) left_out: bool,
}

impl<T: Claimant> Claimed<T> {
    /// One object is this now, or gone: what becomes of it, and of others that have less room or more.
    pub(super) fn put(&mut self, name: &ObjectName, new: Option<T>) -> Vec<Turn<T>> {
        let new = new.map(Arc::new);
        let old = match &new {
            Some(new) => self.read.put(name, Arc::clone(new)),
            None => self.read.remove(name),
        };
        let claim = |one: &Option<Arc<T>>| one.as_deref().map(Claimant::claim);
        let others = self.budget.set(name, claim(&old), claim(&new));
        let others = others.into_iter().filter(|other| *other != name.name);
        let others = others.map(|other| ObjectName { namespace: name.namespace.clone(), name: other });
        let all: Vec<ObjectName> = std::iter::once(name.clone()).chain(others).collect();
        all.into_iter().map(|name| self.turn(name)).collect()
    }

    fn turn(&mut self, name: ObjectName) -> Turn<T> {
        let read = self.read.get(&name).cloned();
        let left_out = read.as_ref().is_some_and(|one| self.budget.leaves_out(&name, one.claim()));
        let new = read.filter(|_| !left_out);
        let old = match &new {
            Some(new) => self.in_force.put(&name, Arc::clone(new)),
            None => self.in_force.remove(&name),
        };
        Turn { name, old, new, left_out }
    }

    /// All names, in force or not.
    pub(super) fn names(&self) -> Vec<ObjectName> {
        self.read.names()
    }

    /// One that is in force.
    pub(super) fn get(&self, name: &ObjectName) -> Option<&T> {
        self.in_force.get(name).map(|one| &**one)
    }

    /// Those of one namespace that are in force, by name.
    pub(super) fn of(&self, namespace: &str) -> impl Iterator<Item = (&Arc<str>, &T)> {
        self.in_force.of(namespace).map(|(name, one)| (name, &**one))
    }
}

impl<T> Default for Claimed<T> {
    fn default() -> Self {
        Self { read: ByNamespace::default(), budget: Budget::default(), in_force: ByNamespace::default() }
    }
}

/// Each namespace's.
#[derive(Debug, Default)]
struct Budget(HashMap<Arc<str>, Account>);

type Age = (i64, Arc<str>);

#[derive(Debug, Default)]
struct Account {
    costs: BTreeMap<Age, usize>,
    /// The sum of those in force.
    used: usize,
    /// The oldest that is left out, and with it all that are younger.
    first_out: Option<Age>,
}

impl Budget {
    fn leaves_out(&self, name: &ObjectName, claim: Claim) -> bool {
        let account = self.0.get(&name.namespace);
        account.is_some_and(|account| account.is_out(&(claim.created, name.name.clone())))
    }

    /// One claim in the place of another; returns those of which it is no longer so, or only now, that they are left out.
    fn set(&mut self, name: &ObjectName, old: Option<Claim>, new: Option<Claim>) -> Vec<Arc<str>> {
        if old == new {
            return Vec::new();
        }
        let account = self.0.entry(name.namespace.clone()).or_default();
        let age = |claim: Claim| (claim.created, name.name.clone());
        if let Some(old) = old {
            account.remove(&age(old));
        }
        if let Some(new) = new {
            account.insert(age(new), new.cost);
        }
        let turned = account.settle();
        if account.costs.is_empty() {
            self.0.remove(&name.namespace);
        }
        turned
    }
}

impl Account {
    fn is_out(&self, age: &Age) -> bool {
        self.first_out.as_ref().is_some_and(|first| age >= first)
    }

    fn remove(&mut self, age: &Age) {
        let is_out = self.is_out(age);
        let Some(cost) = self.costs.remove(age) else { return };
        if !is_out {
            self.used -= cost;
        } else if self.first_out.as_ref() == Some(age) {
            self.first_out = self.next_after(age);
        }
    }

    fn insert(&mut self, age: Age, cost: usize) {
        if !self.is_out(&age) {
            self.used += cost;
        }
        self.costs.insert(age, cost);
    }

    /// Moves the border between those in force and the others to where it belongs.
    fn settle(&mut self) -> Vec<Arc<str>> {
        let mut turned = Vec::new();
        while self.used > MOST_OF_NAMESPACE {
            let end = self.first_out.clone().map_or(Bound::Unbounded, Bound::Excluded);
            let youngest = self.costs.range((Bound::Unbounded, end)).next_back();
            let Some((age, cost)) = youngest.map(|(age, cost)| (age.clone(), *cost)) else { break };
            self.used -= cost;
            turned.push(age.1.clone());
            self.first_out = Some(age);
        }
        while let Some(first) = self.first_out.clone() {
            let cost = self.costs.get(&first).copied().unwrap_or_default();
            if self.used + cost > MOST_OF_NAMESPACE {
                break;
            }
            self.used += cost;
            self.first_out = self.next_after(&first);
            turned.push(first.1);
        }
        turned
    }

    fn next_after(&self, age: &Age) -> Option<Age> {
        self.costs.range((Bound::Excluded(age.clone()), Bound::Unbounded)).next().map(|(age, _)| age.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const MIB: usize = 1 << 20;

    fn of_mib(created: i64, mib: usize) -> Option<Claim> {
        Some(Claim { created, cost: mib * MIB })
    }

    #[test]
    fn the_oldest_are_in_force() {
        let mut budget = Budget::default();
        for (name, old, new, expect) in [
            ("b", None, of_mib(2, 10), &[][..]),
            ("d", None, of_mib(4, 6), &[]),
            ("e", None, of_mib(5, 1), &["e"]),
            // Older than d, which has no room then.
            ("c", None, of_mib(3, 2), &["d"]),
            // One of no cost has no way past those that wait before it.
            ("f", None, of_mib(6, 0), &[]),
            ("b", of_mib(2, 10), of_mib(2, 9), &[]),
            ("b", of_mib(2, 9), of_mib(2, 8), &["d"]),
            ("b", of_mib(2, 8), of_mib(2, 7), &["e", "f"]),
            ("a", None, of_mib(1, 16), &["f", "e", "d", "c", "b"]),
            ("a", of_mib(1, 16), of_mib(7, 16), &["b", "c", "d", "e", "f"]),
            ("a", of_mib(7, 16), None, &[]),
            // Of the same age the first by name.
            ("a", None, of_mib(6, 1), &["f", "a"]),
            ("c", of_mib(3, 2), None, &["a", "f"]),
        ] {
            let turned = budget.set(&ObjectName::new("shop", name), old, new);
            assert_eq!(turned.iter().map(|name| &**name).collect::<Vec<_>>(), expect, "{name} {new:?}");
        }
        for (name, claim) in [
            ("a", of_mib(6, 1)),
            ("b", of_mib(2, 7)),
            ("d", of_mib(4, 6)),
            ("e", of_mib(5, 1)),
            ("f", of_mib(6, 0)),
        ] {
            budget.set(&ObjectName::new("shop", name), claim, None);
        }
        assert!(budget.0.is_empty());
    }

    /// What is in force as one would find it by going through all of them.
    fn left_out(claims: &BTreeMap<Arc<str>, Claim>) -> BTreeSet<Arc<str>> {
        let mut by_age: Vec<_> =
            claims.iter().map(|(name, claim)| (claim.created, name, claim.cost)).collect();
        by_age.sort();
        let mut sum = 0;
        let fits = |(_, _, cost): &&(i64, &Arc<str>, usize)| {
            sum += cost;
            sum <= MOST_OF_NAMESPACE
        };
        let used = by_age.iter().take_while(fits).count();
        by_age[used..].iter().map(|(_, name, _)| Arc::clone(name)).collect()
    }

    #[test]
    fn in_whatever_order_they_come_the_same_are_left_out() {
        let (mut budget, mut claims, mut random) = (Budget::default(), BTreeMap::new(), 1_u64);
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let mut before = BTreeSet::new();
        for _ in 0..3000 {
            let name: Arc<str> = next(40).to_string().into();
            let cost = usize::try_from(next(2 << 20)).unwrap();
            let new = (next(4) > 0).then_some(Claim { created: next(20).cast_signed(), cost });
            let old = match new {
                Some(new) => claims.insert(Arc::clone(&name), new),
                None => claims.remove(&name),
            };
            let object = ObjectName { namespace: "shop".into(), name: Arc::clone(&name) };
            let turned = budget.set(&object, old, new);
            let after = left_out(&claims);
            for (name, claim) in &claims {
                let object = ObjectName { namespace: "shop".into(), name: Arc::clone(name) };
                assert_eq!(budget.leaves_out(&object, *claim), after.contains(name));
            }
            let mut changed: BTreeSet<_> = before.symmetric_difference(&after).cloned().collect();
            changed.remove(&name);
            assert_eq!(turned.into_iter().filter(|other| *other != name).collect::<BTreeSet<_>>(), changed);
            before = after;
        }
    }

    /// Each that comes is older than all before it, and takes the place of one.
    #[test]
    fn what_comes_in_the_worst_order_is_no_more_work_than_there_is_to_turn() {
        let mut budget = Budget::default();
        let turned = |budget: &mut Budget, number: i64| {
            let new = Some(Claim { created: -number, cost: 4096 });
            budget.set(&ObjectName::new("shop", &number.to_string()), None, new).len()
        };
        let sum: usize = (0..20_000).map(|number| turned(&mut budget, number)).sum();
        assert_eq!(sum, 20_000 - (16 << 20) / 4096);
    }
}
