use std::cell::Cell;

use super::*;

/// Hosts and what their entries' statuses say: what the agents write is read again by [`World::write`].
#[derive(Default)]
struct World {
    allocator: Allocator,
    hosts: HashMap<ObjectName, Wish>,
}

fn host(number: u64) -> ObjectName {
    ObjectName::new("shop", &format!("h{number}.example"))
}

impl World {
    fn set(&mut self, name: &ObjectName, created: i64, said: &[IpAddr]) -> Touched {
        let entry = ObjectName::new(&name.namespace, "entry");
        let wish = Wish { created, entry, said: said.to_vec() };
        self.hosts.insert(name.clone(), wish.clone());
        let mut touched = Touched::default();
        self.allocator.set(name, Some(wish), &mut touched);
        touched
    }

    fn remove(&mut self, name: &ObjectName) {
        self.hosts.remove(name);
        self.allocator.set(name, None, &mut Touched::default());
    }

    fn proposed(&self, name: &ObjectName) -> Vec<IpAddr> {
        self.allocator.proposed(name).collect()
    }

    fn in_force(&self, name: &ObjectName) -> Vec<IpAddr> {
        self.allocator.in_force(name).collect()
    }

    /// An agent writes the status of a host's entry.
    fn write(&mut self, name: &ObjectName) {
        let said: Vec<IpAddr> = self.allocator.in_force(name).chain(self.allocator.proposed(name)).collect();
        let created = self.hosts[name].created;
        self.set(name, created, &said);
    }

