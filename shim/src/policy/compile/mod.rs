//! From documents and identities to the entries of the policy's maps: a pure function.
//!
//! - **Services**: the addresses of an identity are of a *class*, the set of shared services that cover them.
//! - **Groups**: peers that no rule of any NetworkPolicy tells apart have one number.
//! - **Policies**: pods that the same NetworkPolicies select, with the same numbers for named ports, have one
//!   number, whose low bits say in what they are isolated.
//!
//! So what is written grows with what is told apart and not with the product of pods and rules.

mod peers;
mod prefixes;
mod rules;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use joey_ebpf::policy::abi::{Identity, NODE, Prefix, Rule, Scope, Side, name_digest};

use super::cidr;
use super::document::Checked;
use super::entry::{Entry, Kind, Namespace};
use super::error::PolicyError;
use super::network_policy::{NetworkPolicy, Peer, Which};
use super::node::{EVERY, NodePolicy};
use super::selector::Labels;

use self::peers::{Facts, Peers};
use self::prefixes::{Cuts, Piece};
use self::rules::Tenancy;
pub(super) use self::rules::{Class, Group, Way, allowed};

/// Most identities and most rules: half of what the maps hold, as while one policy takes another's place both
/// are there.
pub const MOST: usize = 1_048_576 / 2;
/// Most namespaces with policies, for the same reason.
pub const MOST_SPACES: usize = 131_072 / 2;
/// The label that every namespace has.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// The first class of services; the one before is the node.
const FIRST_CLASS: u32 = NODE + 1;

/// What is compiled.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The documents.
    pub documents: &'a Checked,
    /// The namespaces. Those of the documents go before them.
    pub namespaces: &'a [Namespace],
    /// The identities.
    pub entries: &'a [Entry],
}

/// What is written to the maps, and what it stands for.
#[derive(Debug, Clone, Default)]
pub struct Compiled {
    /// Whose addresses are.
    pub identities: Vec<(Prefix, Identity)>,
    /// The policies of pods whose labels are not known, by the number of their namespace.
    pub spaces: Vec<(u32, u32)>,
    /// What is allowed.
    pub rules: Vec<Rule>,
    /// What does not hold as it was written.
    pub warnings: Vec<String>,
    /// What the numbers mean.
    pub(super) meaning: Meaning,
}

/// What numbers mean.
#[derive(Debug, Clone, Default)]
pub(super) struct Meaning {
    pub(super) groups: Vec<Group>,
    /// By number without the low bits, less one.
    pub(super) classes: Vec<Class>,
    /// Services, by class less [`FIRST_CLASS`].
    pub(super) services: Vec<Vec<usize>>,
    pub(super) peers: Vec<Peer>,
}

impl Meaning {
    /// The services of a class.
    pub(super) fn services(&self, class: u32) -> &[usize] {
        let at = class.checked_sub(FIRST_CLASS);
        at.and_then(|at| self.services.get(at as usize)).map_or(&[], Vec::as_slice)
    }

    /// The class of pods that have a policy; `None` if their labels are not known.
    pub(super) fn class(&self, policy: u32) -> Option<&Class> {
        self.classes.get((policy >> 2).checked_sub(1)? as usize)
    }
}

/// Gives equal things one number, from 0 on.
struct Numbers<T> {
    numbers: HashMap<T, u32>,
    all: Vec<T>,
}

impl<T: Clone + Eq + Hash> Numbers<T> {
    fn new() -> Self {
        Self { numbers: HashMap::new(), all: Vec::new() }
    }

    fn of(&mut self, thing: T) -> u32 {
        if let Some(number) = self.numbers.get(&thing) {
            return *number;
        }
        let number = self.all.len() as u32;
        self.all.push(thing.clone());
        self.numbers.insert(thing, number);
        number
    }
}

