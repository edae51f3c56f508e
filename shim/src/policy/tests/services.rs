//! Services before pods, and addresses that are several things.

use joey_ebpf::policy::abi::{Pod, Side, name_digest};
use joey_ebpf::policy::model::Attempt;

use super::super::entry::Entry;
use super::{compiled, documents, fed, ip, tables};

const CLUSTER: &str = r#"{"kind":"List","apiVersion":"v1","items":[
 {"kind":"Pod","metadata":{"name":"client","namespace":"a","labels":{"role":"client"}},
  "spec":{},"status":{"phase":"Running","podIP":"10.0.0.1"}},
 {"kind":"Pod","metadata":{"name":"web-1","namespace":"a","labels":{"app":"web","version":"1"}},
  "spec":{"containers":[{"ports":[{"name":"http","containerPort":8080}]}]},
  "status":{"phase":"Running","podIP":"10.0.0.2"}},
 {"kind":"Pod","metadata":{"name":"web-2","namespace":"a","labels":{"app":"web","version":"2"}},
  "spec":{"containers":[{"ports":[{"name":"http","containerPort":8081}]}]},
  "status":{"phase":"Running","podIP":"10.0.0.3"}},
 {"kind":"Service","metadata":{"name":"web","namespace":"a"},
  "spec":{"clusterIP":"10.96.0.1","selector":{"app":"web"},
   "ports":[{"port":80,"targetPort":"http"},{"port":90,"targetPort":9090}]}},
 {"kind":"Service","metadata":{"name":"empty","namespace":"a"},
  "spec":{"clusterIP":"10.96.0.2","selector":{"app":"none"},"ports":[{"port":80}]}},
 {"kind":"Service","metadata":{"name":"outside","namespace":"a"},
  "spec":{"clusterIP":"10.96.0.3","ports":[{"port":80}]}}
]}"#;

/// Which of these the client may open under a policy for its egress.
fn opens(rule: &str, asked: &[(&str, u16)]) -> Vec<bool> {
    let (entries, namespaces) = fed(CLUSTER);
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: n, namespace: a}}\n\
         spec: {{podSelector: {{matchLabels: {{role: client}}}}, policyTypes: [Egress], egress: [{rule}]}}\n"
    );
    let (compiled, names) = compiled(&documents(&text), &namespaces, &entries).unwrap();
    let tables = tables(&compiled);
    let pod = Pod {
        since: 0,
        name: name_digest("a", "client"),
        tenant: names["a"],
        space: names["a"],
        table: 0,
        limited: false,
        other_end: None,
        mac: [0; 6],
    };
    let may = |(remote, port): &(&str, u16)| {
        let (local, remote) = (ip("10.0.0.1"), ip(remote));
        let attempt = Attempt { local, remote, proto: 6, port: *port, opener: Side::Vm };
        tables.verdict(&pod, &attempt).is_ok()
    };
    asked.iter().map(may).collect()
}

/// A rule, what is asked, and the answers.
type Case<'a> = (String, &'a [(&'a str, u16)], &'a [bool]);

#[test]
fn a_service_is_the_pods_behind_it() {
    let (web, empty, outside) = ("10.96.0.1", "10.96.0.2", "10.96.0.3");
    let pods = "to: [{podSelector: {matchLabels: {app: web}}}]";
    let cases: [Case<'_>; 8] = [
        // All ports of all pods: all of the Service; one without pods is nobody.
        (
            format!("{{{pods}}}"),
            &[(web, 80), (web, 90), (empty, 80), (outside, 80)],
            &[true, true, false, false],
        ),
        // By the name: 8080 of one pod, 8081 of the other.
        (
            format!("{{{pods}, ports: [{{port: http}}]}}"),
            &[(web, 80), (web, 90), ("10.0.0.2", 8080), ("10.0.0.2", 8081), ("10.0.0.3", 8081)],
            &[true, false, true, false, true],
        ),
        // A number has to hold for every pod behind.
        (
            format!("{{{pods}, ports: [{{port: 8080}}]}}"),
            &[(web, 80), (web, 8080)],
            &[false, false],
        ),
        (format!("{{{pods}, ports: [{{port: 8080, endPort: 8081}}]}}"), &[(web, 80)], &[true]),
        (format!("{{{pods}, ports: [{{port: 9090}}]}}"), &[(web, 90), (web, 80)], &[true, false]),
        // One version only: the Service may lead to the other.
        (
            "{to: [{podSelector: {matchLabels: {version: '1'}}}]}".into(),
            &[(web, 80), ("10.0.0.2", 1), ("10.0.0.3", 1)],
            &[false, true, false],
        ),
        // Addresses are what they are, with the ports that packets have.
        (
            "{to: [{ipBlock: {cidr: 10.96.0.0/16}}], ports: [{port: 80}]}".into(),
            &[(web, 80), (outside, 80), (web, 90)],
            &[true, true, false],
        ),
        ("{ports: [{port: 80}]}".into(), &[(web, 80), (outside, 80)], &[true, true]),
    ];
    for (rule, asked, expected) in cases {
        assert_eq!(opens(&rule, asked), expected, "{rule}");
    }
}

#[test]
fn identities_that_say_nothing_or_too_much_are_refused() {
    let entry = |json: &str| -> Entry { serde_json::from_str(json).unwrap() };
    let refused =
        |entries: &[Entry]| compiled(&documents(""), &[], entries).unwrap_err().to_string();
    let a = entry(r#"{"address":"10.0.0.1","namespace":"a","name":"x"}"#);
    let b = entry(r#"{"address":"10.0.0.1","namespace":"b","name":"y"}"#);
    assert!(refused(&[a, b]).contains("a/x has this address, too"));
    for (json, words) in [
        (r#"{"address":"10.0.0.1"}"#, "tenant or namespace"),
        (r#"{"address":"10.0.0.1","namespace":"a","tenant":""}"#, "tenant = \"\""),
        (r#"{"address":"::ffff:10.0.0.1","namespace":"a"}"#, "write 10.0.0.1"),
        (r#"{"address":"0.0.0.0","namespace":"a"}"#, "one pod"),
        (r#"{"address":"ff02::1","namespace":"a"}"#, "one pod"),
    ] {
        let error = refused(&[entry(json)]);
        assert!(error.contains(words), "{json}: {error}");
    }
    let long = format!(r#"{{"address":"10.0.0.1","namespace":"{}"}}"#, "x".repeat(254));
    assert!(refused(&[entry(&long)]).contains("253"));
    assert!(serde_json::from_str::<Entry>(r#"{"address":"10.0.0.1","tenan":"a"}"#).is_err());
}
