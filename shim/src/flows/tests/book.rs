//! Records from events in any order, with any missing.

use std::cell::RefCell;

use super::*;
use crate::flows::book::Sweep;
use crate::flows::record::{Filter, Phase, Verdict};

fn all(book: &Book) -> Vec<(Phase, u64)> {
    book.select(&Filter::default()).iter().map(|r| (r.state, r.egress_packets)).collect()
}

fn sweep(book: &mut Book, tables: &Fake, now: u64) {
    let read = Sweep::read(tables, now).unwrap();
    book.sweep(&read, tables, |_| None).unwrap();
}

fn closed(begun: u64, seen: u64) -> Flow {
    Flow { state: State::Closed, finished: 3, packets: [9, 9], ..flow(begun, seen) }
}

#[test]
fn a_flow_is_one_record_whatever_the_order() {
    let opened = event(EventKind::Opened, key(1), flow(2 * SECOND, 2 * SECOND));
    let ended = event(EventKind::Ended, key(1), closed(2 * SECOND, 3 * SECOND));
    for events in
        [vec![opened, ended], vec![ended, opened], vec![ended], vec![opened, opened, ended]]
    {
        let mut book = book(8);
        for event in &events {
            book.note(event, 3 * SECOND);
        }
        assert_eq!(all(&book), [(Phase::Closed, 9)], "{events:?}");
        assert_eq!(book.open(), 0);
    }
    let mut book = book(8);
    book.note(&opened, 2 * SECOND);
    let record = book.select(&Filter::default()).remove(0);
    assert_eq!((&*record.pod.name, &*record.peer.name), ("red/a", "blue/b"));
    assert_eq!((&*record.pod.tenant, &*record.peer.tenant), ("red", "blue"));
}

#[test]
fn a_port_that_is_used_again_is_another_record() {
    let mut book = book(8);
    book.note(&event(EventKind::Opened, key(1), flow(2 * SECOND, 2 * SECOND)), 0);
    book.note(&event(EventKind::Opened, key(1), flow(4 * SECOND, 4 * SECOND)), 0);
    // Late, of the first one.
    book.note(&event(EventKind::Ended, key(1), closed(2 * SECOND, 3 * SECOND)), 0);
    assert_eq!(all(&book), [(Phase::Evicted, 2), (Phase::Open, 2)]);
}

#[test]
fn the_past_is_bounded_and_what_made_room_is_counted() {
    let mut book = book(2);
    for port in 1..=5 {
        book.note(&event(EventKind::Ended, key(port), closed(2 * SECOND, 3 * SECOND)), 0);
    }
    assert_eq!((all(&book).len(), book.dropped), (2, 3));
}

#[test]
fn who_has_many_records_pushes_out_its_own() {
    let mut book = book(4);
    let mut end = |key| book.note(&event(EventKind::Ended, key, closed(2 * SECOND, 3 * SECOND)), 0);
    end(FlowKey { pod: 2, ..key(9) });
    for port in 1..=10 {
        end(key(port));
    }
    let of_red = Filter { tenant: Some("red".to_owned()), ..Filter::default() };
    assert_eq!((all(&book).len(), book.select(&of_red).len()), (4, 3));
}