/// Compiles. `number` gives the numbers of tenants and namespaces.
///
/// # Errors
/// There is more than fits, an identity is wrong, or `number` fails.
pub fn compile(
    input: Input<'_>,
    number: &mut dyn FnMut(&str) -> Result<u32, PolicyError>,
) -> Result<Compiled, PolicyError> {
    let absent = NodePolicy::absent();
    let node = input.documents.node.as_ref().unwrap_or(&absent);
    let networks = &input.documents.networks[..];
    let by_address = check_entries(input.entries)?;
    let namespaces = namespaces(&input, networks);
    let peers = Peers::new(networks, &namespaces, input.entries);
    let cuts = cuts(node, peers.all(), input.entries);

    let mut namer = Namer::new(networks, node.services.len() as u32, peers);
    let mut identities: Vec<(Prefix, Identity)> = Vec::new();
    let mut values: Vec<Identity> = Vec::new();
    for Piece { prefix, holds, mut begins, outer } in cuts.resolve() {
        let is_host = prefix == cidr::host(prefix.address);
        let entry = by_address.get(&prefix.address).filter(|_| is_host);
        let mut identity = namer.identity(&holds, entry.copied(), number)?;
        if is_host {
            begins.sort_unstable();
            begins.dedup();
            identity.near = namer.class(&begins);
        }
        values.push(identity);
        // A prefix that says what the one around it says is not needed.
        let around = outer.map_or_else(Identity::default, |at| values[at]);
        if identity != around {
            identities.push((prefix, identity));
        }
    }
    bound_identities(identities.len(), input.entries)?;

    let Namer { peers, mut tenants, classes, groups, services_of, mut tenancy, .. } = namer;
    let mut rules = rules::Rules::new(MOST);
    node_rules(&mut rules, node, &services_of.all)?;
    tenancy.allow = across_tenants(&mut rules, node, &mut tenants, number)?;
    let (classes, groups) = (classes.all, groups.all);
    let numbered = rules::Numbered {
        networks,
        peers: &peers,
        classes: &classes,
        groups: &groups,
        tenancy: &tenancy,
    };
    numbered.rules(&mut rules)?;

    let meaning = Meaning {
        groups,
        classes: classes.into_iter().skip(1).collect(),
        services: services_of.all,
        peers: peers.all().iter().map(|peer| (*peer).clone()).collect(),
    };
    let spaces = spaces(networks, number)?;
    let warnings = input.documents.warnings.iter().cloned().chain(rules.full()).collect();
    Ok(Compiled { identities, spaces, rules: rules.finish(), warnings, meaning })
}

/// Where what is said of addresses changes. What may hold of them is a number: that of a service, or behind
/// those that of a peer that is a block of addresses.
fn cuts(node: &NodePolicy, peers: &[&Peer], entries: &[Entry]) -> Cuts {
    let mut cuts = Cuts::default();
    for (at, service) in (0..).zip(&node.services) {
        service.addresses.iter().for_each(|prefix| cuts.begin(*prefix, at));
        service.except.iter().for_each(|prefix| cuts.end(*prefix, at));
    }
    for (at, peer) in (node.services.len() as u32..).zip(peers) {
        if let Peer::Block { cidr, except } = peer {
            cuts.begin(*cidr, at);
            except.iter().for_each(|prefix| cuts.end(*prefix, at));
        }
    }
    entries.iter().for_each(|entry| cuts.cut(cidr::host(entry.address)));
    cuts
}

/// Gives identities their numbers.
struct Namer<'a> {
    networks: &'a [NetworkPolicy],
    /// How many services there are.
    services: u32,
    peers: Peers<'a>,
    tenants: HashMap<&'a str, u32>,
    /// Number 0 is none.
    classes: Numbers<Class>,
    /// Number 0 is none.
    groups: Numbers<Group>,
    services_of: Numbers<Vec<usize>>,
    tenancy: Tenancy,
}

impl<'a> Namer<'a> {
    fn new(networks: &'a [NetworkPolicy], services: u32, peers: Peers<'a>) -> Self {
        let (mut classes, mut groups) = (Numbers::new(), Numbers::new());
        groups.of(Group::default());
        classes.of(Class::default());
        let (tenants, services_of) = (HashMap::new(), Numbers::new());
        let tenancy = Tenancy::default();
        Self { networks, services, peers, tenants, classes, groups, services_of, tenancy }
    }

    /// The class of the services among this.
    fn class(&mut self, holds: &[u32]) -> u32 {
        let services = holds.iter().take_while(|it| **it < self.services);
        let services: Vec<usize> = services.map(|at| *at as usize).collect();
        if services.is_empty() { 0 } else { FIRST_CLASS + self.services_of.of(services) }
    }

