//! Policies on the kernel's own maps: in force whole or not at all, whatever fails, and whoever is killed.

use std::io::Write as _;
use std::path::Path;

use joey_ebpf::policy::abi::{Pod, Side, name_digest};
use joey_ebpf::policy::loader::Policy;
use joey_ebpf::policy::maps::{Lock, directory};

use super::super::apply::{Applied, on};
use super::super::change::Change;
use super::super::document::Documents;
use super::super::entry::Entry;
use super::super::error::PolicyError;
use super::super::state::Store;
use super::{documents, ip};

/// Maps of the test's own, and a directory for the state.
struct Node {
    policy: Policy,
    lock: Lock,
    dir: tempfile::TempDir,
}

impl Node {
    /// `None` where it cannot be tested, which is told, past a harness that keeps what tests print.
    fn new(what: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            let words = format!("\nSKIPPED {what}: needs root\n");
            let _ = std::io::stdout().write_all(words.as_bytes());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory(dir.path())).unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        Some(Self { policy: Policy::load().unwrap(), lock, dir })
    }

    fn state(&self) -> &Path {
        self.dir.path()
    }

    fn apply(&self, change: Change) -> Result<Applied, PolicyError> {
        on(&self.policy.maps, &self.lock, self.state(), change, &|_| {})
    }

    fn epoch(&self) -> u32 {
        self.policy.maps.active().unwrap().epoch
    }
}

fn entry(address: &str, namespace: &str) -> Entry {
    let json = serde_json::json!({"address": address, "namespace": namespace, "name": address});
    serde_json::from_value(json).unwrap()
}

fn replace(entries: &[Entry]) -> Change {
    Change::Replace { entries: entries.to_vec(), namespaces: Vec::new() }
}

fn node(ports: &str) -> Documents {
    documents(&format!(
        "apiVersion: joey.io/v1\nkind: NodePolicy\nmetadata: {{name: n}}\nspec:\n  services:\n  \
         - {{name: s, addresses: [10.9.0.0/16], ports: {ports}}}\n"
    ))
}

#[test]
fn changes_are_merged_persisted_and_in_force() {
    let Some(node_) = Node::new("changes of the policy") else { return };
    let store = Store::new(node_.state());
    let first = node_.apply(Change::Restore).unwrap();
    assert_eq!((first.identities, first.rules), (0, 1));
    let (a, b, c) = (entry("10.0.0.1", "a"), entry("10.0.0.2", "b"), entry("10.0.0.3", "c"));
    let second = node_.apply(replace(&[a.clone(), b])).unwrap();
    assert!(second.epoch > first.epoch);
    assert_eq!(node_.apply(Change::Policy(node("[443/tcp]"))).unwrap().identities, 3);
    let put = Change::Update {
        put: vec![c.clone()],
        remove: vec![ip("10.0.0.2"), ip("10.0.0.99")],
        namespaces: Vec::new(),
    };
    let fourth = node_.apply(put).unwrap();
    assert_eq!((fourth.identities, fourth.rules), (3, 2));
    assert_eq!(node_.epoch(), fourth.epoch);
    assert_eq!(store.identities().unwrap().content.entries, [a, c]);
    assert_eq!(store.policy().unwrap().content.0.len(), 1);
    // After a boot: what was last, under an epoch of its own.
    let again = node_.apply(Change::Restore).unwrap();
    assert_eq!((again.identities, again.rules), (fourth.identities, fourth.rules));
    assert!(again.epoch > fourth.epoch);
}

#[test]
fn what_is_refused_changes_nothing() {
    let Some(node_) = Node::new("refused policies") else { return };
    node_.apply(replace(&[entry("10.0.0.1", "a")])).unwrap();
    let before = node_.apply(Change::Policy(node("[443/tcp]"))).unwrap();
    let twice = [entry("10.0.0.1", "a"), entry("10.0.0.1", "b")];
    node_.apply(replace(&twice)).unwrap_err();
    node_.apply(Change::Policy(node("[443/sctp]"))).unwrap_err();
    assert_eq!(node_.epoch(), before.epoch);
    // The disk refuses: a directory is where the file goes.
    let file = node_.state().join("network/policy.json");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir_all(file.join("in the way")).unwrap();
    let error = node_.apply(Change::Policy(node("[80/tcp]"))).unwrap_err();
    assert!(error.to_string().contains("policy.json"), "{error}");
    assert_eq!(node_.epoch(), before.epoch);
    // What was not readable is replaced.
    std::fs::remove_dir_all(&file).unwrap();
    std::fs::write(&file, "half a fi").unwrap();
    node_.apply(replace(&[])).unwrap_err();
    let after = node_.apply(Change::Policy(node("[80/tcp]"))).unwrap();
    assert!(after.epoch > before.epoch);
}

/// What one who is killed at a point leaves behind.
struct Killed;

