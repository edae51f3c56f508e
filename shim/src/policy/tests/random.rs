//! Random worlds: what is compiled, asked by the specification of the programs, beside the direct reading.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use joey_ebpf::policy::abi::{Local, Pod as MapPod, Side, name_digest};
use joey_ebpf::policy::model::Attempt;
use serde_json::{Value, json};

use super::super::apply::Merged;
use super::super::document::{Document, Documents};
use super::super::entry::{Entry, Kind, NamedPort, Namespace, Protocol};
use super::super::explain::{Oracle, Question};
use super::super::state::{Applied, Table};
use super::direct::{Pod, World};
use super::{Random, compiled, tables};

const SPACES: [&str; 4] = ["a", "b", "c", "d"];
const TENANTS: [&str; 3] = ["a", "b", "red"];
const NAMES: [&str; 3] = ["web", "db", "dns"];
const PORTS: [u16; 8] = [53, 80, 81, 82, 443, 8080, 1, 65535];

fn address(random: &mut Random) -> IpAddr {
    let low = random.below(64) as u8;
    if random.one_in(3) {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, low.into()))
    } else {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, low))
    }
}

/// A prefix of the small world that addresses are in, or all.
fn prefix(random: &mut Random) -> String {
    let address = address(random);
    let (whole, bits) = match address {
        IpAddr::V4(_) => (32, 26 + random.below(7) as u32),
        IpAddr::V6(_) => (128, 122 + random.below(7) as u32),
    };
    let bits = if random.one_in(6) { 0 } else { bits };
    let mask = |word: u128| if bits == 0 { 0 } else { word >> (whole - bits) << (whole - bits) };
    match address {
        IpAddr::V4(v4) => {
            format!("{}/{bits}", Ipv4Addr::from_bits(mask(v4.to_bits().into()) as u32))
        }
        IpAddr::V6(v6) => format!("{}/{bits}", Ipv6Addr::from_bits(mask(v6.to_bits()))),
    }
}

/// A longer prefix within this one, if there is one.
fn part(random: &mut Random, outer: &str) -> Option<String> {
    let (address, bits) = outer.split_once('/')?;
    let bits: u32 = bits.parse().unwrap();
    (0..20).find_map(|_| {
        let inner = prefix(random);
        let (first, length) = inner.split_once('/')?;
        let fits = length.parse::<u32>().unwrap() > bits
            && super::direct::in_prefix(outer, first.parse().unwrap())
            && first.contains(':') == address.contains(':');
        fits.then(|| inner.clone())
    })
}

fn labels(random: &mut Random) -> Value {
    let mut labels = serde_json::Map::new();
    for key in ["app", "tier"] {
        if !random.one_in(3) {
            labels.insert(key.into(), (*random.pick(&["x", "y"])).into());
        }
    }
    Value::Object(labels)
}

fn selector(random: &mut Random) -> Value {
    let mut selector = json!({});
    if random.one_in(3) {
        selector["matchLabels"] = labels(random);
    }
    if random.one_in(3) {
        let key = *random.pick(&["app", "tier", "kubernetes.io/metadata.name"]);
        let values = if random.one_in(2) { json!(["x"]) } else { json!(["y", "a", "b"]) };
        let expression = match random.below(4) {
            0 => json!({"key": key, "operator": "In", "values": values}),
            1 => json!({"key": key, "operator": "NotIn", "values": values}),
            2 => json!({"key": key, "operator": "Exists"}),
            _ => json!({"key": key, "operator": "DoesNotExist"}),
        };
        selector["matchExpressions"] = json!([expression]);
    }
    selector
}

fn peer(random: &mut Random) -> Value {
    match random.below(4) {
        0 => json!({"podSelector": selector(random)}),
        1 => json!({"namespaceSelector": selector(random)}),
        2 => json!({"namespaceSelector": selector(random), "podSelector": selector(random)}),
        _ => {
            let cidr = prefix(random);
            let except: Vec<_> = (0..random.below(3)).filter_map(|_| part(random, &cidr)).collect();
            json!({"ipBlock": {"cidr": cidr, "except": except}})
        }
    }
}

fn port(random: &mut Random) -> Value {
    let protocol = *random.pick(&["TCP", "UDP"]);
    let number = *random.pick(&PORTS);
    match random.below(5) {
        0 => json!({"protocol": protocol}),
        1 => json!({"port": random.pick(&NAMES)}),
        2 => json!({"protocol": protocol, "port": random.pick(&NAMES)}),
        3 => {
            let last = number.saturating_add(random.below(400) as u16);
            json!({"protocol": protocol, "port": number, "endPort": last})
        }
        _ => json!({"protocol": protocol, "port": number}),
    }
}