    /// The identity of addresses of which this holds, or of the one that an entry is about.
    fn identity(
        &mut self,
        holds: &[u32],
        entry: Option<&'a Entry>,
        number: &mut dyn FnMut(&str) -> Result<u32, PolicyError>,
    ) -> Result<Identity, PolicyError> {
        let blocks = &holds[holds.partition_point(|it| *it < self.services)..];
        let mut identity = Identity { service: self.class(holds), ..Identity::default() };
        let mut group = Group::default();
        group.peers.extend(blocks.iter().map(|it| it - self.services));
        if let Some(entry) = entry {
            identity.tenant = self.tenant(entry.tenant(), number)?;
            let facts = self.peers.facts(entry);
            if entry.kind == Kind::Pod {
                group.named = self.peers.named(entry);
                identity.policy = policy(&mut self.classes, self.networks, entry, &facts);
                if !entry.name.is_empty() {
                    identity.name = name_digest(&entry.namespace, &entry.name);
                }
            }
            group.peers.extend(&*facts.peers);
            group.peers.sort_unstable();
            // What a Service's ports are matters to those only who speak of pods.
            group.fronts = facts.fronts.filter(|_| !facts.peers.is_empty());
        }
        identity.group = self.groups.of(group);
        if identity.service != 0 {
            Tenancy::note(&mut self.tenancy.groups, identity.group, 0);
        }
        if identity.tenant != 0 {
            Tenancy::note(&mut self.tenancy.groups, identity.group, identity.tenant);
            Tenancy::note(&mut self.tenancy.classes, identity.policy >> 2, identity.tenant);
        }
        Ok(identity)
    }

    fn tenant(
        &mut self,
        name: &'a str,
        number: &mut dyn FnMut(&str) -> Result<u32, PolicyError>,
    ) -> Result<u32, PolicyError> {
        if let Some(known) = self.tenants.get(name) {
            return Ok(*known);
        }
        let given = number(name)?;
        self.tenants.insert(name, given);
        Ok(given)
    }
}

/// The entries by address. Refuses what is ambiguous or belongs to nobody.
fn check_entries(entries: &[Entry]) -> Result<HashMap<std::net::IpAddr, &Entry>, PolicyError> {
    let mut by_address: HashMap<_, &Entry> = HashMap::with_capacity(entries.len());
    for entry in entries {
        let wrong = |field, value: &str, reason: &str| PolicyError::Entry {
            address: entry.address.to_string(),
            field,
            value: value.to_owned(),
            reason: reason.to_owned(),
        };
        let address = entry.address.to_string();
        cidr::check_family(entry.address).map_err(|reason| wrong("address", &address, &reason))?;
        if entry.address.is_unspecified() || entry.address.is_multicast() {
            return Err(wrong("address", &address, "must be an address that one pod can have"));
        }
        for (field, value) in [
            ("tenant", entry.tenant.as_deref().unwrap_or("-")),
            ("tenant or namespace", entry.tenant()),
        ] {
            let checked = super::node::name(field, value.to_owned());
            checked.map_err(|fault| wrong(field, value, &fault.reason))?;
        }
        if let Some(other) = by_address.insert(entry.address, entry) {
            let other = format!("{}/{}", other.namespace, other.name);
            let value = format!("{}/{}", entry.namespace, entry.name);
            return Err(wrong(
                "name",
                &value,
                &format!("{other} has this address, too; one must go"),
            ));
        }
    }
    Ok(by_address)
}

/// Labels of all namespaces that anything is in.
fn namespaces<'a>(input: &Input<'a>, networks: &'a [NetworkPolicy]) -> BTreeMap<&'a str, Labels> {
    let mut all: BTreeMap<&str, Labels> = BTreeMap::new();
    // Later ones go first: the documents' are what the operator wrote.
    for Namespace { name, labels } in input.namespaces.iter().chain(&input.documents.namespaces) {
        all.insert(name, labels.clone());
    }
    let used = input.entries.iter().map(|entry| entry.namespace.as_str());
    for name in used.chain(networks.iter().map(|network| network.namespace.as_str())) {
        if !name.is_empty() {
            all.entry(name).or_default();
        }
    }
    for (name, labels) in &mut all {
        labels.insert(NAME_LABEL.to_owned(), (*name).to_owned());
    }
    all
}

