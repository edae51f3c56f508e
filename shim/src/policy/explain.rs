//! What would happen to a packet, and why: the verdict of the specification on what is compiled, with the rule
//! that decides named.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::{
    ISOLATED_EGRESS, ISOLATED_INGRESS, Local, Pod, PodId, Ports, Side, Tenant, name_digest,
};
use joey_ebpf::policy::maps::Maps;
use joey_ebpf::policy::model::{Attempt, Peer, Tables};
use serde::Serialize;

use super::apply::{Merged, numbers_from};
use super::change::Change;
use super::compile::{Compiled, Meaning, Way, allowed, compile};
use super::entry::{Entry, Kind};
use super::error::PolicyError;
use super::network_policy::Peer as Listed;
use super::node::NodePolicy;
use super::ports::show;
use super::state::Store;
use crate::config::Config;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// Who opens.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// IP protocol.
    pub proto: u8,
    /// Port of `to`; 0 where there are none.
    pub port: u16,
}

/// What one pod's wire says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Judged {
    /// The pod, or its address if it has no name.
    pub pod: String,
    /// Whether the pod opens (`egress`) or is opened (`ingress`).
    pub way: &'static str,
    /// Whether it lets it.
    pub allowed: bool,
    /// Whether the pod is on this node. If not, this is what its own node says by the same policy.
    pub here: bool,
    /// The pod's tenant.
    pub tenant: String,
    /// The peer, as it is known.
    pub peer: String,
    /// Why, step by step.
    pub why: Vec<String>,
}

/// A policy that can be asked.
#[derive(Debug)]
pub struct Oracle {
    tables: Tables,
    pods: HashMap<PodId, Pod>,
    names: HashMap<u32, String>,
    by_name: HashMap<String, u32>,
    meaning: Meaning,
    merged: Merged,
    /// Epoch in force, and that of what was read; `None` where the policy is not loaded.
    epochs: Option<(u32, u32)>,
}

impl Oracle {
    /// What would be in force after a change, with the pods that are on this node now.
    ///
    /// # Errors
    /// What was applied before cannot be read, or the change is refused.
    pub fn open(config: &Config, change: Change) -> Result<Self, PolicyError> {
        let merged = Merged::new(&Store::new(&config.state_dir), change)?;
        let (mut pods, mut locals, mut known) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut epochs = None;
        match Maps::open(&config.bpf_dir) {
            Ok(maps) => {
                (pods, locals) = (maps.pods()?, maps.locals()?);
                known = maps.names()?.into_iter().map(|(number, name)| (name, number)).collect();
                epochs = Some((maps.active()?.epoch, merged.epoch()));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(cause) => {
                let (path, step) = (config.bpf_dir.clone(), "open its maps");
                return Err(PolicyError::NotLoaded { path, step, cause });
            }
        }
        Self::new(merged, pods, locals, known, epochs)
    }

    pub(super) fn new(
        merged: Merged,
        pods: HashMap<PodId, Pod>,
        locals: HashMap<IpAddr, Local>,
        known: HashMap<String, u32>,
        epochs: Option<(u32, u32)>,
    ) -> Result<Self, PolicyError> {
        let mut by_name = known.clone();
        let mut number = numbers_from(known);
        let entries = merged.input().entries.iter();
        for name in entries.flat_map(|entry| [entry.tenant(), &entry.namespace]) {
            if !name.is_empty() && !by_name.contains_key(name) {
                by_name.insert(name.to_owned(), number(name)?);
            }
        }
        let mut given = |name: &str| {
            let it = number(name)?;
            by_name.insert(name.to_owned(), it);
            Ok(it)
        };
        let Compiled { identities, spaces, rules, meaning, .. } =
            compile(merged.input(), &mut given)?;
        let names = by_name.iter().map(|(name, number)| (*number, name.clone())).collect();
        let tables = Tables {
            locals,
            identities: identities.into_iter().collect(),
            spaces: spaces.into_iter().collect(),
            rules: rules.into_iter().collect::<HashSet<_>>(),
        };
        Ok(Self { tables, pods, names, by_name, meaning, merged, epochs })
    }

    /// Whether what was applied last is not what is in force: a step was interrupted.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.epochs.is_some_and(|(active, read)| read != 0 && active != read)
    }

