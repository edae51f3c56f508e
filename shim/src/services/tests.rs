//! Documents, views, logs and what guests make of them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use joey_protocol::services::{Backend, Key};

use super::Shared;
use super::compile::{View, views};
use super::document::{Endpoint, Port, Request, Service, Services};
use super::feed::Feed;
use super::keeper::{self, Change, Keeper};
use super::log::{self, Reader, SHARED};
use super::table::{Replay, Table};
use crate::policy::entry::Protocol;

fn endpoint(address: &str, port: u16) -> Endpoint {
    let address = address.parse().unwrap();
    Endpoint { address, port, ready: true, serving: None, terminating: false }
}

/// A service with one port, 80, and endpoints at port 8080.
fn service(id: &str, address: &str, endpoints: &[&str]) -> Service {
    let (namespace, name) = id.split_once('/').unwrap();
    let endpoints = endpoints.iter().map(|address| endpoint(address, 8080)).collect();
    Service {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        tenant: None,
        addresses: vec![address.parse().unwrap()],
        affinity_seconds: None,
        ports: vec![Port { name: String::new(), protocol: Protocol::Tcp, port: 80, endpoints }],
    }
}

fn replace(services: &[Service]) -> Request {
    Request { replace: Some(services.to_vec()), ..Request::default() }
}

fn put(services: &[Service]) -> Request {
    Request { put: services.to_vec(), ..Request::default() }
}

fn refused(services: &[Service]) -> String {
    let mut all = Services::new();
    let made = replace(services).apply(&mut all);
    let refused = made.and_then(|()| views(&all, &Shared::default()).map(drop)).unwrap_err();
    assert!(matches!(replace(&[]).apply(&mut all), Ok(())));
    refused.to_string()
}

