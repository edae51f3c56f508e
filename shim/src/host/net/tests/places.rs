//! Places in the policy, given back by those who find them.

use joey_ebpf::policy::maps::Maps;

use super::super::admission::{admit, dismiss};
use super::*;
use crate::sandbox::record::{ProcessId, Record, directory};

const NONE: [PodId; 0] = [];

/// Takes a place, and has a record of it below `run_dir`.
fn admitted(lab: &Lab, run_dir: &Path, name: &str, last: u8) -> PodNetwork {
    let (dir, own) = (&lab.config.bpf_dir, vec![Ipv4Addr::new(10, 9, 1, last).into()]);
    let who = Applicant { tenant: name.to_owned(), pod: Some((name.to_owned(), "pod".to_owned())) };
    let mut place = None;
    let record = |taken: &PodNetwork| {
        place = Some(taken.clone());
        let me = ProcessId::of(std::process::id()).ok();
        let network = Some(taken.clone());
        let record = Record { id: name.to_owned(), shim: me, network, ..Record::default() };
        record.write(&directory(run_dir, name))
    };
    admit(dir, &who, [2, 0, 0, 0, 0, last], own, &[], record).unwrap();
    place.unwrap()
}

#[test]
fn a_place_without_a_record_is_given_back_and_no_other() {
    let Some(lab) = Lab::new() else { return };
    let (run, dir) = (tempfile::tempdir().unwrap(), &lab.config.bpf_dir);
    let (kept, lost) =
        (admitted(&lab, run.path(), "kept", 1), admitted(&lab, run.path(), "lost", 2));
    let maps = Maps::open(dir).unwrap();
    let there = || {
        let mut pods: Vec<PodId> = maps.pods().unwrap().into_keys().collect();
        pods.sort_unstable();
        (pods, maps.locals().unwrap().len())
    };
    let (mut strays, shims) = (Strays::default(), [ProcessId::of(std::process::id()).unwrap()]);
    let mut look = |shims: &[ProcessId]| strays.look(dir, run.path(), shims);
    assert_eq!(look(&shims).unwrap(), NONE);
    assert_eq!(look(&shims).unwrap(), NONE);
    fs::remove_dir_all(directory(run.path(), "lost")).unwrap();
    // Seen for the first time; then beside a shim that has no record, whose place it may be.
    assert_eq!(look(&shims).unwrap(), NONE);
    let other = ProcessId { pid: shims[0].pid, start: shims[0].start + 1 };
    assert_eq!(look(&[shims[0], other]).unwrap(), NONE);
    // Whose record cannot be read is not known.
    let unreadable = directory(run.path(), "unreadable");
    fs::create_dir(&unreadable).unwrap();
    fs::write(unreadable.join("record.json"), "{").unwrap();
    let error = look(&shims).unwrap_err().to_string();
    assert!(error.contains("unreadable"), "{error}");
    assert_eq!(there(), (vec![kept.id, lost.id], 2));
    fs::remove_dir_all(unreadable).unwrap();
    assert_eq!(look(&shims).unwrap(), [lost.id]);
    assert_eq!(there(), (vec![kept.id], 1));
    assert_eq!(look(&shims).unwrap(), NONE);
    // Somebody else's that has the number now is not taken by the one who had it.
    let next = admitted(&lab, run.path(), "next", 3);
    assert_eq!(next.id, lost.id);
    dismiss(&lost).unwrap();
    assert_eq!(there(), (vec![kept.id, next.id], 2));
}
