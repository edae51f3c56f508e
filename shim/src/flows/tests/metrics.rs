//! The text, and that it never falls.

use std::collections::{BTreeMap, HashSet};

use joey_ebpf::policy::abi::Counters;

use super::Who;
use crate::flows::metrics::{Sample, Told, text};

#[test]
fn labels_are_escaped_and_families_said_once() {
    let counters = Counters { bytes: [7, 0], ..Counters::default() };
    let who = Who { tenant: "a\"b\\c\nd".to_owned(), name: "ns/p".to_owned() };
    let sample = Sample {
        pods: vec![(who.clone(), counters.clone()), (who, counters)],
        ..Sample::default()
    };
    let text = text(&sample);
    let line =
        r#"joey_pod_bytes_total{tenant="a\"b\\c\nd",namespace="ns",pod="p",direction="egress"} 7"#;
    assert!(text.lines().any(|other| other == line), "{text}");
    assert_eq!(text.matches("# TYPE joey_pod_bytes_total counter\n").count(), 1);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        value.parse::<u64>().unwrap();
    }
}

#[test]
fn a_tenants_counters_do_not_fall_while_its_pod_goes() {
    let told = Told::default();
    let of = |bytes| {
        BTreeMap::from([("t".to_owned(), Counters { bytes: [bytes, 0], ..Counters::default() })])
    };
    let mut kept = Vec::new();
    for tenants in [of(10), of(3), BTreeMap::new(), of(12)] {
        let named = HashSet::from(["t".to_owned()]);
        let mut sample = Sample { tenants, named, ..Sample::default() };
        told.keep(&mut sample);
        kept.push(sample.tenants["t"].bytes[0]);
    }
    assert_eq!(kept, [10, 10, 10, 12]);
    // Its name is forgotten; what it counts when it comes again is another's.
    let mut sample = Sample::default();
    told.keep(&mut sample);
    assert!(sample.tenants.is_empty());
    let mut sample = Sample { tenants: of(1), ..Sample::default() };
    told.keep(&mut sample);
    assert_eq!(sample.tenants["t"].bytes[0], 1);
}