#[test]
fn what_is_no_service_is_refused_by_field_and_value() {
    let good = || service("a/web", "10.96.0.1", &["10.0.0.1"]);
    let with = |change: fn(&mut Service)| {
        let mut service = good();
        change(&mut service);
        refused(&[service])
    };
    type Case = (fn(&mut Service), &'static str);
    let cases: [Case; 14] = [
        (|it| it.name.clear(), "service a/: name = \"\""),
        (|it| it.namespace = "a/b".into(), "namespace = \"a/b\""),
        (|it| it.tenant = Some(" x".into()), "tenant = \" x\""),
        (|it| it.addresses.clear(), "addresses = \"[]\""),
        (|it| it.addresses.push(it.addresses[0]), "addresses[1] = \"10.96.0.1\": is there twice"),
        (|it| it.addresses[0] = "0.0.0.0".parse().unwrap(), "addresses[0] = \"0.0.0.0\""),
        (|it| it.addresses[0] = "ff02::1".parse().unwrap(), "addresses[0] = \"ff02::1\""),
        (|it| it.addresses[0] = "::ffff:1.2.3.4".parse().unwrap(), "no IPv4 address within"),
        (|it| it.affinity_seconds = Some(0), "affinity_seconds = \"0\": must be 1 to 86400"),
        (|it| it.ports[0].port = 0, "ports[0].port = \"0\""),
        (|it| it.ports[0].protocol = Protocol::Sctp, "ports[0].protocol = \"SCTP\""),
        (|it| it.ports.push(it.ports[0].clone()), "ports[1].port = \"80\": is there twice"),
        (|it| it.ports[0].endpoints[0].port = 0, "ports[0].endpoints[0].port"),
        (
            |it| it.ports[0].endpoints[0].address = "127.0.0.1".parse().unwrap(),
            "endpoints[0].address = \"127.0.0.1\"",
        ),
    ];
    for (change, words) in cases {
        let error = with(change);
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(refused(&[good(), good()]).contains("service a/web"));
    let other = service("a/other", "10.96.0.1", &[]);
    let error = refused(&[good(), other]);
    assert!(error.contains("port 80 is service a/other's already"), "{error}");
    for (json, words) in [
        (r#"{"puts": []}"#, "unknown field"),
        (r#"{"put": [{"namespace": "a"}]}"#, "missing field"),
        ("[7]", "invalid type"),
    ] {
        let error = serde_json::from_str::<Request>(json).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for request in [Request::default(), Request { remove: vec!["a/b".into()], ..replace(&[]) }] {
        assert!(request.apply(&mut Services::new()).is_err());
    }
}

#[test]
fn two_tenants_may_have_one_address_and_more_than_fits_is_refused() {
    let (a, b) = (service("a/x", "10.96.0.1", &[]), service("b/x", "10.96.0.1", &[]));
    let mut services = Services::new();
    replace(&[a, b]).apply(&mut services).unwrap();
    assert_eq!(views(&services, &Shared::default()).unwrap().tenants.len(), 2);
    // What all see must go with what each has.
    let shared = Shared::new("sharedServices", vec!["b/*".into()]).unwrap();
    assert!(views(&services, &shared).is_err());
    let mut large = service("a/x", "10.96.0.1", &[]);
    let address = |n: u32| std::net::IpAddr::from(n.to_be_bytes());
    large.ports[0].endpoints = (0..70_000)
        .map(|n| Endpoint { address: address(0x0a00_0000 + n), ..endpoint("10.0.0.1", 1) })
        .collect();
    let mut other = Service { addresses: vec!["10.96.0.2".parse().unwrap()], ..large.clone() };
    other.name = "y".into();
    let error = refused(&[large, other]);
    let words = "endpoints of services in a guest: 140000 are needed and 131072 fit; most of them are of tenant a";
    assert!(error.contains(words), "{error}");
}

fn seen(services: &[Service], shared: &[&str], tenant: &str) -> Vec<String> {
    let mut all = Services::new();
    replace(services).apply(&mut all).unwrap();
    let shared = shared.iter().map(|name| (*name).to_owned()).collect();
    let views = views(&all, &Shared::new("x", shared).unwrap()).unwrap();
    let view = views.tenants.get(tenant).unwrap_or(&views.shared);
    view.keys().map(|key| key.address.to_string()).collect()
}

#[test]
fn a_tenant_sees_its_own_and_what_is_shared() {
    let mut lent = service("c/lent", "10.96.0.4", &[]);
    lent.tenant = Some("a".into());
    let all = [
        service("a/web", "10.96.0.1", &[]),
        service("b/web", "10.96.0.2", &[]),
        service("kube-system/kube-dns", "10.96.0.3", &[]),
        lent,
    ];
    let of = |shared: &[&str], tenant| seen(&all, shared, tenant).join(" ");
    assert_eq!(of(&[], "a"), "10.96.0.1 10.96.0.4");
    assert_eq!(of(&["kube-system/kube-dns"], "a"), "10.96.0.1 10.96.0.3 10.96.0.4");
    assert_eq!(of(&["kube-system/*"], "b"), "10.96.0.2 10.96.0.3");
    assert_eq!(of(&["kube-system/other"], "b"), "10.96.0.2");
    assert_eq!(of(&["kube-system/*"], "nobody"), "10.96.0.3");
    assert_eq!(of(&[], "nobody"), "");
}

#[test]
fn endpoints_are_those_that_take_connections() {
    let with = |states: &[(bool, Option<bool>, bool)]| {
        let mut service = service("a/web", "10.96.0.1", &[]);
        let all = states.iter().zip(1..).map(|((ready, serving, terminating), n)| Endpoint {
            address: [10, 0, 0, n].into(),
            port: 1,
            ready: *ready,
            serving: *serving,
            terminating: *terminating,
        });
        service.ports[0].endpoints = all.collect();
        let usable = service.ports[0].usable().map(|it| it.address.to_string());
        usable.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(with(&[(true, None, false), (false, None, false)]), "10.0.0.1");
    assert_eq!(with(&[(true, None, false), (false, Some(true), true)]), "10.0.0.1");
    // Nobody is ready: who still answers.
    assert_eq!(with(&[(false, Some(true), true), (false, Some(false), true)]), "10.0.0.1");
    assert_eq!(with(&[(false, Some(true), false), (false, None, true)]), "");
}

#[test]
fn kubectls_objects_are_read() {
    let list = serde_json::json!({"kind": "List", "items": [
        {"kind": "Service", "metadata": {"name": "dns", "namespace": "kube-system"}, "spec": {
            "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd96::a"],
            "sessionAffinity": "ClientIP",
            "ports": [
                {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 53},
                {"name": "metrics", "port": 9153, "targetPort": "metrics"},
                {"name": "sctp", "protocol": "SCTP", "port": 1},
            ]}},
        {"kind": "Service", "metadata": {"name": "headless", "namespace": "a"},
            "spec": {"clusterIP": "None", "ports": [{"port": 80}]}},
        {"kind": "Service", "metadata": {"name": "ext", "namespace": "a"},
            "spec": {"type": "ExternalName", "externalName": "example.org"}},
        {"kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "dns-1", "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "dns"}},
            "endpoints": [
                {"addresses": ["10.1.0.5"], "conditions": {"ready": true, "serving": true}},
                {"addresses": ["10.1.0.6"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.1.0.7"]},
            ],
            "ports": [{"name": "dns", "protocol": "UDP", "port": 1053},
                {"name": "metrics", "protocol": "TCP", "port": 9999}]},
        {"kind": "EndpointSlice", "addressType": "IPv6",
            "metadata": {"name": "dns-2", "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "dns"}},
            "endpoints": [{"addresses": ["fd00::5"], "conditions": {}}],
            "ports": [{"name": "dns", "protocol": "UDP", "port": 1054}]},
    ]});
    let read = |text: &str| -> Result<_, _> {
        let mut feed = Feed::default();
        feed.read("x", text)?;
        feed.finish(&[])
    };
    let services = read(&list.to_string()).unwrap();
    assert_eq!(services.len(), 1);
    let dns = &services[0];
    assert_eq!((dns.id().as_str(), dns.affinity_seconds), ("kube-system/dns", Some(10_800)));
    let found = dns.ports.iter().map(|it| (it.name.as_str(), it.endpoints.len()));
    assert_eq!(found.collect::<Vec<_>>(), [("dns", 4), ("metrics", 3)]);
    assert_eq!(dns.ports[0].endpoints[3].port, 1054);
    assert_eq!(dns.ports[0].endpoints[1].serving, Some(true));
    dns.check().unwrap();
    // As it is shown, so it is read.
    assert_eq!(read(&serde_json::to_string(&services).unwrap()).unwrap(), services);
    for (text, words) in
        [("{}", "kind"), ("[7]", "invalid type"), ("{\"kind\":", "EOF"), ("key: [", "x")]
    {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

/// A view of services with these endpoints, by the last byte of their address.
fn view(fronts: &[(u8, &[u8])]) -> View {
    let text = |n: &u8| format!("10.0.0.{n}");
    let services: Vec<Service> = fronts
        .iter()
        .map(|(n, backends)| {
            let backends: Vec<String> = backends.iter().map(text).collect();
            let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
            service(&format!("a/s{n}"), &format!("10.96.0.{n}"), &backends)
        })
        .collect();
    let mut all = Services::new();
    replace(&services).apply(&mut all).unwrap();
    views(&all, &Shared::default()).unwrap().tenants.remove("a").unwrap_or_default()
}

fn contents(table: &Table) -> BTreeMap<Key, Vec<Backend>> {
    table.entries().map(|(key, _, backends)| (key, backends.to_vec())).collect()
}

fn wanted(view: &View) -> BTreeMap<Key, Vec<Backend>> {
    view.iter().map(|(key, wanted)| (*key, wanted.backends.clone())).collect()
}

#[test]
fn records_lead_from_table_to_table() {
    let (mut table, base) = Table::base(1, &view(&[(1, &[1, 2]), (2, &[])]));
    let mut replay = Replay::default();
    replay.add(&base).unwrap();
    assert!(table.clone().advance(2, &view(&[(1, &[2, 1]), (2, &[])])).is_none(), "nothing new");
    let mut state = 7_u64;
    let mut random = |below: u64| {
        // Knuth's MMIX.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut bases, mut changes) = (0, 0);
    for generation in 2..600 {
        let fronts: Vec<(u8, Vec<u8>)> = (1..=u8::try_from(random(12)).unwrap())
            .map(|n| (n, (0..random(60)).map(|_| u8::try_from(1 + random(250)).unwrap()).collect()))
            .collect();
        let fronts: Vec<(u8, &[u8])> = fronts.iter().map(|(n, all)| (*n, all.as_slice())).collect();
        let view = view(&fronts);
        let Some(record) = table.advance(generation, &view) else { continue };
        if record.is_base() {
            bases += 1
        } else {
            changes += 1
        }
        replay.add(&record).unwrap();
        assert_eq!(contents(&table), wanted(&view));
        let read = replay.table().unwrap();
        assert_eq!(contents(&read), contents(&table), "generation {generation}");
        if random(20) == 0 {
            table = read;
        }
    }
    assert!(bases > 0 && changes > 100, "{bases} bases, {changes} changes");
}

/// What the tenant `a` reads.
fn log_of_a(run_dir: &Path) -> std::path::PathBuf {
    log::directory(run_dir).join(log::name("a"))
}

fn records(path: &Path) -> Vec<u64> {
    let mut reader = Reader::open(path).unwrap();
    std::iter::from_fn(|| reader.take().unwrap()).map(|record| record.generation).collect()
}

struct Rig {
    run: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { run: tempfile::tempdir().unwrap(), state: tempfile::tempdir().unwrap() }
    }

    fn keeper(&self) -> Keeper {
        Keeper::new(self.run.path(), self.state.path())
    }

    fn sees(&self, tenant: &str) -> Vec<String> {
        let (_, table) = keeper::read(self.run.path(), tenant).unwrap();
        table.entries().map(|(key, _, all)| format!("{} {}", key.address, all.len())).collect()
    }
}

#[test]
fn logs_follow_changes_and_a_keeper_goes_on_where_another_was() {
    let rig = Rig::new();
    let mut keeper = rig.keeper();
    assert_eq!(keeper.apply(&Change::Restore).unwrap().generation, 0);
    assert!(keeper::read(rig.run.path(), "a").is_err(), "nobody has told of any services");
    let web = |endpoints: &[&str]| service("a/web", "10.96.0.1", endpoints);
    let change = |services: &[Service]| Change::Services(replace(services));
    let more = |services: &[Service]| Change::Services(put(services));
    let db = service("b/db", "10.96.0.2", &["10.0.1.1"]);
    let applied = keeper.apply(&change(&[web(&["10.0.0.1"]), db.clone()])).unwrap();
    assert_eq!((applied.generation, applied.services, applied.logs), (1, 2, 3));
    assert_eq!(rig.sees("a"), ["10.96.0.1 1"]);
    assert_eq!(rig.sees("b"), ["10.96.0.2 1"]);
    assert!(rig.sees("c").is_empty());
    let applied = keeper.apply(&more(&[web(&["10.0.0.1", "10.0.0.2"])])).unwrap();
    assert_eq!((applied.generation, applied.logs), (2, 1), "another tenant's log stays as it is");
    // Another writer goes on in the same file, and the first notices.
    let before = fs::metadata(log_of_a(rig.run.path())).unwrap().len();
    rig.keeper().apply(&more(&[web(&["10.0.0.3"])])).unwrap();
    keeper.apply(&more(&[web(&["10.0.0.4"])])).unwrap();
    assert_eq!(records(&log_of_a(rig.run.path())), [1, 2, 3, 4]);
    assert!(fs::metadata(log_of_a(rig.run.path())).unwrap().len() > before);
    // What is refused changes nothing.
    assert!(keeper.apply(&more(&[service("a/x", "10.96.0.1", &[])])).is_err());
    assert_eq!(records(&log_of_a(rig.run.path())), [1, 2, 3, 4]);
    let removed = Request { remove: vec!["a/web".into(), "a/none".into()], ..Request::default() };
    keeper.apply(&Change::Services(removed)).unwrap();
    assert!(!log_of_a(rig.run.path()).exists(), "a tenant without services reads what all do");
    assert!(rig.sees("a").is_empty());
    // After a boot there are no logs until they are restored.
    fs::remove_dir_all(log::directory(rig.run.path())).unwrap();
    let mut after = rig.keeper();
    assert!(after.apply(&Change::Restore).unwrap().logs > 0);
    assert_eq!(rig.sees("b"), ["10.96.0.2 1"]);
    assert_eq!(after.apply(&Change::Restore).unwrap().logs, 0, "nothing to do");
    assert_eq!(keeper::stored(rig.state.path()).unwrap().content, [db]);
}

#[test]
fn a_long_log_is_begun_anew() {
    let rig = Rig::new();
    let mut keeper = rig.keeper();
    let (mut longest, mut files) = (0, std::collections::HashSet::new());
    for step in 0..30_u8 {
        let endpoints: Vec<String> =
            (0..4000_u32).map(|n| format!("10.{step}.{}.{}", n / 250, 1 + n % 250)).collect();
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        let change = put(&[service("a/web", "10.96.0.1", &endpoints)]);
        keeper.apply(&Change::Services(change)).unwrap();
        let meta = fs::metadata(log_of_a(rig.run.path())).unwrap();
        longest = longest.max(meta.len());
        files.insert(std::os::unix::fs::MetadataExt::ino(&meta));
        assert_eq!(rig.sees("a"), ["10.96.0.1 4000"]);
    }
    assert!(longest < 2 << 20, "{longest} bytes");
    assert!(files.len() > 1);
}

#[test]
fn a_log_that_is_cut_anywhere_is_read_as_far_as_it_is_whole_and_mended() {
    let rig = Rig::new();
    let mut keeper = rig.keeper();
    for n in 1..=4_u8 {
        let endpoint = format!("10.0.0.{n}");
        let change = put(&[service("a/web", "10.96.0.1", &[&endpoint])]);
        keeper.apply(&Change::Services(change)).unwrap();
    }
    let path = log_of_a(rig.run.path());
    let whole = fs::read(&path).unwrap();
    assert_eq!(records(&path), [1, 2, 3, 4]);
    let mut last = 0;
    for end in 8..=whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        let read = records(&path);
        assert!((1..=4).take(read.len()).eq(read.iter().copied()), "{read:?} of {end} bytes");
        assert!(read.len() >= last);
        last = read.len();
    }
    assert_eq!(last, 4);
    // A byte that is another ends the log there.
    for at in (8..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        assert!(records(&path).len() < 4, "byte {at}");
    }
    for end in [0, 3, 8, 20, whole.len() - 1] {
        fs::write(&path, &whole[..end]).unwrap();
        let reader = Reader::open(&path).ok();
        rig.keeper().apply(&Change::Restore).unwrap();
        assert_eq!(rig.sees("a"), ["10.96.0.1 1"], "{end} bytes");
        assert_eq!(records(&path).len(), 1);
        if let Some(reader) = reader {
            assert!(
                !reader.is_at(&path).unwrap(),
                "who reads the old one sees that there is another"
            );
        }
    }
    // A log that is whole is not touched.
    let before = fs::read(&path).unwrap();
    rig.keeper().apply(&Change::Restore).unwrap();
    assert_eq!(fs::read(&path).unwrap(), before);
    File::create(log::directory(rig.run.path()).join("stranger")).unwrap();
    rig.keeper().apply(&Change::Restore).unwrap();
    let mut left: Vec<_> = fs::read_dir(log::directory(rig.run.path())).unwrap().collect();
    assert_eq!(left.len(), 2);
    assert!(left.pop().is_some());
    assert!(log::directory(rig.run.path()).join(SHARED).exists());
}

#[test]
fn the_policy_says_what_is_shared() {
    use crate::policy::document::Documents;
    use crate::policy::state::{Applied, Store};
    let rig = Rig::new();
    let mut keeper = rig.keeper();
    let all =
        [service("a/web", "10.96.0.1", &[]), service("infra/dns", "10.96.0.2", &["10.0.0.1"])];
    keeper.apply(&Change::Services(replace(&all))).unwrap();
    assert_eq!(rig.sees("a").len(), 1);
    let mut documents = Documents::default();
    let text = "{apiVersion: joey.io/v1, kind: NodePolicy, metadata: {name: n}, spec: {sharedServices: [infra/dns]}}";
    documents.read("x", text).unwrap();
    let stored = Applied { content: documents, ..Applied::default() }.stamped(1, false);
    Store::new(rig.state.path()).write_policy(&stored).unwrap();
    keeper.apply(&Change::Restore).unwrap();
    assert_eq!(rig.sees("a"), ["10.96.0.1 0", "10.96.0.2 1"]);
    assert_eq!(rig.sees("others"), ["10.96.0.2 1"]);
}
