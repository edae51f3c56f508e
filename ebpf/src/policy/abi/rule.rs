//! What the policy says: whose prefixes are, and what is allowed.

use std::net::IpAddr;

use super::{Fields, Side, Tenant, address, part};

/// Class of the node's own addresses in `rules`.
pub const NODE: u32 = 1;
/// Part of a policy's number: what its pods may open is listed.
pub const ISOLATED_EGRESS: u32 = 1;
/// Part of a policy's number: what may be opened on its pods is listed.
pub const ISOLATED_INGRESS: u32 = 2;

/// Of `enum rule_kind`.
const TENANTS: u8 = 1;

/// Value of `active`: what is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Active {
    /// Leads the keys of `identities`, `spaces` and `rules`.
    pub epoch: u32,
    /// Counts changes of anything that a verdict depends on.
    pub generation: u32,
}

/// Key of `identities`, without its epoch: a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// An address in it.
    pub address: IpAddr,
    /// How many of its leading bits count.
    pub bits: u8,
}

impl Prefix {
    /// The bytes of `struct identity_key`.
    #[must_use]
    pub fn encode(&self, epoch: u32) -> [u8; 28] {
        let (family, words) = address(self.address);
        let fields = Fields::new().put((64 + u32::from(self.bits)).to_ne_bytes());
        fields.put(epoch.to_ne_bytes()).put(u32::from(family).to_ne_bytes()).put(words).bytes
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let (family, words) = address(ip);
        let (own_family, own) = address(self.address);
        let bits = u32::from(self.bits);
        let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
        family == own_family && (u128::from_be_bytes(words) ^ u128::from_be_bytes(own)) & mask == 0
    }
}

/// Value of `identities`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// [`name_digest`] of the pod that `group` and `policy` were made for; 0: not of one pod.
    pub name: u64,
    /// Whose the addresses are.
    pub tenant: Tenant,
    /// Class of shared services there; 0 for none.
    pub service: u32,
    /// Class of those that name this very address, and not a prefix around it: they alone open what is a
    /// tenant's or the node's.
    pub near: u32,
    /// What it is as a peer in NetworkPolicies; 0: in none.
    pub group: u32,
    /// The NetworkPolicies that select it, with [`ISOLATED_EGRESS`] and [`ISOLATED_INGRESS`]; 0: none.
    pub policy: u32,
}

impl Identity {
    /// The bytes of `struct identity`.
    #[must_use]
    pub fn encode(&self) -> [u8; 32] {
        let fields = Fields::new().put(self.name.to_ne_bytes()).put(self.tenant.to_ne_bytes());
        let fields = fields.put(self.service.to_ne_bytes()).put(self.near.to_ne_bytes());
        fields.put(self.group.to_ne_bytes()).put(self.policy.to_ne_bytes()).bytes
    }
}

/// What a [`Rule`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// What a class of addresses shares with all tenants.
    Service {
        /// The class.
        class: u32,
        /// Who may open it: [`Side::Vm`] the service's own ports, [`Side::Peer`] those of pods.
        opener: Side,
    },
    /// What one tenant may open to another.
    Tenants {
        /// Who opens.
        from: Tenant,
        /// To whom.
        to: Tenant,
    },
    /// What pods of a policy may open.
    Egress {
        /// The policy.
        policy: u32,
        /// To whom; 0: to anybody.
        group: u32,
    },
    /// What may be opened on pods of a policy.
    Ingress {
        /// The policy.
        policy: u32,
        /// By whom; 0: by anybody.
        group: u32,
    },
}

/// Protocols and ports of a [`Rule`]; the port is that of who does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// Every protocol.
    Any,
    /// Every port of an IP protocol, or one without ports.
    Protocol(u8),
    /// The ports of an IP protocol whose leading `bits` are those of `port`.
    Prefix {
        /// IP protocol.
        proto: u8,
        /// A port of them.
        port: u16,
        /// 1 to 16.
        bits: u8,
    },
}

impl Ports {
    /// Whether a packet of this protocol, to this port of who does not open, is meant.
    #[must_use]
    pub fn contain(&self, packet_proto: u8, packet_port: u16) -> bool {
        match *self {
            Self::Any => true,
            Self::Protocol(proto) => proto == packet_proto,
            Self::Prefix { proto, port, bits } => {
                let mask = u16::MAX.checked_shl(16 - u32::from(bits.min(16))).unwrap_or(0);
                proto == packet_proto && (port ^ packet_port) & mask == 0
            }
        }
    }

