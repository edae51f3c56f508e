//! What kubectl prints, and what others may send.

use super::super::entry::{Kind, PortRef, Protocol};
use super::super::feed::Feed;
use super::super::tenant::default_annotations;
use super::{fed, ip};

const PODS: &str = r#"{"apiVersion":"v1","kind":"List","metadata":{"resourceVersion":""},"items":[
 {"apiVersion":"v1","kind":"Pod",
  "metadata":{"name":"web","namespace":"a","uid":"u","labels":{"app":"web"},"annotations":null,
   "creationTimestamp":"2026-01-02T00:00:00Z","managedFields":[{"manager":"kubelet"}]},
  "spec":{"nodeName":"n","containers":[{"name":"c","image":"i","ports":[
    {"name":"http","containerPort":8080,"protocol":"TCP"},{"containerPort":9090},
    {"name":"dns","containerPort":53,"protocol":"UDP"}]}],
   "initContainers":[{"name":"once","ports":[{"name":"gone","containerPort":1}]},
    {"name":"sidecar","restartPolicy":"Always","ports":[{"name":"metrics","containerPort":9}]}]},
  "status":{"phase":"Running","podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"},{"ip":"fd00::1"}]}},
 {"kind":"Pod","metadata":{"name":"vc","namespace":"vc-1-a","annotations":
   {"tenancy.x-k8s.io/cluster":"vc-1","tenancy.x-k8s.io/namespace":"a"}},
  "spec":{},"status":{"phase":"Pending","podIP":"10.0.0.2"}},
 {"kind":"Pod","metadata":{"name":"red","namespace":"b","annotations":{"io.joey.tenant":"red"}},
  "spec":{},"status":{"phase":"Running","podIPs":[{"ip":"10.0.0.3"}]}},
 {"kind":"Pod","metadata":{"name":"done","namespace":"a"},"spec":{},
  "status":{"phase":"Succeeded","podIP":"10.0.0.4"}},
 {"kind":"Pod","metadata":{"name":"bad","namespace":"a"},"spec":{},
  "status":{"phase":"Failed","podIP":"10.0.0.5"}},
 {"kind":"Pod","metadata":{"name":"host","namespace":"a"},"spec":{"hostNetwork":true},
  "status":{"phase":"Running","podIP":"192.168.0.1"}},
 {"kind":"Pod","metadata":{"name":"waiting","namespace":"a"},"spec":{},"status":{"phase":"Pending"}},
 {"kind":"Service","metadata":{"name":"web","namespace":"a"},
  "spec":{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1","fd01::1"],"selector":{"app":"web"},
   "ports":[{"port":80,"targetPort":"http","protocol":"TCP"},{"port":443}]}},
 {"kind":"Service","metadata":{"name":"headless","namespace":"a"},
  "spec":{"clusterIP":"None","clusterIPs":["None"],"selector":{"app":"web"}}},
 {"kind":"Service","metadata":{"name":"out","namespace":"a"},
  "spec":{"type":"ExternalName","externalName":"example.com"}},
 {"kind":"Namespace","metadata":{"name":"a","labels":{"team":"x"}},"spec":{"finalizers":["kubernetes"]},
  "status":{"phase":"Active"}},
 {"kind":"ConfigMap","metadata":{"name":"other","namespace":"a"}}
]}"#;

#[test]
fn what_kubectl_prints_is_understood() {
    let (entries, namespaces) = fed(PODS);
    let addresses: Vec<String> = entries.iter().map(|entry| entry.address.to_string()).collect();
    let expected = ["10.0.0.1", "fd00::1", "10.0.0.2", "10.0.0.3", "10.96.0.1", "fd01::1"];
    assert_eq!(addresses, expected);
    let tenants: Vec<&str> = entries.iter().map(|entry| entry.tenant()).collect();
    assert_eq!(tenants, ["a", "a", "vc-1", "red", "a", "a"]);
    let ports: Vec<(&str, Protocol, u16)> =
        entries[0].ports.iter().map(|port| (&*port.name, port.protocol, port.port)).collect();
    let expected =
        [("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 53), ("metrics", Protocol::Tcp, 9)];
    assert_eq!(ports, expected);
    let service = &entries[4];
    assert_eq!(service.kind, Kind::Service);
    assert_eq!(service.labels["app"], "web");
    assert_eq!(service.targets[0].target, PortRef::Name("http".into()));
    assert_eq!(service.targets[1].target, PortRef::Number(443));
    assert_eq!(namespaces.len(), 1);
    assert_eq!(namespaces[0].labels["team"], "x");
}

#[test]
fn annotations_that_are_not_trusted_say_nothing() {
    let mut feed = Feed::default();
    feed.read("feed", PODS).unwrap();
    let (entries, _) = feed.finish(&[]).unwrap();
    assert_eq!(entries[2].tenant(), "vc-1-a");
    assert_eq!(entries[3].tenant(), "b");
}

#[test]
fn a_tenant_that_cannot_be_one_stops_nobody_else() {
    let pod = |at: u8, tenant: &str| {
        let annotations = serde_json::json!({"io.joey.tenant": tenant});
        serde_json::json!({
            "kind": "Pod", "metadata": {"name": "p", "namespace": "a", "annotations": annotations},
            "spec": {}, "status": {"phase": "Running", "podIP": format!("10.0.0.{at}")},
        })
    };
    let pods = [pod(1, " "), pod(2, &"x".repeat(300)), pod(3, "a\nb"), pod(4, "fine")];
    let (entries, _) = fed(&pods.map(|pod| pod.to_string()).join("\n"));
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].tenant(), "fine");
}