fn rule(random: &mut Random, side: &str) -> Value {
    let mut rule = json!({});
    if !random.one_in(5) {
        let peers: Vec<_> = (0..random.below(3)).map(|_| peer(random)).collect();
        rule[side] = json!(peers);
    }
    if !random.one_in(3) {
        let ports: Vec<_> = (0..random.below(3)).map(|_| port(random)).collect();
        rule["ports"] = json!(ports);
    }
    rule
}

fn network(random: &mut Random, at: usize) -> Value {
    let mut spec = json!({"podSelector": selector(random)});
    if !random.one_in(3) {
        let rules: Vec<_> = (0..random.below(3)).map(|_| rule(random, "from")).collect();
        spec["ingress"] = json!(rules);
    }
    if !random.one_in(3) {
        let rules: Vec<_> = (0..random.below(3)).map(|_| rule(random, "to")).collect();
        spec["egress"] = json!(rules);
    }
    match random.below(4) {
        0 => spec["policyTypes"] = json!(["Ingress"]),
        1 => spec["policyTypes"] = json!(["Egress"]),
        2 => spec["policyTypes"] = json!(["Ingress", "Egress"]),
        _ => {}
    }
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("n{at}"), "namespace": random.pick(&SPACES)}, "spec": spec,
    })
}

fn words(random: &mut Random) -> Value {
    let word = |random: &mut Random| match random.below(6) {
        0 => "any".to_owned(),
        1 => "icmp".to_owned(),
        2 => (*random.pick(&["tcp", "udp"])).to_owned(),
        3 => format!("{}/udp", random.pick(&PORTS)),
        4 => format!("80-{}/tcp", 80 + random.below(500)),
        _ => format!("{}/tcp", random.pick(&PORTS)),
    };
    let words: Vec<_> = (0..=random.below(2)).map(|_| word(random)).collect();
    json!(words)
}

fn node(random: &mut Random) -> Value {
    let mut spec = json!({});
    if random.one_in(2) {
        spec["node"] = json!({});
        for field in ["ports", "opens"] {
            if random.one_in(2) {
                spec["node"][field] = words(random);
            }
        }
    }
    let mut services = Vec::new();
    for at in 0..random.below(4) {
        let address = prefix(random);
        let except: Vec<_> = (0..random.below(3)).filter_map(|_| part(random, &address)).collect();
        let mut service =
            json!({"name": format!("s{at}"), "addresses": [address], "except": except});
        service["ports"] = words(random);
        if random.one_in(2) {
            service["opens"] = words(random);
        }
        services.push(service);
    }
    spec["services"] = json!(services);
    let mut allow = Vec::new();
    for _ in 0..random.below(3) {
        let who = [TENANTS[0], TENANTS[1], TENANTS[2], "*"];
        let (from, to) = (*random.pick(&who), *random.pick(&who));
        if from != to {
            allow.push(json!({"from": from, "to": to, "ports": words(random)}));
        }
    }
    spec["allow"] = json!(allow);
    json!({"apiVersion": "joey.io/v1", "kind": "NodePolicy", "metadata": {"name": "node"}, "spec": spec})
}

fn world(random: &mut Random) -> World {
    let mut world = World { node: node(random), ..World::default() };
    let string_map = |value: Value| serde_json::from_value(value).unwrap();
    for space in SPACES {
        if !random.one_in(4) {
            world.namespaces.insert(space.to_owned(), string_map(labels(random)));
        }
    }
    for at in 0..2 + random.below(14) {
        let address = address(random);
        if world.pods.iter().any(|pod| pod.address == address) {
            continue;
        }
        let namespace = (*random.pick(&SPACES)).to_owned();
        let tenant = match random.below(3) {
            0 => (*random.pick(&TENANTS)).to_owned(),
            _ => namespace.clone(),
        };
        let named = |random: &mut Random| {
            let protocol = (*random.pick(&["TCP", "UDP"])).to_owned();
            ((*random.pick(&NAMES)).to_owned(), protocol, *random.pick(&PORTS))
        };
        let ports = (0..random.below(4)).map(|_| named(random)).collect();
        let (here, fed) = (random.one_in(2), !random.one_in(5));
        let labels = string_map(labels(random));
        let name = format!("p{at}");
        world.pods.push(Pod { namespace, name, tenant, address, labels, ports, here, fed });
    }
    for at in 0..random.below(5) {
        world.networks.push(network(random, at));
    }
    for _ in 0..2 {
        let address = address(random);
        if !world.pods.iter().any(|pod| pod.address == address) {
            world.node_addresses.push(address);
        }
    }
    world
}

fn entries(world: &World) -> Vec<Entry> {
    let port = |(name, protocol, port): &(String, String, u16)| NamedPort {
        name: name.clone(),
        protocol: if protocol == "TCP" { Protocol::Tcp } else { Protocol::Udp },
        port: *port,
    };
    let fed = world.pods.iter().filter(|pod| pod.fed);
    fed.map(|pod| Entry {
        address: pod.address,
        tenant: (pod.tenant != pod.namespace).then(|| pod.tenant.clone()),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        kind: Kind::Pod,
        labels: pod.labels.clone(),
        ports: pod.ports.iter().map(port).collect(),
        targets: Vec::new(),
    })
    .collect()
}