    /// The fewest [`Ports`] that together are `first` to `last` of a protocol.
    #[must_use]
    pub fn range(proto: u8, first: u16, last: u16) -> Vec<Self> {
        let (mut ports, mut at, end) = (Vec::new(), u32::from(first), u32::from(last) + 1);
        while at < end {
            let aligned = at.trailing_zeros().min(16);
            let fits = (end - at).ilog2();
            let free = aligned.min(fits);
            let port = u16::try_from(at).unwrap_or(u16::MAX);
            ports.push(match 16 - free {
                0 => Self::Protocol(proto),
                bits => Self::Prefix { proto, port, bits: bits as u8 },
            });
            at += 1 << free;
        }
        ports
    }
}

/// Key of `rules`, without its epoch: something that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// To whom.
    pub scope: Scope,
    /// What.
    pub ports: Ports,
}

impl Rule {
    /// The bytes of `struct rule_key`.
    #[must_use]
    pub fn encode(&self, epoch: u32) -> [u8; 20] {
        let (kind, subject, object) = match self.scope {
            Scope::Service { class, opener } => (0_u8, class, opener as u32),
            Scope::Tenants { from, to } => (TENANTS, from, to),
            Scope::Egress { policy, group } => (2, policy, group),
            Scope::Ingress { policy, group } => (3, policy, group),
        };
        let (bits, proto, port) = match self.ports {
            Ports::Any => (104, 0, 0),
            Ports::Protocol(proto) => (112, proto, 0),
            Ports::Prefix { proto, port, bits } => (112 + u32::from(bits.min(16)), proto, port),
        };
        let fields = Fields::new().put(u32::to_ne_bytes(bits)).put(epoch.to_ne_bytes());
        let fields = fields.put(subject.to_ne_bytes()).put(object.to_ne_bytes());
        fields.put([kind, proto]).put(port.to_be_bytes()).bytes
    }
}

/// Whose addresses are, by the bytes of `struct identity`.
#[must_use]
pub fn identity_tenant(identity: &[u8; 32]) -> Tenant {
    u32::from_ne_bytes(part(identity, 8))
}

/// The tenants that a key of `rules` is about.
#[must_use]
pub fn rule_tenants(key: &[u8; 20]) -> Option<[Tenant; 2]> {
    (key[16] == TENANTS).then(|| [8, 12].map(|at| u32::from_ne_bytes(part(key, at))))
}

/// The namespace of a key of `spaces`.
#[must_use]
pub fn space_of(key: &[u8; 8]) -> u32 {
    u32::from_ne_bytes(part(key, 4))
}

/// Key of `spaces`: the policy of pods of a namespace whose labels are not known.
#[must_use]
pub fn space_key(epoch: u32, space: u32) -> [u8; 8] {
    Fields::new().put(epoch.to_ne_bytes()).put(space.to_ne_bytes()).bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ports_are_exact() {
        for (first, last) in [(0, 65535), (80, 80), (1, 65535), (1000, 2000), (65535, 65535)] {
            let ports = Ports::range(6, first, last);
            assert!(ports.len() <= 30, "{ports:?}");
            for port in 0..=65535 {
                let within = (first..=last).contains(&port);
                assert_eq!(ports.iter().filter(|it| it.contain(6, port)).count(), within.into());
            }
        }
    }

    #[test]
    fn who_is_meant_is_read_from_the_bytes() {
        let rule = |scope| Rule { scope, ports: Ports::Protocol(6) }.encode(9);
        assert_eq!(rule_tenants(&rule(Scope::Tenants { from: 3, to: 5 })), Some([3, 5]));
        for scope in [
            Scope::Service { class: 3, opener: Side::Vm },
            Scope::Egress { policy: 3, group: 5 },
            Scope::Ingress { policy: 3, group: 5 },
        ] {
            assert_eq!(rule_tenants(&rule(scope)), None);
        }
        let identity = Identity { tenant: 7, group: 3, ..Identity::default() };
        assert_eq!(identity_tenant(&identity.encode()), 7);
        assert_eq!(space_of(&space_key(9, 4)), 4);
    }

    #[test]
    fn a_prefix_holds_its_own_family_only() {
        let prefix = |text: &str, bits| Prefix { address: text.parse().unwrap(), bits };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(prefix("0.0.0.0", 0).contains(ip("10.1.2.3")));
        assert!(!prefix("::", 0).contains(ip("10.1.2.3")));
        assert!(prefix("10.1.0.0", 16).contains(ip("10.1.2.3")));
        assert!(!prefix("10.1.0.0", 16).contains(ip("10.2.2.3")));
        assert!(prefix("fd00::1", 128).contains(ip("fd00::1")));
        assert!(!prefix("fd00::1", 128).contains(ip("fd00::2")));
    }
}
