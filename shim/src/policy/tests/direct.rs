//! What documents say, read straight from their JSON: slow, simple, and written without a look at the compiler.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

/// A pod as the test knows it.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) tenant: String,
    pub(super) address: IpAddr,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) ports: Vec<(String, String, u16)>,
    /// Whether it is on this node.
    pub(super) here: bool,
    /// Whether its identity is among the entries.
    pub(super) fed: bool,
}

/// All that is.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) pods: Vec<Pod>,
    pub(super) namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pub(super) networks: Vec<Value>,
    pub(super) node: Value,
    pub(super) node_addresses: Vec<IpAddr>,
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or("")
}

pub(super) fn in_prefix(prefix: &str, ip: IpAddr) -> bool {
    let (address, bits) = prefix.split_once('/').unwrap_or((prefix, "128"));
    let bits: u32 = bits.parse().unwrap();
    match (address.parse().unwrap(), ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (0..bits.min(32))
            .all(|at| (a.to_bits() >> (31 - at)) & 1 == (b.to_bits() >> (31 - at)) & 1),
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            (0..bits).all(|at| (a.to_bits() >> (127 - at)) & 1 == (b.to_bits() >> (127 - at)) & 1)
        }
        _ => false,
    }
}

fn selects(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let pairs = selector.get("matchLabels").and_then(Value::as_object);
    let equal = pairs
        .into_iter()
        .flatten()
        .all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    equal
        && list(selector, "matchExpressions").iter().all(|expression| {
            let has = labels.get(text(expression, "key"));
            let listed = list(expression, "values").iter();
            let listed =
                listed.filter_map(Value::as_str).any(|value| has.is_some_and(|it| it == value));
            match text(expression, "operator") {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => has.is_some(),
                _ => has.is_none(),
            }
        })
}

/// Whether a word of the node policy allows this.
fn word_allows(word: &str, proto: u8, port: u16) -> bool {
    match (word, proto) {
        ("any", _) | ("icmp", 1 | 58) | ("tcp", 6) | ("udp", 17) => return true,
        _ => {}
    }
    let Some((range, name)) = word.split_once('/') else { return false };
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = match name {
        "tcp" => 6,
        _ => 17,
    };
    number == proto && (first.parse().unwrap()..=last.parse().unwrap()).contains(&port)
}

fn words_allow(words: &[Value], proto: u8, port: u16) -> bool {
    words.iter().filter_map(Value::as_str).any(|word| word_allows(word, proto, port))
}

impl World {
    fn node_spec(&self) -> &Value {
        &self.node["spec"]
    }