/// The number of a pod's policy.
fn policy(
    classes: &mut Numbers<Class>,
    networks: &[NetworkPolicy],
    entry: &Entry,
    facts: &Facts,
) -> u32 {
    if facts.networks.is_empty() {
        return 0;
    }
    let selecting = || facts.networks.iter().map(|at| &networks[*at]);
    let rules = selecting().filter_map(|network| network.ingress.as_ref()).flatten();
    let names: BTreeSet<&str> = rules
        .filter_map(|rule| rule.ports.as_ref())
        .flatten()
        .filter_map(|port| match &port.which {
            Which::Named(name) => Some(name.as_str()),
            _ => None,
        })
        .collect();
    let matter = entry.ports.iter().filter(|port| names.contains(port.name.as_str()));
    let named: BTreeSet<_> =
        matter.map(|port| (port.name.clone(), port.protocol, port.port)).collect();
    let class = Class { networks: facts.networks.to_vec(), named: named.into_iter().collect() };
    classes.of(class) << 2 | rules::isolated(selecting())
}

fn bound_identities(count: usize, entries: &[Entry]) -> Result<(), PolicyError> {
    if count <= MOST {
        return Ok(());
    }
    let mut by: HashMap<&str, usize> = HashMap::new();
    for entry in entries {
        *by.entry(&entry.namespace).or_default() += 1;
    }
    let largest = by.into_iter().max_by_key(|(name, count)| (*count, *name));
    let largest = largest.map_or_else(
        || "prefixes of services and ipBlocks".to_owned(),
        |(name, count)| format!("namespace {name} ({count})"),
    );
    Err(PolicyError::TooMany { what: "identities", count, most: MOST, largest })
}

/// The rules about what is shared.
fn node_rules(
    rules: &mut rules::Rules,
    node: &NodePolicy,
    services_of: &[Vec<usize>],
) -> Result<(), PolicyError> {
    let label = &node.label;
    let mut share = |class, shared: &super::node::Shared| {
        rules.add(Scope::Service { class, opener: Side::Vm }, &shared.ports, label)?;
        rules.add(Scope::Service { class, opener: Side::Peer }, &shared.opens, label)
    };
    share(NODE, &node.node)?;
    for (class, services) in (FIRST_CLASS..).zip(services_of) {
        for at in services {
            share(class, &node.services[*at].shared)?;
        }
    }
    Ok(())
}

/// The rules across tenants; who may open anything to whom.
fn across_tenants<'a>(
    rules: &mut rules::Rules,
    node: &'a NodePolicy,
    tenants: &mut HashMap<&'a str, u32>,
    number: &mut dyn FnMut(&str) -> Result<u32, PolicyError>,
) -> Result<BTreeSet<(u32, u32)>, PolicyError> {
    let known: BTreeSet<u32> = tenants.values().copied().filter(|tenant| *tenant != 0).collect();
    let mut who = |name: &'a str| -> Result<BTreeSet<u32>, PolicyError> {
        if name == EVERY {
            return Ok(known.clone());
        }
        let given = match tenants.get(name) {
            Some(given) => *given,
            None => number(name)?,
        };
        tenants.insert(name, given);
        Ok([given].into())
    };
    let mut all = BTreeSet::new();
    for allow in &node.allow {
        let (openers, opened) = (who(&allow.from)?, who(&allow.to)?);
        for from in &openers {
            for to in opened.iter().filter(|to| *to != from) {
                rules.add(Scope::Tenants { from: *from, to: *to }, &allow.ports, &node.label)?;
                all.insert((*from, *to));
            }
        }
    }
    Ok(all)
}

/// What pods whose labels are not known have: they are isolated as if all policies of their namespace
/// selected them, and nothing is listed.
fn spaces(
    networks: &[NetworkPolicy],
    number: &mut dyn FnMut(&str) -> Result<u32, PolicyError>,
) -> Result<Vec<(u32, u32)>, PolicyError> {
    let mut by: BTreeMap<&str, u32> = BTreeMap::new();
    for network in networks {
        *by.entry(&network.namespace).or_default() |= rules::isolated([network].into_iter());
    }
    if by.len() > MOST_SPACES {
        let (count, most) = (by.len(), MOST_SPACES);
        let largest = "one NetworkPolicy each".to_owned();
        return Err(PolicyError::TooMany {
            what: "namespaces with policies",
            count,
            most,
            largest,
        });
    }
    by.into_iter().map(|(name, isolated)| Ok((number(name)?, isolated))).collect()
}
