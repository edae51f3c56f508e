//! From what NetworkPolicies list to rules between classes of pods and classes of peers.

use std::collections::{BTreeSet, HashMap};

use joey_ebpf::policy::abi::{
    ISOLATED_EGRESS, ISOLATED_INGRESS, Ports, Rule as Entry, Scope, Tenant,
};

use super::super::error::PolicyError;
use super::super::network_policy::{NetworkPolicy, Peer, Port, Rule, Which};
use super::peers::{Front, Named, PeerId, Peers};

/// Peers that no rule tells apart. Number 0 is the one without anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(in super::super) struct Group {
    /// Of which peers of rules they are.
    pub(in super::super) peers: Vec<PeerId>,
    /// Their ports that have names.
    pub(in super::super) named: Vec<Named>,
    /// Of Services: their ports.
    pub(in super::super) fronts: Option<Vec<Front>>,
}

/// Pods that the same policies select, and in whose rules names of ports are the same numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(in super::super) struct Class {
    /// The policies: never none.
    pub(in super::super) networks: Vec<usize>,
    /// Ports of the pods whose names are in rules about what may be opened on them.
    pub(in super::super) named: Vec<Named>,
}

/// What pods whose policies list the same may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Way {
    /// Open.
    Egress,
    /// Be opened.
    Ingress,
}

impl Way {
    pub(in super::super) const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    /// The rules of a policy for it; `None`: the policy is not about it.
    pub(in super::super) fn rules(self, network: &NetworkPolicy) -> Option<&[Rule]> {
        match self {
            Self::Egress => network.egress.as_deref(),
            Self::Ingress => network.ingress.as_deref(),
        }
    }

    pub(in super::super) fn isolated(self) -> u32 {
        match self {
            Self::Egress => ISOLATED_EGRESS,
            Self::Ingress => ISOLATED_INGRESS,
        }
    }

    fn scope(self, policy: u32, group: u32) -> Scope {
        match self {
            Self::Egress => Scope::Egress { policy, group },
            Self::Ingress => Scope::Ingress { policy, group },
        }
    }
}

/// In what policies isolate.
pub(super) fn isolated<'a>(networks: impl Iterator<Item = &'a NetworkPolicy>) -> u32 {
    let of = |network| {
        Way::BOTH
            .iter()
            .filter(|way| way.rules(network).is_some())
            .map(|way| way.isolated())
            .sum::<u32>()
    };
    networks.fold(0, |so_far, network| so_far | of(network))
}

/// What a rule allows between pods of a class and peers of a group. `peer` is the one of the rule's that the
/// group is; `None` if the rule is about anybody. `group` is `None` for rules that hold for every group.
pub(in super::super) fn allowed(
    rule: &Rule,
    way: Way,
    class: &Class,
    peer: Option<&Peer>,
    group: Option<&Group>,
) -> Vec<Ports> {
    let Some(ports) = &rule.ports else { return vec![Ports::Any] };
    // Behind a Service are pods whose ports are others; for who is meant by its addresses they are not.
    let fronts = match (way, peer) {
        (Way::Egress, Some(Peer::Pods(..))) => group.and_then(|group| group.fronts.as_ref()),
        _ => None,
    };
    if let Some(fronts) = fronts {
        let listed = fronts.iter().filter(|front| ports.iter().any(|port| behind(port, front)));
        let one = |front: &Front| Ports::range(front.protocol.number(), front.port, front.port);
        return listed.flat_map(one).collect();
    }
    let named = match way {
        Way::Egress => group.map_or(&[][..], |group| &group.named),
        Way::Ingress => &class.named,
    };
    let one = |port: &Port| match &port.which {
        Which::All => vec![Ports::Protocol(port.protocol.number())],
        Which::Range(first, last) => Ports::range(port.protocol.number(), *first, *last),
        Which::Named(name) => {
            let is = |it: &&Named| it.0 == *name && it.1 == port.protocol;
            let number = port.protocol.number();
            named.iter().filter(is).flat_map(|it| Ports::range(number, it.2, it.2)).collect()
        }
    };
    ports.iter().flat_map(one).collect()
}

/// Whether a port of a rule lists all that is behind a Service's port.
fn behind(port: &Port, front: &Front) -> bool {
    port.protocol == front.protocol
        && match &port.which {
            Which::All => true,
            Which::Range(first, last) => {
                let mut targets = front.targets.iter();
                !front.targets.is_empty() && targets.all(|target| (first..=last).contains(&target))
            }
            Which::Named(name) => front.names.contains(name),
        }
}