#[test]
fn what_lives_is_bounded_and_leaves_room_for_other_tenants() {
    // Of 8, the first tenant has as many as it leaves: 4. The next has 2 of the 4 that are left.
    let mut book = book_of(8, 8);
    let opens = |book: &mut Book, key| {
        book.note(&event(EventKind::Opened, key, flow(2 * SECOND, 2 * SECOND)), 2 * SECOND);
    };
    for port in 1..=10 {
        opens(&mut book, key(port));
    }
    assert_eq!((book.open(), book.unkept), (4, 6));
    book.note(&denied(key(0), 2 * SECOND), 2 * SECOND);
    assert_eq!((book.refused(), book.unkept), (0, 7));
    for port in 1..=10 {
        opens(&mut book, FlowKey { pod: 2, ..key(port) });
    }
    assert_eq!((book.open(), book.unkept), (6, 15));
    // What is told again, or ends, is known or is not; one without room has its record when it has ended.
    opens(&mut book, key(1));
    book.note(&event(EventKind::Ended, key(2), closed(2 * SECOND, 3 * SECOND)), 3 * SECOND);
    book.note(&event(EventKind::Ended, key(9), closed(2 * SECOND, 3 * SECOND)), 3 * SECOND);
    assert_eq!((book.open(), book.unkept), (5, 15));
    let ended = |book: &Book| all(book).iter().filter(|(state, _)| *state == Phase::Closed).count();
    assert_eq!(ended(&book), 2);
    // A sweep finds the others, for which there is no room still; it tells no end twice.
    let live = |port| (key(port), flow(2 * SECOND, 4 * SECOND));
    let of = |pod: u16, port| (FlowKey { pod, ..key(port) }, flow(2 * SECOND, 4 * SECOND));
    let mut listed: Vec<_> = [1, 3, 4, 5, 6].map(live).to_vec();
    listed.extend([of(2, 1), of(2, 2), (key(9), closed(2 * SECOND, 3 * SECOND))]);
    let pods = [(1, pod(SECOND)), (2, Pod { tenant: 2, ..pod(SECOND) })].into();
    let mut tables = Fake { pods, listed, ..Fake::default() };
    for now in [5, 6] {
        sweep(&mut book, &tables, now * SECOND);
        assert_eq!((book.open(), book.homeless, ended(&book)), (5, 2, 2));
    }
    tables.listed.retain(|(key, _)| key.pod == 2);
    sweep(&mut book, &tables, 7 * SECOND);
    assert_eq!((book.open(), book.homeless), (2, 0));
    // All of its room is free again.
    for port in 20..=30 {
        opens(&mut book, key(port));
    }
    assert_eq!(book.open(), 5);
}

#[test]
fn a_sweep_finds_what_was_not_told() {
    let mut book = book(8);
    let live = flow(2 * SECOND, 9 * SECOND);
    let mut tables = Fake {
        pods: [(1, pod(SECOND))].into(),
        listed: vec![
            (key(1), live),
            (key(2), flow(0, 0)),
            (key(3), closed(2 * SECOND, 9 * SECOND)),
        ],
        ..Fake::default()
    };
    sweep(&mut book, &tables, 10 * SECOND);
    // An earlier pod's is not there.
    assert_eq!(book.select(&Filter::default()).len(), 2);
    assert_eq!(book.open(), 1);
    // A second sweep tells nothing twice; a list that lacks a flow does not end it.
    tables.unlisted = std::mem::take(&mut tables.listed);
    sweep(&mut book, &tables, 11 * SECOND);
    assert_eq!((all(&book).len(), book.open()), (2, 1));
    tables.unlisted.clear();
    sweep(&mut book, &tables, 12 * SECOND);
    assert!(all(&book).contains(&(Phase::Evicted, 2)));
    // Silence ends what is still listed, once.
    tables.listed = vec![(key(4), flow(2 * SECOND, 13 * SECOND))];
    sweep(&mut book, &tables, 14 * SECOND);
    sweep(&mut book, &tables, 7600 * SECOND);
    sweep(&mut book, &tables, 7601 * SECOND);
    assert_eq!(all(&book).iter().filter(|(state, _)| *state == Phase::TimedOut).count(), 1);
}

#[test]
fn records_of_a_pod_that_goes_end_and_keep_its_name() {
    let mut book = book(8);
    book.note(&event(EventKind::Opened, key(1), flow(2 * SECOND, 2 * SECOND)), 2 * SECOND);
    // Its number is another pod's by now.
    let tables = Fake { pods: [(1, pod(5 * SECOND))].into(), ..Fake::default() };
    sweep(&mut book, &tables, 6 * SECOND);
    let record = book.select(&Filter::default()).remove(0);
    assert_eq!((record.state, &*record.pod.name), (Phase::Gone, "red/a"));
}

#[test]
fn refusals_are_counted_and_forgotten_after_silence() {
    let mut book = book(8);
    book.note(&denied(key(0), 2 * SECOND), 2 * SECOND);
    let entry = Denied {
        begun: 2 * SECOND,
        seen: 5 * SECOND,
        packets: 7,
        reason: Reason::Options,
        opener: Side::Vm,
    };
    let tables = Fake {
        pods: [(1, pod(SECOND))].into(),
        denials: RefCell::new(vec![(key(0), entry)]),
        ..Fake::default()
    };
    sweep(&mut book, &tables, 10 * SECOND);
    let filter = Filter { verdict: Some(Verdict::Drop), ..Filter::default() };
    let record = book.select(&filter).remove(0);
    assert_eq!((record.egress_packets, record.reason.as_deref()), (7, Some("Options")));
    sweep(&mut book, &tables, 70 * SECOND);
    assert_eq!((all(&book), book.refused()), (vec![(Phase::TimedOut, 7)], 0));
    assert!(tables.denials.borrow().is_empty());
}
