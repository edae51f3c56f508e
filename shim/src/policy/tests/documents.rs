//! Documents that are read and those that are refused, with what the refusal says.

use super::super::document::Documents;
use super::super::network_policy::{Peer, Spaces, Which};

fn refused(text: &str) -> String {
    let mut documents = Documents::default();
    match documents.read("f.yaml", text).and_then(|()| documents.check()) {
        Ok(checked) => panic!("{text}: {checked:?}"),
        Err(error) => error.to_string(),
    }
}

fn network(spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: n, namespace: a}}\nspec: {spec}\n"
    )
}

#[test]
fn the_example_of_the_kubernetes_documentation() {
    let text = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: test-network-policy
  namespace: default
  annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}
  creationTimestamp: \"2026-01-01T00:00:00Z\"
spec:
  podSelector:
    matchLabels:
      role: db
  policyTypes:
  - Ingress
  - Egress
  ingress:
  - from:
    - ipBlock:
        cidr: 172.17.0.0/16
        except:
        - 172.17.1.0/24
    - namespaceSelector:
        matchLabels:
          project: myproject
    - podSelector:
        matchLabels:
          role: frontend
    ports:
    - protocol: TCP
      port: 6379
  egress:
  - to:
    - ipBlock:
        cidr: 10.0.0.0/24
    ports:
    - protocol: TCP
      port: 5978
      endPort: 6000
status: {}
";
    let mut documents = Documents::default();
    documents.read("f.yaml", text).unwrap();
    let checked = documents.check().unwrap();
    let policy = &checked.networks[0];
    let (ingress, egress) = (policy.ingress.as_ref().unwrap(), policy.egress.as_ref().unwrap());
    let peers = ingress[0].peers.as_ref().unwrap();
    assert!(matches!(&peers[0], Peer::Block { except, .. } if except.len() == 1));
    assert!(matches!(&peers[1], Peer::Pods(Spaces::Matching(_), _)));
    assert!(matches!(&peers[2], Peer::Pods(Spaces::Own(space), _) if space == "default"));
    assert_eq!(egress[0].ports.as_ref().unwrap()[0].which, Which::Range(5978, 6000));
}

#[test]
fn policy_types_default_as_the_api_server_sets_them() {
    let types = |spec: &str| {
        let mut documents = Documents::default();
        documents.read("f.yaml", &network(spec)).unwrap();
        let policy = documents.check().unwrap().networks.remove(0);
        (policy.ingress.is_some(), policy.egress.is_some())
    };
    assert_eq!(types("{podSelector: {}}"), (true, false));
    assert_eq!(types("{podSelector: {}, egress: []}"), (true, false));
    assert_eq!(types("{podSelector: {}, egress: [{}]}"), (true, true));
    assert_eq!(types("{podSelector: {}, policyTypes: [], egress: [{}]}"), (true, true));
    assert_eq!(types("{podSelector: {}, policyTypes: [Egress]}"), (false, true));
    assert_eq!(types("{podSelector: null, policyTypes: [Egress], ingress: [{}]}"), (false, true));
    assert_eq!(types("{policyTypes: [Ingress], egress: [{}]}"), (true, false));
}

#[test]
fn lists_json_and_many_documents_are_read() {
    let one = |name: &str| {
        format!(
            r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"{name}"}},"spec":{{"podSelector":{{}}}}}}"#
        )
    };
    let bare = |name: &str| format!(r#"{{"metadata":{{"name":"{name}"}},"spec":{{}}}}"#);
    let mut documents = Documents::default();
    let list =
        format!(r#"{{"apiVersion":"v1","kind":"List","items":[{},{}]}}"#, one("a"), one("b"));
    documents.read("list.json", &list).unwrap();
    let typed = format!(
        r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicyList","metadata":{{}},"items":[{}]}}"#,
        bare("c")
    );
    documents.read("typed.json", &typed).unwrap();
    let space = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: y}}\n";
    documents
        .read("many.yaml", &format!("---\n{}\n---\n---\n# none\n---\n{space}", one("d")))
        .unwrap();
    let checked = documents.check().unwrap();
    assert_eq!(checked.networks.len(), 4);
    assert_eq!(checked.namespaces.len(), 1);
    assert_eq!(documents.0[1].source, "list.json#2");
    let mut empty = Documents::default();
    empty.read("x", "apiVersion: v1\nkind: List\nitems: []").unwrap();
    assert!(empty.0.is_empty());
}

