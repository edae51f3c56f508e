//! The peers that NetworkPolicies speak of, each once, and which of them an entry of the identity table is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use super::super::entry::{Entry, Kind, PortRef, Protocol};
use super::super::network_policy::{NetworkPolicy, Peer, Rule, Spaces, Which};
use super::super::selector::{Index, Labels};

/// Number of a [`Peer`].
pub(in super::super) type PeerId = u32;
/// A port with a name: the name, the protocol, the number.
pub(in super::super) type Named = (String, Protocol, u16);

/// A port of a Service, with what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in super::super) struct Front {
    pub(in super::super) port: u16,
    pub(in super::super) protocol: Protocol,
    /// The ports of the pods.
    pub(in super::super) targets: BTreeSet<u16>,
    /// Their names, if all pods call them so.
    pub(in super::super) names: BTreeSet<String>,
}

/// What an entry is to the policies.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// As a peer: sorted.
    pub(super) peers: Rc<[PeerId]>,
    /// The policies that select it: sorted.
    pub(super) networks: Rc<[usize]>,
    /// Of a Service: its ports.
    pub(super) fronts: Option<Vec<Front>>,
}

/// A namespace, with what could select a pod in it.
#[derive(Debug, Default)]
struct Space<'a> {
    peers: Index<'a, PeerId>,
    networks: Index<'a, usize>,
    pods: Vec<&'a Entry>,
}

/// The peers that an entry is, and the NetworkPolicies that select it.
type Known = (Rc<[PeerId]>, Rc<[usize]>);

/// The peers by number, and what is needed to find those that an entry is.
pub(super) struct Peers<'a> {
    ids: HashMap<&'a Peer, PeerId>,
    all: Vec<&'a Peer>,
    spaces: HashMap<&'a str, Space<'a>>,
    /// Names of ports in rules about what may be opened elsewhere.
    names: BTreeSet<&'a str>,
    known: HashMap<(&'a str, &'a Labels), Known>,
}

/// All rules of a policy.
fn rules(network: &NetworkPolicy) -> impl Iterator<Item = &Rule> {
    network.ingress.iter().chain(&network.egress).flatten()
}

impl<'a> Peers<'a> {
    /// `namespaces` has the labels of every namespace that any of them is in.
    pub(super) fn new(
        networks: &'a [NetworkPolicy],
        namespaces: &BTreeMap<&'a str, Labels>,
        entries: &'a [Entry],
    ) -> Self {
        let mut ids = HashMap::new();
        let mut all: Vec<&Peer> = Vec::new();
        for peer in networks.iter().flat_map(rules).filter_map(|rule| rule.peers.as_ref()).flatten()
        {
            ids.entry(peer).or_insert_with(|| {
                all.push(peer);
                all.len() as PeerId - 1
            });
        }
        let mut spaces: HashMap<&str, Space<'_>> = HashMap::new();
        for name in namespaces.keys() {
            spaces.insert(name, Space::default());
        }
        for (id, peer) in all.iter().enumerate() {
            let Peer::Pods(of, pods) = peer else { continue };
            match of {
                Spaces::Own(name) => {
                    spaces.entry(name).or_default().peers.add(pods, id as PeerId);
                }
                Spaces::Matching(selector) => {
                    for (name, _) in namespaces.iter().filter(|(_, it)| selector.matches(it)) {
                        spaces.entry(name).or_default().peers.add(pods, id as PeerId);
                    }
                }
            }
        }
        for (at, network) in networks.iter().enumerate() {
            spaces.entry(&network.namespace).or_default().networks.add(&network.selector, at);
        }
        for entry in entries.iter().filter(|entry| entry.kind == Kind::Pod) {
            if let Some(space) = spaces.get_mut(entry.namespace.as_str()) {
                space.pods.push(entry);
            }
        }
        let egress = networks.iter().filter_map(|network| network.egress.as_ref()).flatten();
        let names = egress.filter_map(|rule| rule.ports.as_ref()).flatten();
        let names = names.filter_map(|port| match &port.which {
            Which::Named(name) => Some(name.as_str()),
            _ => None,
        });
        Self { ids, all, spaces, names: names.collect(), known: HashMap::new() }
    }

