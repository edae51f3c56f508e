//! Who may open what to whom: what the policy says about two addresses, whatever packets are.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::policy::Reason;
use crate::policy::abi::{
    ISOLATED_EGRESS, ISOLATED_INGRESS, Identity, Local, NODE, Pod, Prefix, Rule, Scope, Side,
};

/// What the maps say of addresses and rules, in one epoch.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// The node's addresses and those of its pods.
    pub locals: HashMap<IpAddr, Local>,
    /// Whose other addresses are.
    pub identities: HashMap<Prefix, Identity>,
    /// The policy of pods, by their namespace, whose labels are not known.
    pub spaces: HashMap<u32, u32>,
    /// What is allowed.
    pub rules: HashSet<Rule>,
}

/// Something that one side may want to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// The pod's address.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// IP protocol.
    pub proto: u8,
    /// Port of who does not open; 0 where there are none.
    pub port: u16,
    /// Who opens.
    pub opener: Side,
}

/// The peer, as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peer {
    /// Whether it is the node itself.
    pub node: bool,
    /// Its number if it is a pod of this node.
    pub pod: u16,
    /// Identity, with the group that it has as who it is now.
    pub identity: Identity,
}

impl Tables {
    /// The most specific identity of an address.
    #[must_use]
    pub fn identity(&self, ip: IpAddr) -> Option<Identity> {
        let matching = self.identities.iter().filter(|(prefix, _)| prefix.contains(ip));
        matching.max_by_key(|(prefix, _)| prefix.bits).map(|(_, identity)| *identity)
    }

    /// Who has an address. A pod of this node is who the node says, not who was said elsewhere to have its
    /// address: what is known of that one's labels counts if it is the same pod. Services by prefix, as the
    /// world is one, do not open what is a tenant's or the node's: who names these names them.
    #[must_use]
    pub fn peer(&self, ip: IpAddr) -> Option<Peer> {
        let said = self.identity(ip);
        // A Service's address that kube-proxy puts on a device of the node is the Service's.
        let claimed = said.is_some_and(|said| said.tenant != 0);
        let local = self.locals.get(&ip).filter(|local| local.pod != 0 || !claimed);
        let Some(local) = local else {
            let service = |it: &Identity| if it.tenant != 0 { it.near } else { it.service };
            let identity = said.map(|it| Identity { service: service(&it), ..it });
            return identity.map(|identity| Peer { identity, ..Peer::default() });
        };
        let said = said.unwrap_or_default();
        let identity = match local.pod {
            0 => Identity { tenant: 0, service: said.near, ..said },
            _ => {
                let same = local.name != 0 && said.name == local.name;
                let group = if same { said.group } else { 0 };
                let Local { name, tenant, .. } = *local;
                Identity { name, tenant, group, ..Identity::default() }
            }
        };
        Some(Peer { node: local.pod == 0, pod: local.pod, identity })
    }

    /// The NetworkPolicies of a pod: those of the very pod, or else what its namespace has for pods whose
    /// labels are not known.
    #[must_use]
    pub fn policy(&self, pod: &Pod, local: IpAddr) -> u32 {
        match self.identity(local) {
            Some(own) if pod.name != 0 && own.name == pod.name => own.policy,
            _ => self.spaces.get(&pod.space).copied().unwrap_or(0),
        }
    }

    fn allows(&self, scope: Scope, attempt: &Attempt) -> bool {
        let matching = self.rules.iter().filter(|rule| rule.scope == scope);
        matching.into_iter().any(|rule| rule.ports.contain(attempt.proto, attempt.port))
    }

    /// Whether a pod's side of the policy lets something be opened. Two things have to hold: the peer is of
    /// the same tenant, or a shared service, or allowed across tenants; and NetworkPolicies that select the
    /// pod list it, unless the peer is the node itself.
    pub fn verdict(&self, pod: &Pod, attempt: &Attempt) -> Result<Peer, Reason> {
        let Attempt { local, remote, opener, .. } = *attempt;
        let peer = self.peer(remote).ok_or(Reason::Unknown)?;
        let Identity { tenant, service, group, .. } = peer.identity;
        self.tenancy(pod, &peer, tenant, service, attempt)?;
        let policy = self.policy(pod, local);
        let (isolated, scope): (u32, fn(u32, u32) -> Scope) = match opener {
            Side::Vm => (ISOLATED_EGRESS, |policy, group| Scope::Egress { policy, group }),
            Side::Peer => (ISOLATED_INGRESS, |policy, group| Scope::Ingress { policy, group }),
        };
        if peer.node || policy & isolated == 0 {
            return Ok(peer);
        }
        let listed = |group| self.allows(scope(policy, group), attempt);
        if (group != 0 && listed(group)) || listed(0) {
            Ok(peer)
        } else {
            Err(Reason::NetworkPolicy)
        }
    }

    fn tenancy(
        &self,
        pod: &Pod,
        peer: &Peer,
        tenant: u32,
        service: u32,
        attempt: &Attempt,
    ) -> Result<(), Reason> {
        let opener = attempt.opener;
        let shared = |class| self.allows(Scope::Service { class, opener }, attempt);
        if tenant != 0 && tenant == pod.tenant {
            return Ok(());
        }
        if (peer.node && shared(NODE)) || (service != 0 && shared(service)) {
            return Ok(());
        }
        if tenant == 0 {
            let known = peer.node || service != 0;
            return Err(if known { Reason::Service } else { Reason::Unknown });
        }
        let (from, to) = match opener {
            Side::Vm => (pod.tenant, tenant),
            Side::Peer => (tenant, pod.tenant),
        };
        if pod.tenant != 0 && self.allows(Scope::Tenants { from, to }, attempt) {
            Ok(())
        } else {
            Err(Reason::Tenant)
        }
    }
}
