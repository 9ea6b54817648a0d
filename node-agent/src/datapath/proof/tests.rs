//! What a canary that did not come back is taken for.

use super::*;

fn concluded(known: &[Part], way: Way, outcome: Outcome) -> Option<(Part, bool)> {
    let mut flaws: Vec<Flaw> = known.iter().map(|part| Flaw::certain(*part, "known")).collect();
    conclude(&mut flaws, way, IpAddr::from([10, 0, 0, 1]), &outcome);
    flaws.split_off(known.len()).pop().map(|flaw| (flaw.part, flaw.certain))
}

#[test]
fn what_is_known_explains_what_did_not_come_back() {
    let lost = || Outcome::Lost;
    for (known, way, outcome, expect) in [
        (vec![], Way::Outbound, lost(), Some((Part::Listeners, false))),
        (vec![], Way::Inbound, Outcome::Silent, Some((Part::Proxy, false))),
        (vec![], Way::Dns, lost(), Some((Part::Dns, false))),
        (vec![], Way::Outbound, Outcome::Escaped, Some((Part::Connect, true))),
        (vec![Part::Rules], Way::Outbound, lost(), None),
        (vec![Part::Rules], Way::Outbound, Outcome::Escaped, Some((Part::Connect, true))),
        (vec![Part::Dns], Way::Dns, lost(), None),
        (vec![Part::Dns], Way::Hbone, lost(), Some((Part::Listeners, false))),
        (vec![Part::Connect], Way::Outbound, lost(), None),
        (vec![Part::Connect], Way::Inbound, Outcome::Silent, Some((Part::Proxy, false))),
        (vec![Part::Guard], Way::Hbone, lost(), Some((Part::Listeners, false))),
    ] {
        assert_eq!(concluded(&known, way, outcome), expect, "{known:?} {way:?}");
    }
}

#[test]
fn what_could_not_be_looked_at_on_the_node_is_not_taken_for_guarded() {
    let details =
        |found| on_the_node("a", &found).into_iter().map(|flaw| (flaw.part, flaw.detail)).collect::<Vec<_>>();
    assert_eq!(details(Ok([("a", Vec::new()), ("b", vec!["open".to_owned()])].into())), []);
    let open = Ok([("a", vec!["open".to_owned()])].into());
    assert_eq!(details(open), [(Part::Guard, "open".to_owned())]);
    let failed = details(Err(io::Error::from_raw_os_error(libc::ENOBUFS)));
    assert!(
        matches!(&failed[..], [(Part::Guard, detail)] if detail.contains("cannot be told")),
        "{failed:?}"
    );
}

#[test]
fn each_part_has_a_name_of_its_own() {
    let names: BTreeSet<_> = Part::ALL.iter().map(|part| part.name()).collect();
    assert_eq!(names.len(), Part::ALL.len());
}