#[test]
fn whoever_is_killed_leaves_one_policy_in_force_and_the_next_cleans_up() {
    let Some(node_) = Node::new("kills in the middle of a policy") else { return };
    std::panic::set_hook(Box::new(|_| {}));
    node_.apply(replace(&[entry("10.0.0.1", "a")])).unwrap();
    for (point, in_force, persisted) in [
        ("policy-written", false, false),
        ("policy-persisted", false, true),
        ("policy-active", true, true),
    ] {
        let before = node_.apply(Change::Policy(node("[443/tcp]"))).unwrap();
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let change = Change::Policy(node("[80/tcp, 81/tcp, 82/tcp]"));
            let at = |name: &str| {
                if name == point {
                    std::panic::panic_any(Killed);
                }
            };
            on(&node_.policy.maps, &node_.lock, node_.state(), change, &at)
        }));
        assert!(killed.is_err(), "{point}");
        assert_eq!(node_.epoch() != before.epoch, in_force, "{point}");
        // Another change goes on from what was persisted, and nothing else is left.
        let next = node_.apply(replace(&[entry("10.0.0.1", "a")])).unwrap();
        assert_eq!(next.rules, if persisted { 4 } else { 2 }, "{point}");
        assert!(next.epoch > before.epoch + u32::from(persisted), "{point}");
    }
    let _ = std::panic::take_hook();
}

#[test]
fn a_large_cluster_is_applied_in_a_moment() {
    let Some(node_) = Node::new("a large policy on maps") else { return };
    let (pods, networks) = (super::scale::pods(10_000, 50), super::scale::networks(200, 50));
    let first = node_.apply(replace(&pods)).unwrap();
    let all = node_.apply(Change::Policy(networks)).unwrap();
    let put = vec![pods[7].clone()];
    let one = Change::Update { put, remove: Vec::new(), namespaces: Vec::new() };
    let again = node_.apply(one).unwrap();
    assert_eq!((all.identities, all.rules), (again.identities, again.rules));
    let words = format!(
        "10,000 identities applied in {:?}, with 200 NetworkPolicies ({} rules) in {:?}, one identity after that in {:?}\n",
        first.took, all.rules, all.took, again.took
    );
    let _ = std::io::stdout().write_all(words.as_bytes());
    // Generous: a debug build on a machine that does other things.
    assert!(again.took.as_secs() < 30, "{words}");
}

/// An Ethernet frame with a TCP SYN from 10.0.0.1 to another address.
fn syn(to: [u8; 4], port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    let mut header = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1];
    header.extend(to);
    let words = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xFFFF) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xFF, 0xFF, 0, 0, 0, 0]);
    frame
}

#[test]
fn the_programs_decide_by_what_was_applied() {
    let Some(mut node_) = Node::new("packets under a policy that is applied") else { return };
    node_.policy = Policy::load_to_run().unwrap();
    node_
        .apply(replace(&[entry("10.0.0.1", "a"), entry("10.0.0.2", "b"), entry("10.0.0.3", "a")]))
        .unwrap();
    let maps = &node_.policy.maps;
    let a = maps.number_of(&node_.lock, "a").unwrap();
    let name = name_digest("a", "10.0.0.1");
    let mac = [2, 0, 0, 0, 0, 1];
    let pod =
        Pod { since: 0, name, tenant: a, space: a, table: 0, limited: false, other_end: None, mac };
    assert!(maps.add_pod(1, &pod, &[ip("10.0.0.1")]).unwrap());
    let deny = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: a}
spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80, endPort: 81}]}]}
---
apiVersion: joey.io/v1
kind: NodePolicy
metadata: {name: n}
spec:
  services:
  - {name: s, addresses: [10.9.0.0/16], except: [10.9.1.0/24], ports: [any]}
  allow:
  - {from: a, to: b, ports: [81/tcp]}
";
    let services = documents(deny).0.split_off(1);
    let asked = [
        ([10, 0, 0, 2], 80),
        ([10, 0, 0, 2], 81),
        ([10, 0, 0, 3], 80),
        ([10, 0, 0, 3], 82),
        ([10, 9, 0, 1], 80),
        ([10, 9, 0, 1], 443),
        ([10, 9, 1, 1], 80),
        ([10, 8, 0, 1], 80),
    ];
    let both = [false, true, true, false, true, false, false, false];
    let without = [false, true, true, true, true, true, false, false];
    for (change, expected) in
        [(documents(deny), both), (Documents(services), without), (documents(deny), both)]
    {
        node_.apply(Change::Policy(change)).unwrap();
        for ((to, port), allowed) in asked.into_iter().zip(expected) {
            let outcome = node_.policy.run(Side::Vm, 1, &syn(to, port), 1).unwrap();
            assert_eq!(outcome.decision.is_ok(), allowed, "{to:?} {port}: {outcome:?}");
        }
    }
}