#[test]
fn the_newest_pod_has_the_address() {
    let pod = |name: &str, made: &str, going: bool| {
        let going = if going { r#","deletionTimestamp":"2026-02-01T00:00:00Z""# } else { "" };
        format!(
            r#"{{"kind":"Pod","metadata":{{"name":"{name}","namespace":"a","creationTimestamp":"{made}"{going}}},
            "spec":{{}},"status":{{"phase":"Running","podIP":"10.0.0.1"}}}}"#
        )
    };
    let of = |pods: [String; 2]| fed(&pods.join("\n")).0.remove(0).name;
    let (old, new) =
        (pod("old", "2026-01-01T00:00:00Z", false), pod("new", "2026-01-02T00:00:00Z", false));
    assert_eq!(of([old.clone(), new.clone()]), "new");
    assert_eq!(of([new.clone(), old.clone()]), "new");
    // One that goes has lost it, however young it is.
    let going = pod("going", "2026-01-03T00:00:00Z", true);
    assert_eq!(of([going.clone(), old.clone()]), "old");
    assert_eq!(of([old, going]), "old");
}

#[test]
fn plain_lists_and_yaml_are_understood() {
    let plain = r#"[{"address":"fd00::7","tenant":"t"},{"address":"10.0.0.7","namespace":"n"}]"#;
    assert_eq!(fed(plain).0[1].tenant(), "n");
    let object =
        format!(r#"{{"entries":{plain},"namespaces":[{{"name":"n","labels":{{"a":"b"}}}}]}}"#);
    let (entries, namespaces) = fed(&object);
    assert_eq!((entries.len(), namespaces.len()), (2, 1));
    let yaml = "- address: fd00::7\n  tenant: t\n---\nkind: Pod\nmetadata: {name: p, namespace: y}\nspec: {}\n\
                status: {phase: Running, podIP: 10.0.0.9}\n";
    let (entries, _) = fed(yaml);
    assert_eq!(entries[0].address, ip("fd00::7"));
    assert_eq!(entries[1].tenant(), "y");
}

#[test]
fn hostile_feeds_are_refused() {
    let cases = [
        (
            r#"{"kind":"Pod","metadata":{"name":"p","namespace":"a"},"spec":{},"status":{"podIP":"10.0.0"}}"#,
            "a/p: status.podIPs = \"10.0.0\"",
        ),
        (r#"{"kind":"Pod","metadata":{"labels":[]}}"#, "invalid type"),
        (r#"{"kind":"Pod","spec":{"containers":[{"ports":[{"containerPort":99999}]}]}}"#, "99999"),
        (r#"{"kind":"Pod""#, "EOF"),
        (r#"{"kind":"Pod"} {"#, "EOF"),
        (r#"{}"#, "must be Pod, Service, Namespace"),
        (r#"{"entrys":[]}"#, "must be Pod, Service, Namespace"),
        (r#"{"entries":[{"address":"10.0.0.1","x":1}]}"#, "unknown field `x`"),
        (r#"[{"address":"10.0.0.1/8","tenant":"t"}]"#, "invalid IP"),
        ("text", "feed"),
    ];
    for (text, words) in cases {
        let mut feed = Feed::default();
        let read = feed.read("feed", text);
        let error =
            read.and_then(|()| feed.finish(&default_annotations())).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(Feed::default().read("feed", &deep).is_err());
    let deep = format!("{{\"kind\":\"List\",\"items\":{deep}}}");
    assert!(Feed::default().read("feed", &deep).is_err());
}