fn stored<T: Default>(content: T) -> Applied<T> {
    Applied { content, ..Applied::default() }
}

/// Questions about one world that were allowed, and refused.
fn examine(random: &mut Random, questions: usize) -> (usize, usize) {
    let world = world(random);
    let objects = std::iter::once(&world.node).chain(&world.networks);
    let document = |object: &Value| {
        let (source, object) = ("random".into(), object.clone());
        Document { source, object, isolates: false }
    };
    let documents = Documents(objects.map(document).collect());
    let namespaces = world.namespaces.iter();
    let namespaces =
        namespaces.map(|(name, labels)| Namespace { name: name.clone(), labels: labels.clone() });
    let namespaces: Vec<_> = namespaces.collect();
    let (compiled, mut names) = compiled(&documents, &namespaces, &entries(&world)).unwrap();
    let mut tables = tables(&compiled);
    // The shims number names, too.
    for name in SPACES.iter().chain(&TENANTS) {
        let next = names.values().max().unwrap_or(&0) + 1;
        names.entry((*name).to_owned()).or_insert(next);
    }
    let mut pods = HashMap::new();
    for (id, pod) in (1..).zip(&world.pods).filter(|(_, pod)| pod.here) {
        let (name, tenant) = (name_digest(&pod.namespace, &pod.name), names[&pod.tenant]);
        tables.locals.insert(pod.address, Local { name, tenant, pod: id });
        let space = names[&pod.namespace];
        let pod = MapPod {
            since: 0,
            name,
            tenant,
            space,
            table: 0,
            limited: false,
            other_end: None,
            mac: [0; 6],
        };
        pods.insert(id, pod);
    }
    for address in &world.node_addresses {
        tables.locals.insert(*address, Local { name: 0, tenant: 0, pod: 0 });
    }
    let (documents, table) = (stored(documents), Table { entries: entries(&world), namespaces });
    let merged = Merged::of(documents, stored(table)).unwrap();
    let (locals, known) = (tables.locals.clone(), names.clone());
    let oracle = Oracle::new(merged, pods.clone(), locals, known, None).unwrap();
    let here: Vec<(u16, &Pod)> = (1..).zip(&world.pods).filter(|(_, pod)| pod.here).collect();
    let (mut allowed, mut refused) = (0, 0);
    for _ in 0..questions {
        let Some((id, pod)) = (!here.is_empty()).then(|| *random.pick(&here)) else { break };
        // Half of the peers are those that tenancy allows: about the others there is less to be said.
        let kin: Vec<&Pod> = world.pods.iter().filter(|it| it.tenant == pod.tenant).collect();
        let remote = match random.below(4) {
            0 => random.pick(&world.pods).address,
            1 => address(random),
            _ => random.pick(&kin).address,
        };
        if remote == pod.address || remote.is_ipv4() != pod.address.is_ipv4() {
            continue;
        }
        let proto = *random.pick(&[6, 6, 17, 1, 132]);
        let port = match proto {
            6 | 17 => random.pick(&PORTS).wrapping_add(random.below(2) as u16),
            _ => 0,
        };
        let opens = random.one_in(2);
        let opener = if opens { Side::Vm } else { Side::Peer };
        let attempt = Attempt { local: pod.address, remote, proto, port, opener };
        let found = tables.verdict(&pods[&id], &attempt);
        let expected = world.allows(pod, remote, proto, port, opens);
        assert_eq!(found.is_ok(), expected, "{attempt:?} of {pod:?}: {found:?} in {world:#?}");
        if expected {
            allowed += 1
        } else {
            refused += 1
        }
        let (from, to) = if opens { (pod.address, remote) } else { (remote, pod.address) };
        let judged = oracle.ask(&Question { from, to, proto, port });
        let way = if opens { "egress" } else { "ingress" };
        let judged = judged.iter().find(|it| it.way == way && it.here).unwrap();
        // What is said of the last step is what was decided.
        let last = judged.why.last().unwrap();
        let no = ["not list", "lists it", "nothing", "no shared service", "nobody said"];
        let says_no = no.iter().any(|words| last.contains(words));
        assert_eq!(
            (judged.allowed, !says_no),
            (expected, expected),
            "{attempt:?}: {judged:?} in {world:#?}"
        );
    }
    (allowed, refused)
}

#[test]
fn compiled_policies_say_what_the_documents_say() {
    let mut random = Random(0x4A0E_1EE7);
    let (mut allowed, mut refused) = (0, 0);
    for _ in 0..2500 {
        let (yes, no) = examine(&mut random, 80);
        (allowed, refused) = (allowed + yes, refused + no);
    }
    assert!(allowed > 10_000 && refused > 10_000, "{allowed} allowed, {refused} refused");
}