#[test]
fn refusals_name_document_field_value_and_what_would_be_right() {
    let rule = |rule: &str| network(&format!("{{podSelector: {{}}, ingress: [{rule}]}}"));
    let cases = [
        (network("{podSelektor: {}}"), "spec.podSelektor"),
        (network("{podSelector: {matchLabels: {a: 1}}}"), "spec.podSelector.matchLabels.a"),
        (network("{podSelector: {}, policyTypes: [ingress]}"), "spec.policyTypes[0] = \"ingress\""),
        (rule("{form: []}"), "spec.ingress[0].form"),
        (rule("{to: []}"), "spec.ingress[0].to"),
        (rule("{from: [{}]}"), "spec.ingress[0].from[0]"),
        (rule("{from: [null]}"), "spec.ingress[0].from[0]"),
        (rule("{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}"), "peers of their own"),
        (rule("{from: [{ipBlock: {cidr: 10.0.0.1}}]}"), "prefix length"),
        (rule("{from: [{ipBlock: {cidr: 10.0.0.1/8}}]}"), "10.0.0.0/8 is the whole prefix"),
        (
            rule("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}"),
            "ipBlock.except[0]",
        ),
        (rule("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}"), "not all of it"),
        (
            rule("{ports: [{protocol: SCTP, port: 1}]}"),
            "ports[0].protocol = \"SCTP\": is not supported",
        ),
        (rule("{ports: [{protocol: tcp}]}"), "must be TCP or UDP"),
        (rule("{ports: [{port: 0}]}"), "must be 1 to 65535"),
        (rule("{ports: [{port: 65536}]}"), "spec.ingress[0].ports[0].port"),
        (rule("{ports: [{port: -1}]}"), "spec.ingress[0].ports[0].port"),
        (rule("{ports: [{port: '80'}]}"), "must be a number, or a port's name"),
        (rule("{ports: [{port: UPPER}]}"), "must be a number, or a port's name"),
        (rule("{ports: [{port: much-too-long-name}]}"), "1 to 15"),
        (rule("{ports: [{endPort: 80}]}"), "with port"),
        (rule("{ports: [{port: http, endPort: 80}]}"), "with a number"),
        (rule("{ports: [{port: 80, endPort: 79}]}"), "not be below"),
        (
            network("{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}"),
            "spec.podSelector.matchExpressions[0].operator = \"in\"",
        ),
        (network("{podSelector: {}}").replace("name: n", "name: ''"), "metadata.name"),
        (network("null"), "spec"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: p}".into(), "joey.io/v1 NodePolicy"),
        (
            "apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\nmetadata: {name: p}"
                .into(),
            "networking.k8s.io/v1beta1",
        ),
        ("just text".into(), "f.yaml"),
        ("[1, 2]".into(), "f.yaml"),
    ];
    for (text, words) in cases {
        let error = refused(&text);
        assert!(error.contains(words) && error.contains("f.yaml#1"), "{text}: {error}");
    }
    let twice = format!("{}---\n{}", network("{}"), network("{}"));
    assert!(refused(&twice).contains("same object"));
}

#[test]
fn hostile_files_are_refused_in_time() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for at in 1..12 {
        let refs = vec![format!("*a{}", at - 1); 10].join(", ");
        bomb.push_str(&format!("a{at}: &a{at} [{refs}]\n"));
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let indented: String = (0..2000).map(|at| format!("{}a:\n", " ".repeat(at))).collect();
    let cases = [
        ("an anchor bomb", bomb),
        ("deep flow", deep),
        ("deep blocks", indented),
        ("itself", "a: &a [*a]".to_owned()),
        ("tabs", "a:\n\t- b".to_owned()),
        ("many documents", "---\na: 1\n".repeat(100_000)),
        ("many anchors", (0..5000).map(|at| format!("- &x{at} y\n")).collect()),
        ("a large file", " ".repeat(super::super::document::MOST_BYTES + 1)),
        (
            "a key twice",
            "apiVersion: v1\nkind: Namespace\nkind: Namespace\nmetadata: {name: a}".to_owned(),
        ),
        ("no UTF-8 there is", "\u{0}\u{1}".to_owned()),
        ("half JSON", "{\"a\": [1, 2".to_owned()),
    ];
    for (what, text) in cases {
        let begun = std::time::Instant::now();
        let error = refused(&text);
        assert!(error.contains("f.yaml"), "{what}: {error}");
        assert!(error.len() < 2000, "{what}: {} bytes of error", error.len());
        assert!(begun.elapsed().as_secs() < 10, "{what}: {:?}", begun.elapsed());
    }
}

#[test]
fn the_examples_are_policies() {
    let mut documents = Documents::default();
    for (name, text) in [
        ("node.yaml", include_str!("../../../../docs/examples/policy/node.yaml")),
        (
            "network-policies.yaml",
            include_str!("../../../../docs/examples/policy/network-policies.yaml"),
        ),
    ] {
        documents.read(name, text).unwrap();
    }
    let checked = documents.check().unwrap();
    assert_eq!(checked.node.unwrap().services.len(), 4);
    assert_eq!(checked.networks.len(), 4);
}