    /// What is kept is what follows from the hosts.
    fn check(&self) {
        let mut proposed: Vec<IpAddr> = self.hosts.keys().flat_map(|name| self.proposed(name)).collect();
        let count = proposed.len();
        proposed.sort_unstable();
        proposed.dedup();
        assert_eq!(proposed.len(), count, "one is proposed to two");
        for (ip, slot) in &self.allocator.slots {
            assert!(slot.claims.is_sorted() && slot.claims.is_empty() == slot.proposed.is_some(), "{ip}");
            assert_eq!(slot.proposed.is_some(), proposed.contains(ip), "{ip}");
        }
        for (family, range) in RANGES.iter().enumerate() {
            let taken = self.allocator.slots.keys().filter(|ip| range.contains(**ip)).count();
            assert_eq!(u64::try_from(taken).unwrap(), self.allocator.taken[family]);
        }
        let mut all = HashMap::new();
        for name in self.hosts.keys() {
            let families = self.in_force(name).into_iter().chain(self.proposed(name)).map(|ip| ip.is_ipv4());
            all.insert(name, families.collect::<BTreeSet<_>>().len());
        }
        let waiting: usize = self.allocator.waiting.iter().map(BTreeSet::len).sum();
        assert_eq!(all.values().sum::<usize>() + waiting, 2 * all.len(), "one of each family for each");
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// As they were in the first version that made them up: another one would move every host.
#[test]
fn the_addresses_of_a_host_follow_from_its_name() {
    let mut world = World::default();
    for (namespace, name, v4, v6) in [
        ("shop", "db.example", "240.240.207.58", "2001:2::397:5a3f:e0c2:cf3a"),
        ("shop", "db2.example", "240.240.105.183", "2001:2::aa48:a7d0:6cd4:69b7"),
        ("bank", "db.example", "240.240.119.18", "2001:2::dc44:3117:6532:7712"),
    ] {
        let name = ObjectName::new(namespace, name);
        world.set(&name, 1, &[]);
        assert_eq!(world.proposed(&name).iter().map(ToString::to_string).collect::<Vec<_>>(), [v4, v6]);
    }
}

#[test]
fn what_is_of_a_range() {
    for (text, expect) in [
        ("240.240.0.0", false),
        ("240.240.0.1", true),
        ("240.240.255.254", true),
        ("240.240.255.255", false),
        ("240.241.0.1", false),
        ("2001:2::", false),
        ("2001:2::1", true),
        ("2001:2::ffff:ffff:ffff:fffe", true),
        ("2001:2::ffff:ffff:ffff:ffff", false),
        ("2001:2:0:1::1", false),
        ("::ffff:240.240.0.1", false),
    ] {
        assert_eq!(is_made_up(ip(text)), expect, "{text}");
    }
    let mut all: Vec<IpAddr> = RANGES[0].preferred(&host(0)).collect();
    assert!(all.iter().all(|ip| RANGES[0].contains(*ip)));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 65_534);
}

/// A tenth of the range, where some have to give way.
#[test]
fn in_whatever_order_they_come_they_are_to_have_the_same() {
    let numbers: Vec<u64> = (0..6_000).collect();
    let taken: Vec<IpAddr> = RANGES[0].preferred(&host(3)).take(5).collect();
    let mut expect = None;
    for step in [1, 7, 4_999] {
        let mut world = World::default();
        for number in &numbers {
            let number = number * step % 6_000;
            world.set(&host(number), (number % 100).cast_signed(), &[]);
        }
        world.set(&ObjectName::new("bank", "a"), 1_000, &taken);
        world.check();
        let all: Vec<_> = numbers.iter().map(|number| world.proposed(&host(*number))).collect();
        let first = |name: &ObjectName| RANGES[0].preferred(name).next();
        let moved =
            numbers.iter().filter(|n| all[**n as usize].first().copied() != first(&host(**n))).count();
        assert!((100..900).contains(&moved), "{moved}");
        assert!(all[3][0] != taken[0] && !taken.contains(&all[3][0]));
        assert_eq!(*expect.get_or_insert(all.clone()), all, "{step}");
    }
}

#[test]
fn what_a_status_says_is_in_force_and_of_two_the_older_keeps_it() {
    let (mut world, [a, b]) = (World::default(), [host(1), host(2)]);
    world.set(&a, 1, &[]);
    assert!(world.in_force(&a).is_empty());
    world.write(&a);
    let own = world.in_force(&a);
    assert_eq!((own.len(), world.proposed(&a)), (2, vec![]));

    // Somebody else wrote it, of another range, and of one family only.
    let other = [ip("10.9.0.1")];
    world.set(&b, 2, &other);
    assert_eq!((world.in_force(&b), world.proposed(&b).len()), (other.to_vec(), 1));
    assert!(world.proposed(&b)[0].is_ipv6());

    // Two agents raced.
    world.set(&b, 2, &own);
    assert_eq!((world.in_force(&b), world.in_force(&a)), (vec![], own.clone()));
    let next = world.proposed(&b);
    assert!(next.len() == 2 && next.iter().all(|ip| !own.contains(ip)), "{next:?}");
    let touched = world.set(&b, 0, &own);
    assert_eq!((world.in_force(&b), world.in_force(&a)), (own.clone(), vec![]));
    assert!(touched.hosts.contains(&a) && world.proposed(&a).len() == 2);
    world.check();
    world.remove(&b);
    assert_eq!((world.in_force(&a), world.proposed(&a)), (own.clone(), vec![]));

    // Only one of the two.
    world.set(&b, 2, &[own[0], next[1]]);
    assert_eq!(world.in_force(&b), [next[1]]);
    assert!(world.proposed(&b).len() == 1 && world.proposed(&b)[0].is_ipv4());
    world.check();
}

#[test]
fn what_an_entry_says_itself_is_made_up_for_nobody() {
    let (mut world, a) = (World::default(), host(1));
    world.set(&a, 5, &[]);
    let own = world.proposed(&a);
    let entry = ObjectName::new("bank", "vips");
    let own_namespace_only = Cell::new(false);
    let reserve = |world: &mut World, old: (i64, &[IpAddr]), new: (i64, &[IpAddr])| {
        let old = Reserved { created: old.0, own_namespace_only: own_namespace_only.get(), addresses: old.1 };
        let new = Reserved { created: new.0, addresses: new.1, ..old };
        world.allocator.reserve(&entry, old, new, &mut Touched::default());
        world.check();
    };
    reserve(&mut world, (0, &[]), (9, &own));
    let next = world.proposed(&a);
    assert!(next.iter().all(|ip| !own.contains(ip)), "{next:?}");
    // One that has it keeps it from a younger entry, and not from an older one.
    world.write(&a);
    reserve(&mut world, (9, &own), (9, &next));
    assert_eq!(world.in_force(&a), next);
    reserve(&mut world, (9, &next), (1, &next));
    assert_eq!((world.in_force(&a), world.proposed(&a)), (vec![], own));
    reserve(&mut world, (1, &next), (0, &[]));
    assert_eq!((world.in_force(&a), world.proposed(&a)), (next.clone(), vec![]));
    // What only its own namespace is told takes nothing from anybody who has it.
    own_namespace_only.set(true);
    reserve(&mut world, (0, &[]), (1, &next));
    assert_eq!((world.in_force(&a), world.proposed(&a)), (next, vec![]));
    let b = host(2);
    world.set(&b, 5, &[]);
    let wanted = world.proposed(&b);
    reserve(&mut world, (0, &[]), (1, &wanted));
    assert!(world.proposed(&b).iter().all(|ip| !wanted.contains(ip)));
}

#[test]
fn an_address_is_free_again_when_its_host_is_gone() {
    let mut world = World::default();
    world.set(&host(1), 1, &[]);
    world.write(&host(1));
    let own = world.in_force(&host(1));
    world.remove(&host(1));
    assert!(world.allocator.slots.is_empty() && world.allocator.hosts.is_empty());
    world.set(&host(1), 7, &[]);
    assert_eq!(world.proposed(&host(1)), own);
}

/// The last one waits, and goes on as soon as there is one.
#[test]
fn a_range_that_is_full() {
    let mut world = World::default();
    for number in 0..65_534_u32 {
        world.set(&host(number.into()), number.into(), &[]);
    }
    assert!(!world.allocator.is_exhausted());
    for number in 65_534..66_000 {
        world.set(&host(number), 70_000, &[]);
        assert!(world.allocator.is_waiting(&host(number)) && world.proposed(&host(number)).len() == 1);
    }
    world.remove(&host(65_700));
    world.remove(&host(5));
    let had: Vec<u64> = (65_534..66_000).filter(|n| world.proposed(&host(*n)).len() == 2).collect();
    assert_eq!(had.len(), 1, "{had:?}");
    world.check();
}

#[test]
fn whatever_happens_each_has_one_of_each_family() {
    let (mut world, mut random) = (World::default(), 1_u64);
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for _ in 0..4_000 {
        let name = host(next(40));
        match next(4) {
            0 => world.remove(&name),
            1 if world.hosts.contains_key(&name) => world.write(&name),
            // What others could have been given.
            2 => {
                let of = host(next(40));
                let said: Vec<IpAddr> =
                    RANGES.iter().flat_map(|range| range.preferred(&of).take(next(3) as usize)).collect();
                world.set(&name, next(5).cast_signed(), &said);
            }
            _ => drop(world.set(&name, next(5).cast_signed(), &[])),
        }
        world.check();
    }
    for _ in 0..3 {
        (0..40).map(host).for_each(|name| {
            if world.hosts.contains_key(&name) {
                world.write(&name);
            }
        });
    }
    let all: Vec<IpAddr> = (0..40).flat_map(|number| world.in_force(&host(number))).collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    assert!(
        world.hosts.keys().all(|name| world.in_force(name).len() >= 2 && world.proposed(name).is_empty())
    );
}