    /// The addresses of a pod, `namespace/name`: as this node knows them, or else as the identities say.
    #[must_use]
    pub fn addresses(&self, pod: &str) -> Vec<IpAddr> {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let digest = name_digest(namespace, name);
        let here = self.tables.locals.iter();
        let here = here.filter(|(_, local)| local.pod != 0 && local.name == digest);
        let mut found: Vec<IpAddr> = here.map(|(address, _)| *address).collect();
        if found.is_empty() {
            let entries = self.merged.input().entries.iter();
            let is = |entry: &&Entry| entry.namespace == namespace && entry.name == name;
            found.extend(entries.filter(is).map(|entry| entry.address));
        }
        found.sort();
        found
    }

    /// What the wires on the way say, that of who opens first. Empty: neither is a pod.
    #[must_use]
    pub fn ask(&self, question: &Question) -> Vec<Judged> {
        let Question { from, to, proto, port } = *question;
        let egress = Attempt { local: from, remote: to, proto, port, opener: Side::Vm };
        let ingress = Attempt { local: to, remote: from, proto, port, opener: Side::Peer };
        [egress, ingress].iter().filter_map(|attempt| self.judge(attempt)).collect()
    }

    fn entry(&self, address: IpAddr) -> Option<&Entry> {
        self.merged.input().entries.iter().find(|entry| entry.address == address)
    }

    fn number(&self, name: &str) -> u32 {
        self.by_name.get(name).copied().unwrap_or(0)
    }

    fn judge(&self, attempt: &Attempt) -> Option<Judged> {
        let local = self.tables.locals.get(&attempt.local);
        let here = local.and_then(|local| self.pods.get(&local.pod));
        let entry = self.entry(attempt.local);
        let pod = match (here, local, entry) {
            (Some(pod), ..) => *pod,
            // It is the node.
            (None, Some(_), _) => return None,
            (None, None, Some(entry)) if entry.kind == Kind::Pod => Pod {
                since: 0,
                name: name_digest(&entry.namespace, &entry.name),
                tenant: self.number(entry.tenant()),
                space: self.number(&entry.namespace),
                table: 0,
                limited: false,
                other_end: None,
                mac: [0; 6],
            },
            _ => return None,
        };
        let verdict = self.tables.verdict(&pod, attempt);
        let peer = self.tables.peer(attempt.remote);
        let mut why = Vec::new();
        match verdict {
            Err(Reason::Unknown) => why.push(
                "nobody said whose the peer's address is: it is in no identity, and no service has it"
                    .to_owned(),
            ),
            _ => {
                let peer = peer.unwrap_or_default();
                why.push(self.tenancy(&pod, &peer, attempt));
                if !matches!(verdict, Err(Reason::Service | Reason::Tenant)) {
                    why.push(self.networks(&pod, &peer, attempt));
                }
            }
        }
        Some(Judged {
            pod: self.pod_name(&pod, attempt.local),
            way: match attempt.opener {
                Side::Vm => "egress",
                Side::Peer => "ingress",
            },
            allowed: verdict.is_ok(),
            here: here.is_some(),
            tenant: self.name(pod.tenant),
            peer: self.peer_name(peer.as_ref(), attempt.remote),
            why,
        })
    }

    fn name(&self, number: Tenant) -> String {
        let name = self.names.get(&number).cloned();
        name.unwrap_or_else(|| if number == 0 { "none".into() } else { format!("number {number}") })
    }

    fn pod_name(&self, pod: &Pod, address: IpAddr) -> String {
        match self.entry(address).filter(|it| name_digest(&it.namespace, &it.name) == pod.name) {
            Some(entry) => format!("{}/{} ({address})", entry.namespace, entry.name),
            None if pod.space != 0 => format!("{address} in {}", self.name(pod.space)),
            None => address.to_string(),
        }
    }

