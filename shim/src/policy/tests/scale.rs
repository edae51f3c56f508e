//! A large cluster.

use std::io::Write as _;
use std::time::Instant;

use serde_json::json;

use super::super::document::{Document, Documents};
use super::super::entry::{Entry, Kind, NamedPort, Protocol};
use super::compiled;

pub(super) fn pods(count: usize, spaces: usize) -> Vec<Entry> {
    let pod = |at: usize| {
        let space = at % spaces;
        let labels = [
            ("app", format!("app-{}", at / spaces % 20)),
            ("pod-template-hash", format!("{:x}", at / spaces % 40)),
            ("statefulset.kubernetes.io/pod-name", format!("pod-{at}")),
        ];
        Entry {
            address: std::net::Ipv4Addr::from_bits(0x0A00_0000 + at as u32).into(),
            tenant: None,
            namespace: format!("space-{space}"),
            name: format!("pod-{at}"),
            kind: Kind::Pod,
            labels: labels.map(|(key, value)| (key.to_owned(), value)).into(),
            ports: vec![NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
            targets: Vec::new(),
        }
    };
    (1..=count).map(pod).collect()
}

pub(super) fn networks(count: usize, spaces: usize) -> Documents {
    let network = |at: usize| {
        let space = format!("space-{}", at % spaces);
        let app = |n: usize| json!({"matchLabels": {"app": format!("app-{}", n % 20)}});
        let object = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("n{at}"), "namespace": space},
            "spec": {
                "podSelector": app(at / spaces), "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"from": [{"podSelector": app(at / spaces + 1)}], "ports": [{"port": "http"}]},
                    {"from": [{"namespaceSelector": {"matchExpressions": [{
                        "key": "kubernetes.io/metadata.name", "operator": "In",
                        "values": [format!("space-{}", (at + 1) % spaces)]}]}}]},
                    {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [format!("10.0.{}.0/24", at % 40)]}}],
                     "ports": [{"port": 9000, "endPort": 9100}]},
                ],
                "egress": [{"to": [{"podSelector": {}}]}, {"ports": [{"port": 53, "protocol": "UDP"}]}],
            },
        });
        Document { source: "scale".into(), object, isolates: false }
    };
    Documents((0..count).map(network).collect())
}

#[test]
fn a_large_cluster_is_compiled_in_a_moment() {
    let (pods, networks) = (pods(10_000, 50), networks(200, 50));
    let begun = Instant::now();
    let (compiled, _) = compiled(&networks, &[], &pods).unwrap();
    let took = begun.elapsed();
    let figures = format!(
        "10,000 pods, 200 NetworkPolicies: {} identities, {} rules, {} groups in {took:?}",
        compiled.identities.len(),
        compiled.rules.len(),
        compiled.meaning.groups.len(),
    );
    let _ = writeln!(std::io::stdout(), "{figures}");
    assert!(compiled.identities.len() >= 10_000);
    // Generous: a debug build on a machine that does other things.
    assert!(took.as_secs() < 20, "{took:?}");
}

#[test]
fn what_does_not_fit_is_told_with_who_it_is_of() {
    let pods = pods(20_000, 2);
    let mut networks = networks(2, 2);
    // Every pod its own ports, every port a rule of its own: what no group can hold together.
    let ports: Vec<_> = (0..300).map(|at| json!({"port": 2 * at + 1})).collect();
    let peers: Vec<_> = (0..20_000)
        .map(|at| {
            json!({"podSelector": {"matchLabels": {
            "statefulset.kubernetes.io/pod-name": format!("pod-{at}")}}})
        })
        .collect();
    networks.0[0].object["spec"]["ingress"] = json!([{"from": peers, "ports": ports}]);
    let (compiled, _) = compiled(&networks, &[], &pods).unwrap();
    let [warning] = &compiled.warnings[..] else { panic!("{:?}", compiled.warnings) };
    assert!(warning.contains("space-0"), "{warning}");
}
