//! Places in the policy, given back by those who find them.

use joey_ebpf::policy::abi::{Identity, PodId, Ports, Prefix, Rule, Scope};
use joey_ebpf::policy::maps::{KEPT, Lock, Maps};

use std::net::IpAddr;

use super::super::admission::{admit, dismiss, limit_packets};
use super::super::read::PodInterface;
use super::*;
use crate::sandbox::record::{ProcessId, Record, directory};

const NONE: [PodId; 0] = [];

fn interface(mac: [u8; 6]) -> PodInterface {
    PodInterface { index: 1, mtu: 1500, mac, other_end: None }
}

fn applicant(namespace: &str) -> Applicant {
    let pod = Some((namespace.to_owned(), "pod".to_owned()));
    Applicant { tenant: namespace.to_owned(), pod, ..Applicant::default() }
}

/// Takes a place, and has a record of it below `run_dir`.
fn admitted(lab: &Lab, run_dir: &Path, name: &str, last: u8) -> PodNetwork {
    let (dir, own) = (&lab.config.bpf_dir, vec![Ipv4Addr::new(10, 9, 1, last).into()]);
    let who = applicant(name);
    let mut place = None;
    let record = |taken: &PodNetwork| {
        place = Some(taken.clone());
        let me = ProcessId::of(std::process::id()).ok();
        let network = Some(taken.clone());
        let record = Record { id: name.to_owned(), shim: me, network, ..Record::default() };
        record.write(&directory(run_dir, name))
    };
    admit(dir, &who, &interface([2, 0, 0, 0, 0, last]), own, &[], record).unwrap();
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

/// Admits and dismisses a pod of this namespace.
fn passing(lab: &Lab, namespace: &str) {
    let dir = &lab.config.bpf_dir;
    let mut place = None;
    let record = |taken: &PodNetwork| {
        place = Some(taken.clone());
        Ok(())
    };
    let own = vec![Ipv4Addr::new(10, 9, 3, 1).into()];
    admit(dir, &applicant(namespace), &interface([2; 6]), own, &[], record).unwrap();
    let place = place.unwrap();
    dismiss(&place).unwrap();
}

#[test]
fn namespaces_that_come_and_go_do_not_use_up_the_names() {
    let Some(lab) = Lab::new() else { return };
    let (run, dir) = (tempfile::tempdir().unwrap(), &lab.config.bpf_dir);
    let maps = Maps::open(dir).unwrap();
    // Used by a pod, an identity, a rule and the policy of a namespace.
    admitted(&lab, run.path(), "pods", 1);
    let used = ["pods", "peers", "opens", "opened", "isolated"];
    {
        let lock = Lock::take(dir).unwrap();
        let number = |name: &str| maps.number_of(&lock, name).unwrap();
        let epoch = maps.active().unwrap().epoch;
        let address = Ipv4Addr::new(10, 9, 2, 1).into();
        let identity = Identity { tenant: number("peers"), ..Identity::default() };
        maps.put_identity(epoch, Prefix { address, bits: 32 }, identity).unwrap();
        let scope = Scope::Tenants { from: number("opens"), to: number("opened") };
        maps.put_rule(epoch, &Rule { scope, ports: Ports::Any }).unwrap();
        maps.put_space(epoch, number("isolated"), 7).unwrap();
    }
    let numbers = || used.map(|name| maps.known_number(name).unwrap());
    let before = numbers();
    assert!(before.iter().all(Option::is_some));
    let begun = Instant::now();
    for number in 0..70_000 {
        passing(&lab, &format!("short-{number}"));
    }
    println!("70,000 short-lived namespaces: {:?}", begun.elapsed());
    assert_eq!(numbers(), before);
    let names = maps.names().unwrap();
    assert!(names.len() <= 2 * KEPT as usize + used.len(), "{} names are left", names.len());
    assert!(maps.known_number("short-69999").unwrap().is_some());
    // One that comes again is another.
    assert_eq!(maps.known_number("short-0").unwrap(), None);
    passing(&lab, "short-0");
    assert!(maps.known_number("short-0").unwrap() > before.into_iter().max().unwrap());
}

#[test]
fn a_name_that_is_forgotten_while_its_pod_starts_is_known_again() {
    let Some(lab) = Lab::new() else { return };
    let dir = &lab.config.bpf_dir;
    let maps = Maps::open(dir).unwrap();
    let mut places = Vec::new();
    let record = |taken: &PodNetwork| {
        // Between looking up the numbers and taking the place.
        if places.is_empty() {
            let forgotten = maps.forget_names(&Lock::take(dir).unwrap(), 0).unwrap();
            assert_eq!(forgotten, 2);
        }
        places.push(taken.clone());
        Ok(())
    };
    let who = Applicant { tenant: "blue".to_owned(), ..applicant("web") };
    let id =
        admit(dir, &who, &interface([2; 6]), vec![Ipv4Addr::new(10, 9, 3, 1).into()], &[], record)
            .unwrap();
    assert_eq!(places.len(), 2);
    let pod = maps.pod(id).unwrap().unwrap();
    assert_eq!(maps.known_number("blue").unwrap(), Some(pod.tenant));
    assert_eq!(maps.known_number("web").unwrap(), Some(pod.space));
    assert_eq!(maps.pods().unwrap().len(), 1);
    // And while it is there they are kept.
    assert_eq!(maps.forget_names(&Lock::take(dir).unwrap(), 0).unwrap(), 0);
    dismiss(&places[1]).unwrap();
    assert_eq!(maps.forget_names(&Lock::take(dir).unwrap(), 0).unwrap(), 2);
    assert!(maps.names().unwrap().is_empty());
}

#[test]
fn a_limit_does_not_reach_who_has_the_number_next() {
    let Some(lab) = Lab::new() else { return };
    let (run, dir) = (tempfile::tempdir().unwrap(), &lab.config.bpf_dir);
    let maps = Maps::open(dir).unwrap();
    let limits = NetLimits { egress_packets: 1, ingress_packets: 1, ..NetLimits::default() };
    let over = std::sync::atomic::AtomicBool::new(false);
    let last = std::sync::Mutex::new(admitted(&lab, run.path(), "first", 1));
    thread::scope(|scope| {
        // Whoever limits has read the record a while ago.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let place = last.lock().unwrap().clone();
                limit_packets(&place, &limits).unwrap();
            }
        });
        for _ in 0..300 {
            let place = last.lock().unwrap().clone();
            dismiss(&place).unwrap();
            let next = admitted(&lab, run.path(), "next", 1);
            assert_eq!(next.id, place.id);
            for _ in 0..3 {
                limit_packets(&place, &limits).unwrap();
                assert!(!maps.pod(next.id).unwrap().unwrap().limited, "{place:?}, {next:?}");
            }
            *last.lock().unwrap() = next;
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn addresses_of_services_are_not_the_nodes() {
    let Some(lab) = Lab::with_interface() else { return };
    lab.ip("n", "link add kube-ipvs0 type veth peer name far");
    for address in ["10.96.0.1/32", "10.96.0.10/32"] {
        lab.ip("n", &format!("addr add {address} dev kube-ipvs0"));
    }
    lab.ip("n", "addr add fd96::1/128 dev kube-ipvs0 nodad");
    let own = lab.inside("n", || own_addresses().unwrap());
    let router: [IpAddr; 2] = [Ipv4Addr::new(10, 9, 0, 1).into(), "fd09::1".parse().unwrap()];
    assert_eq!(own, router);
}