    fn peer_name(&self, peer: Option<&Peer>, address: IpAddr) -> String {
        let Some(peer) = peer else { return format!("{address}, unknown") };
        let tenant = self.name(peer.identity.tenant);
        if peer.node {
            return format!("{address}, the node itself");
        }
        let name = match self.entry(address) {
            Some(entry)
                if peer.pod == 0
                    || name_digest(&entry.namespace, &entry.name) == peer.identity.name =>
            {
                let kind = if entry.kind == Kind::Service { "Service " } else { "" };
                format!("{kind}{}/{} ({address})", entry.namespace, entry.name)
            }
            _ => address.to_string(),
        };
        let services = self.services(peer.identity.service);
        let services: Vec<&str> = services.iter().map(|(_, name, _)| *name).collect();
        match (peer.identity.tenant, services.is_empty()) {
            (0, true) => format!("{name}, of no tenant"),
            (0, false) => format!("{name}, shared service {}", services.join(", ")),
            (_, true) => format!("{name} of tenant {tenant}"),
            (_, false) => {
                format!("{name} of tenant {tenant}, shared service {}", services.join(", "))
            }
        }
    }

    fn node(&self) -> NodePolicy {
        self.merged.checked().node.clone().unwrap_or_else(NodePolicy::absent)
    }

    fn services(&self, class: u32) -> Vec<(usize, &str, &super::node::Shared)> {
        let Some(node) = &self.merged.checked().node else { return Vec::new() };
        let at = self.meaning.services(class).iter();
        let service = |at: &usize| node.services.get(*at).map(|it| (*at, &*it.name, &it.shared));
        at.filter_map(service).collect()
    }

    fn tenancy(&self, pod: &Pod, peer: &Peer, attempt: &Attempt) -> String {
        let node = self.node();
        let label = &node.label;
        let tenant = peer.identity.tenant;
        if tenant != 0 && tenant == pod.tenant {
            return format!("both are of tenant {}", self.name(tenant));
        }
        let (field, what) = match attempt.opener {
            Side::Vm => ("ports", "may be opened there"),
            Side::Peer => ("opens", "may be opened from there"),
        };
        let of = |shared: &super::node::Shared| match attempt.opener {
            Side::Vm => find(&shared.ports, attempt),
            Side::Peer => find(&shared.opens, attempt),
        };
        if peer.node
            && let Some(ports) = of(&node.node)
        {
            return format!("{label}: spec.node.{field}: {ports} {what}");
        }
        let services = self.services(peer.identity.service);
        for (at, name, shared) in &services {
            if let Some(ports) = of(shared) {
                return format!("{label}: spec.services[{at}] ({name}).{field}: {ports} {what}");
            }
        }
        let names: Vec<&str> = services.iter().map(|(_, name, _)| *name).collect();
        let shared = match (peer.node, names.is_empty()) {
            (true, true) => format!("{label}: spec.node.{field} does not list it"),
            (true, false) => {
                format!("{label}: {field} of spec.node and of {} do not list it", names.join(", "))
            }
            (false, true) => "no shared service has the peer's address".to_owned(),
            (false, false) => format!("{label}: {field} of {} do not list it", names.join(", ")),
        };
        if tenant == 0 {
            return shared;
        }
        let (from, to) = match attempt.opener {
            Side::Vm => (pod.tenant, tenant),
            Side::Peer => (tenant, pod.tenant),
        };
        let (from, to) = (self.name(from), self.name(to));
        let entries = self.merged.input().entries;
        let known = |name: &str| entries.iter().any(|entry| entry.tenant() == name);
        for (at, allow) in node.allow.iter().enumerate() {
            if allow.is_about(&from, &to, known)
                && let Some(ports) = find(&allow.ports, attempt)
            {
                return format!("{label}: spec.allow[{at}]: {from} may open {ports} of {to}");
            }
        }
        format!(
            "tenant {from} may not open it to tenant {to}: no spec.allow lists it, and {shared}"
        )
    }