/// Into how many parts the room for rules is cut, of which a namespace's NetworkPolicies may have one.
const SHARES: usize = 8;

/// Rules as they come, counted, so that what is too much is noticed before there is no memory left.
#[derive(Debug)]
pub(super) struct Rules {
    found: HashMap<Scope, BTreeSet<Ports>>,
    count: usize,
    most: usize,
    by: HashMap<String, usize>,
    /// Rules of the NetworkPolicies of each namespace, and those namespaces that had more than their share.
    shares: HashMap<String, usize>,
    full: BTreeSet<String>,
}

impl Rules {
    pub(super) fn new(most: usize) -> Self {
        let (found, by, shares) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { found, count: 0, most, by, shares, full: BTreeSet::new() }
    }

    /// Adds what `of` allows.
    pub(super) fn add(
        &mut self,
        scope: Scope,
        ports: &[Ports],
        of: &str,
    ) -> Result<(), PolicyError> {
        let mut new: BTreeSet<Ports> = ports.iter().copied().collect();
        for wider in [Some(scope), with_anybody(scope)].into_iter().flatten() {
            if let Some(known) = self.found.get(&wider) {
                let any = known.contains(&Ports::Any);
                new.retain(|ports| !any && !known.contains(ports));
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let known = self.found.entry(scope).or_default();
        if new.contains(&Ports::Any) {
            self.count -= known.len();
            known.clear();
            new.retain(|ports| *ports == Ports::Any);
        }
        let more = new.len();
        known.append(&mut new);
        self.count += more;
        match self.by.get_mut(of) {
            Some(count) => *count += more,
            None => drop(self.by.insert(of.to_owned(), more)),
        }
        if self.count > self.most {
            let largest = self.by.iter().max_by_key(|(name, count)| (**count, *name));
            let (count, most) = (self.count, self.most);
            let largest =
                largest.map_or_else(String::new, |(name, count)| format!("{name} ({count})"));
            return Err(PolicyError::TooMany { what: "rules", count, most, largest });
        }
        Ok(())
    }

    /// Adds what a NetworkPolicy lists, unless its namespace has had its share: what is not listed stays
    /// closed, and nobody else is held up.
    fn add_listed(
        &mut self,
        scope: Scope,
        ports: &[Ports],
        network: &NetworkPolicy,
    ) -> Result<(), PolicyError> {
        let share = self.shares.get(&network.namespace).copied().unwrap_or(0);
        if share >= self.most / SHARES {
            self.full.insert(network.namespace.clone());
            return Ok(());
        }
        let before = self.count;
        self.add(scope, ports, &network.label)?;
        let more = self.count.saturating_sub(before);
        self.shares.insert(network.namespace.clone(), share + more);
        Ok(())
    }

    /// Namespaces whose NetworkPolicies list more than was written.
    pub(super) fn full(&self) -> impl Iterator<Item = String> {
        let most = self.most / SHARES;
        self.full.iter().map(move |namespace| {
            format!(
                "NetworkPolicies of namespace {namespace} need more than {most} rules: what is beyond \
                 them is not allowed"
            )
        })
    }

    pub(super) fn finish(self) -> Vec<Entry> {
        let all = self.found.into_iter();
        let mut rules: Vec<Entry> = all
            .flat_map(|(scope, all)| all.into_iter().map(move |ports| Entry { scope, ports }))
            .collect();
        rules.sort();
        rules
    }
}

/// The scope that holds for everybody, where this one is of a group.
fn with_anybody(scope: Scope) -> Option<Scope> {
    match scope {
        Scope::Egress { policy, group } if group != 0 => Some(Scope::Egress { policy, group: 0 }),
        Scope::Ingress { policy, group } if group != 0 => Some(Scope::Ingress { policy, group: 0 }),
        _ => None,
    }
}

/// Whom pods of a class could be allowed to speak with at all, whatever NetworkPolicies list. For the others
/// no rules are needed: with many tenants, these are nearly all.
#[derive(Debug, Default)]
pub(super) struct Tenancy {
    /// Tenants of the pods of each class.
    pub(super) classes: Vec<BTreeSet<Tenant>>,
    /// Tenants of the addresses of each group; 0 is there for those of a shared service.
    pub(super) groups: Vec<BTreeSet<Tenant>>,
    /// Who may open to whom.
    pub(super) allow: BTreeSet<(Tenant, Tenant)>,
}

impl Tenancy {
    /// Writes down that one of these is of a tenant.
    pub(super) fn note(of: &mut Vec<BTreeSet<Tenant>>, at: u32, tenant: Tenant) {
        let at = at as usize;
        if of.len() <= at {
            of.resize_with(at + 1, BTreeSet::new);
        }
        of[at].insert(tenant);
    }

    /// For each group whether it matters to pods of these tenants.
    fn matter(&self, way: Way, tenants: &BTreeSet<Tenant>) -> Vec<bool> {
        let mut others: BTreeSet<Tenant> = tenants.clone();
        others.insert(0);
        others.extend(self.allow.iter().filter_map(|(from, to)| match way {
            Way::Egress => tenants.contains(from).then_some(*to),
            Way::Ingress => tenants.contains(to).then_some(*from),
        }));
        self.groups.iter().map(|group| !group.is_disjoint(&others)).collect()
    }
}

/// Classes and groups by their numbers, and what is known of them.
pub(super) struct Numbered<'a> {
    pub(super) networks: &'a [NetworkPolicy],
    pub(super) peers: &'a Peers<'a>,
    /// Number 0 is no class.
    pub(super) classes: &'a [Class],
    /// Number 0 is no group.
    pub(super) groups: &'a [Group],
    pub(super) tenancy: &'a Tenancy,
}

impl Numbered<'_> {
    /// Adds the rules of all classes.
    pub(super) fn rules(&self, rules: &mut Rules) -> Result<(), PolicyError> {
        let mut of_peer: HashMap<PeerId, Vec<u32>> = HashMap::new();
        let mut of_name: HashMap<&str, Vec<u32>> = HashMap::new();
        for (number, group) in (0..).zip(self.groups) {
            for id in &group.peers {
                of_peer.entry(*id).or_default().push(number);
            }
            let names: BTreeSet<&str> = group.named.iter().map(|named| named.0.as_str()).collect();
            for name in names {
                of_name.entry(name).or_default().push(number);
            }
        }
        let nobody = BTreeSet::new();
        for way in Way::BOTH {
            let mut matter: HashMap<&BTreeSet<Tenant>, Vec<bool>> = HashMap::new();
            for (number, class) in (0..).zip(self.classes).skip(1) {
                let tenants = self.tenancy.classes.get(number as usize).unwrap_or(&nobody);
                let matter =
                    matter.entry(tenants).or_insert_with(|| self.tenancy.matter(way, tenants));
                let networks = class.networks.iter().map(|at| &self.networks[*at]);
                let policy = number << 2 | isolated(networks);
                self.of_class(rules, (way, policy, class), &of_peer, &of_name, matter)?;
            }
        }
        Ok(())
    }

