//! One tenant's NetworkPolicies, wrong or too many, and everybody else.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::*;

const FINE: &str = "---\nkind: NetworkPolicy\napiVersion: networking.k8s.io/v1\n\
    metadata: {name: fine, namespace: good}\nspec: {podSelector: {}, ingress: [{}]}\n";
const WRONG: &str = "---\nkind: NetworkPolicy\napiVersion: networking.k8s.io/v1\n\
    metadata: {name: sctp, namespace: bad}\nspec:\n  podSelector: {matchLabels: {app: web}}\n  \
    ingress: [{ports: [{protocol: SCTP, port: 80}]}]\n";

#[test]
fn what_is_refused_isolates_its_own_pods_if_that_is_asked_for() {
    let mut documents = documents(&format!("{FINE}{WRONG}"));
    let refused = documents.check().unwrap_err().to_string();
    assert!(refused.contains("SCTP") && refused.contains("bad/sctp"), "{refused}");
    documents.isolate_refused();
    let checked = documents.check().unwrap();
    let [warning] = &checked.warnings[..] else { panic!("{:?}", checked.warnings) };
    assert!(warning.contains("SCTP") && warning.contains("isolated"), "{warning}");
    let [fine, closed] = &checked.networks[..] else { panic!("{:?}", checked.networks) };
    assert_eq!(fine.ingress.as_ref().map(Vec::len), Some(1));
    assert_eq!((&*closed.namespace, &*closed.name), ("bad", "sctp"));
    assert_eq!(closed.selector.to_string(), "app=web");
    assert_eq!(
        (closed.ingress.as_deref(), closed.egress.as_deref()),
        (Some(&[][..]), Some(&[][..]))
    );
    // What was applied is read again with each change of identities.
    let text = serde_json::to_string(&documents).unwrap();
    let again: Documents = serde_json::from_str(&text).unwrap();
    assert_eq!(again.check().unwrap().networks, checked.networks);
}

/// Of one namespace, each pod selected by a policy of its own that lists all of them, each with many ports.
fn many(count: u8) -> (String, Vec<Entry>) {
    let mut text = FINE.to_owned();
    let mut entries = Vec::new();
    for at in 0..count {
        let _ = write!(
            text,
            "---\nkind: NetworkPolicy\napiVersion: networking.k8s.io/v1\n\
             metadata: {{name: p{at}, namespace: greedy}}\nspec:\n  \
             podSelector: {{matchLabels: {{own: a{at}}}}}\n  ingress:\n"
        );
        for other in 0..count {
            let _ = writeln!(
                text,
                "  - {{from: [{{podSelector: {{matchLabels: {{own: a{other}}}}}}}], \
                 ports: [{{port: 1, endPort: 65534}}]}}"
            );
        }
        let address = Ipv4Addr::new(10, 9, 0, at);
        let labels = format!("{{\"own\":\"a{at}\"}}");
        let entry = format!(
            "{{\"address\":\"{address}\",\"namespace\":\"greedy\",\"name\":\"a{at}\",\"labels\":{labels}}}"
        );
        entries.push(serde_json::from_str(&entry).unwrap());
    }
    (text, entries)
}

#[test]
fn one_namespace_takes_no_more_than_its_share_of_the_rules() {
    let (text, entries) = many(60);
    let (compiled, _) = compiled(&documents(&text), &[], &entries).unwrap();
    let [warning] = &compiled.warnings[..] else { panic!("{:?}", compiled.warnings) };
    assert!(warning.contains("namespace greedy"), "{warning}");
    assert!(compiled.rules.len() < super::super::compile::MOST / 4, "{}", compiled.rules.len());
}