    pub(super) fn all(&self) -> &[&'a Peer] {
        &self.all
    }

    pub(super) fn id(&self, peer: &Peer) -> Option<PeerId> {
        self.ids.get(peer).copied()
    }

    /// Ports of a pod whose names matter to those who would open them.
    pub(super) fn named(&self, entry: &Entry) -> Vec<Named> {
        let matter = entry.ports.iter().filter(|port| self.names.contains(port.name.as_str()));
        let named = matter.map(|port| (port.name.clone(), port.protocol, port.port));
        named.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What an entry is.
    pub(super) fn facts(&mut self, entry: &'a Entry) -> Facts {
        match entry.kind {
            Kind::Pod => {
                let (peers, networks) = self.pod(entry);
                Facts { peers, networks, fronts: None }
            }
            Kind::Service => self.service(entry),
        }
    }

    fn pod(&mut self, entry: &'a Entry) -> (Rc<[PeerId]>, Rc<[usize]>) {
        let key = (entry.namespace.as_str(), &entry.labels);
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let space = self.spaces.get(entry.namespace.as_str());
        let peers = space.map(|space| space.peers.matching(&entry.labels)).unwrap_or_default();
        let networks =
            space.map(|space| space.networks.matching(&entry.labels)).unwrap_or_default();
        let found: (Rc<[_]>, Rc<[_]>) = (peers.into(), networks.into());
        self.known.insert(key, found.clone());
        found
    }

    /// A Service is a peer if all pods behind it are: who opens its address may get to any of them.
    fn service(&mut self, entry: &'a Entry) -> Facts {
        let is_behind = |pod: &&Entry| {
            let labels = entry.labels.iter();
            labels.into_iter().all(|(key, value)| pod.labels.get(key) == Some(value))
        };
        let pods: Vec<&Entry> = match self.spaces.get(entry.namespace.as_str()) {
            Some(space) if !entry.labels.is_empty() => {
                space.pods.iter().copied().filter(is_behind).collect()
            }
            _ => Vec::new(),
        };
        let mut peers: Option<Vec<PeerId>> = None;
        for pod in &pods {
            let (of_pod, _) = self.pod(pod);
            peers = Some(match peers {
                None => of_pod.to_vec(),
                Some(mut so_far) => {
                    so_far.retain(|id| of_pod.binary_search(id).is_ok());
                    so_far
                }
            });
        }
        let fronts = entry.targets.iter().map(|front| {
            let number = |pod: &Entry| match &front.target {
                PortRef::Number(number) => Some(*number),
                PortRef::Name(name) => {
                    let mut ports = pod.ports.iter();
                    let port = ports.find(|it| it.name == *name && it.protocol == front.protocol);
                    port.map(|port| port.port)
                }
            };
            let calls = |pod: &Entry, name: &str| {
                let is = |port: &super::super::entry::NamedPort| {
                    port.name == name && port.protocol == front.protocol
                };
                pod.ports.iter().any(|port| is(port) && Some(port.port) == number(pod))
            };
            let names = self.names.iter().filter(|name| pods.iter().all(|pod| calls(pod, name)));
            let names = names.map(|name| (*name).to_owned()).collect();
            let targets = pods.iter().filter_map(|pod| number(pod)).collect();
            Front { port: front.port, protocol: front.protocol, targets, names }
        });
        let fronts = if pods.is_empty() { Vec::new() } else { fronts.collect() };
        let (peers, networks) = (peers.unwrap_or_default().into(), Rc::from([]));
        Facts { peers, networks, fronts: Some(fronts) }
    }
}