    fn of_class(
        &self,
        rules: &mut Rules,
        (way, policy, class): (Way, u32, &Class),
        of_peer: &HashMap<PeerId, Vec<u32>>,
        of_name: &HashMap<&str, Vec<u32>>,
        matter: &[bool],
    ) -> Result<(), PolicyError> {
        let mut add = |group: u32, network: &NetworkPolicy, peer, rule| {
            let behind = self.groups.get(group as usize).filter(|_| group != 0);
            if group != 0 && !matter.get(group as usize).is_some_and(|matters| *matters) {
                return Ok(());
            }
            let ports = allowed(rule, way, class, peer, behind);
            rules.add_listed(way.scope(policy, group), &ports, network)
        };
        let networks = || class.networks.iter().map(|at| &self.networks[*at]);
        let all = || {
            networks()
                .flat_map(|it| way.rules(it).into_iter().flatten().map(move |rule| (it, rule)))
        };
        // What holds for anybody first: then it is not said again of each group.
        for (network, rule) in all().filter(|(_, rule)| rule.peers.is_none()) {
            add(0, network, None, rule)?;
            let names = rule.ports.iter().flatten().filter_map(|port| match &port.which {
                Which::Named(name) if way == Way::Egress => Some(name.as_str()),
                _ => None,
            });
            for group in names.filter_map(|name| of_name.get(name)).flatten() {
                add(*group, network, None, rule)?;
            }
        }
        for (network, rule) in all() {
            for peer in rule.peers.iter().flatten() {
                let groups = self.peers.id(peer).and_then(|id| of_peer.get(&id));
                for group in groups.into_iter().flatten() {
                    add(*group, network, Some(peer), rule)?;
                }
            }
        }
        Ok(())
    }
}