    fn here(&self, ip: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.here && pod.address == ip)
    }

    /// Who is said to have an address.
    fn said(&self, ip: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.fed && pod.address == ip)
    }

    /// Whether a pod of this node may be opened by `remote`, or (`opens`) may open it.
    pub(super) fn allows(
        &self,
        pod: &Pod,
        remote: IpAddr,
        proto: u8,
        port: u16,
        opens: bool,
    ) -> bool {
        let node = self.node_addresses.contains(&remote);
        let here = self.here(remote);
        let said = self.said(remote);
        let tenant = match (node, here, said) {
            (true, ..) => None,
            (_, Some(pod), _) => Some(&pod.tenant),
            (_, None, said) => said.map(|pod| &pod.tenant),
        };
        let field = if opens { "ports" } else { "opens" };
        let owned = node || tenant.is_some();
        let services = list(self.node_spec(), "services").iter().filter(|service| {
            let any = |field| {
                let prefixes = list(service, field).iter().filter_map(Value::as_str);
                prefixes.into_iter().any(|prefix| in_prefix(prefix, remote))
            };
            // What is somebody's is opened by its very address alone.
            let named = || {
                list(service, "addresses").iter().filter_map(Value::as_str).any(|prefix| {
                    let (address, bits) = prefix.split_once('/').unwrap_or((prefix, ""));
                    let whole = if remote.is_ipv4() { "32" } else { "128" };
                    address.parse() == Ok(remote) && (bits.is_empty() || bits == whole)
                })
            };
            here.is_none() && any("addresses") && !any("except") && (!owned || named())
        });
        let shared = services.into_iter().any(|it| words_allow(list(it, field), proto, port));
        let of_node = &self.node_spec()["node"];
        let by_node = node
            && match (of_node.get(field), opens) {
                (Some(words), _) => words_allow(words.as_array().unwrap(), proto, port),
                (None, opens) => !opens,
            };
        let across = |other: &String| {
            let (from, to) = if opens { (&pod.tenant, other) } else { (other, &pod.tenant) };
            list(self.node_spec(), "allow").iter().any(|allow| {
                let is = |said: &str, name: &str| {
                    let known = || self.pods.iter().any(|pod| pod.fed && pod.tenant == name);
                    said == name || (said == "*" && known())
                };
                is(text(allow, "from"), from)
                    && is(text(allow, "to"), to)
                    && words_allow(list(allow, "ports"), proto, port)
            })
        };
        let tenancy =
            tenant == Some(&pod.tenant) || shared || by_node || tenant.is_some_and(across);
        if !tenancy || node {
            return tenancy;
        }
        // Whose labels are known: of a pod of this node only if it is the one that was spoken of.
        let peer = match here {
            Some(here) => Some(here).filter(|pod| pod.fed),
            None => said,
        };
        let blocks = here.is_none_or(|pod| pod.fed);
        self.networks_allow(pod, peer, blocks.then_some(remote), proto, port, opens)
    }

    fn networks_allow(
        &self,
        pod: &Pod,
        peer: Option<&Pod>,
        remote: Option<IpAddr>,
        proto: u8,
        port: u16,
        opens: bool,
    ) -> bool {
        let (kind, field, side) =
            if opens { ("Egress", "egress", "to") } else { ("Ingress", "ingress", "from") };
        let mut isolated = false;
        for network in &self.networks {
            let spec = &network["spec"];
            let namespace = text(&network["metadata"], "namespace");
            let types = list(spec, "policyTypes");
            let about = match types.is_empty() {
                true => !opens || !list(spec, "egress").is_empty(),
                false => types.iter().any(|it| it == kind),
            };
            let selected = !pod.fed || selects(&spec["podSelector"], &pod.labels);
            if namespace != pod.namespace || !about || !selected {
                continue;
            }
            isolated = true;
            let opened = if opens { peer } else { Some(pod) };
            let lists = |rule: &Value| {
                let peers = list(rule, side);
                let peers = peers.is_empty()
                    || peers.iter().any(|it| self.is_peer(it, namespace, peer, remote));
                let ports = list(rule, "ports");
                let is_port = |it: &Value| is_port(it, opened, proto, port);
                peers && (ports.is_empty() || ports.iter().any(is_port))
            };
            if pod.fed && list(spec, field).iter().any(lists) {
                return true;
            }
        }
        !isolated
    }

    fn is_peer(&self, it: &Value, own: &str, peer: Option<&Pod>, remote: Option<IpAddr>) -> bool {
        if let Some(block) = it.get("ipBlock") {
            let excepted = |ip| {
                list(block, "except").iter().filter_map(Value::as_str).any(|it| in_prefix(it, ip))
            };
            return remote.is_some_and(|ip| in_prefix(text(block, "cidr"), ip) && !excepted(ip));
        }
        let Some(peer) = peer else { return false };
        let space = match it.get("namespaceSelector") {
            None => peer.namespace == own,
            Some(selector) => {
                let mut labels = self.namespaces.get(&peer.namespace).cloned().unwrap_or_default();
                labels.insert("kubernetes.io/metadata.name".into(), peer.namespace.clone());
                selects(selector, &labels)
            }
        };
        space && it.get("podSelector").is_none_or(|selector| selects(selector, &peer.labels))
    }
}

fn is_port(it: &Value, opened: Option<&Pod>, proto: u8, port: u16) -> bool {
    let name = it.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
    if (name == "TCP") != (proto == 6) || (name == "UDP") != (proto == 17) {
        return false;
    }
    match (it.get("port"), it.get("endPort")) {
        (None, _) => true,
        (Some(Value::String(called)), _) => opened.is_some_and(|pod| {
            pod.ports.iter().any(|(n, p, number)| n == called && p == name && *number == port)
        }),
        (Some(first), None) => *first == port,
        (Some(first), Some(last)) => {
            (first.as_u64().unwrap()..=last.as_u64().unwrap()).contains(&port.into())
        }
    }
}