    /// What NetworkPolicies say where tenancy allows.
    fn networks(&self, pod: &Pod, peer: &Peer, attempt: &Attempt) -> String {
        let policy = self.tables.policy(pod, attempt.local);
        let (way, isolated, field) = match attempt.opener {
            Side::Vm => (Way::Egress, ISOLATED_EGRESS, "egress"),
            Side::Peer => (Way::Ingress, ISOLATED_INGRESS, "ingress"),
        };
        if policy & isolated == 0 {
            return format!("no NetworkPolicy is about the pod's {field}");
        }
        if peer.node {
            return format!("NetworkPolicies about its {field} do not hold for the node itself");
        }
        let Some(class) = self.meaning.class(policy) else {
            return format!(
                "the pod's labels are not known, and NetworkPolicies of its namespace are about {field}: \
                 as if all selected it and listed nothing, until its identity is fed"
            );
        };
        let all = &self.merged.checked().networks;
        let group = self.meaning.groups.get(peer.identity.group as usize);
        let mut about = Vec::new();
        for network in class.networks.iter().filter_map(|at| all.get(*at)) {
            let Some(rules) = way.rules(network) else { continue };
            about.push(network.label.as_str());
            for (at, rule) in rules.iter().enumerate() {
                let listed: Vec<(Option<usize>, Option<&Listed>)> = match &rule.peers {
                    None => vec![(None, None)],
                    Some(peers) => {
                        peers.iter().enumerate().map(|(n, it)| (Some(n), Some(it))).collect()
                    }
                };
                for (number, it) in listed {
                    let is = it.is_none_or(|it| {
                        let mut own = group.iter().flat_map(|group| &group.peers);
                        own.any(|id| self.meaning.peers.get(*id as usize) == Some(it))
                    });
                    let ports = allowed(rule, way, class, it, group);
                    if is && let Some(ports) = find(&ports, attempt) {
                        let side = if way == Way::Egress { "to" } else { "from" };
                        let peer = number.map_or_else(String::new, |n| format!(".{side}[{n}]"));
                        let who = it.map_or_else(|| "anybody".to_owned(), describe);
                        return format!(
                            "{}: spec.{field}[{at}]{peer}: {ports} with {who}",
                            network.label
                        );
                    }
                }
            }
        }
        format!("selected by {}, and no rule of {field} lists it", about.join(", "))
    }
}

fn find(ports: &[Ports], attempt: &Attempt) -> Option<String> {
    ports.iter().find(|ports| ports.contain(attempt.proto, attempt.port)).map(show)
}

fn describe(peer: &Listed) -> String {
    use super::network_policy::Spaces;
    match peer {
        Listed::Block { cidr, except } if except.is_empty() => super::cidr::show(*cidr),
        Listed::Block { cidr, except } => {
            let except: Vec<String> = except.iter().map(|it| super::cidr::show(*it)).collect();
            format!("{} without {}", super::cidr::show(*cidr), except.join(", "))
        }
        Listed::Pods(Spaces::Own(space), pods) => format!("pods of {space}: {pods}"),
        Listed::Pods(Spaces::Matching(spaces), pods) => {
            format!("namespaces: {spaces}; pods: {pods}")
        }
    }
}

/// Reads `443/tcp`, `53/udp`, `icmp`.
///
/// # Errors
/// It is something else.
pub fn parse_port(text: &str) -> Result<(u8, u16), String> {
    let wrong = || format!("port {text:?} must be as 443/tcp, 53/udp, or icmp");
    if text == "icmp" {
        return Ok((super::ports::ICMP, 0));
    }
    let (port, proto) = text.split_once('/').ok_or_else(wrong)?;
    let proto = match proto {
        "tcp" => super::ports::TCP,
        "udp" => super::ports::UDP,
        _ => return Err(wrong()),
    };
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    Ok((proto, port))
}
