//! Kubernetes NetworkPolicies (`networking.k8s.io/v1`), read and checked as the API server would.

use joey_ebpf::policy::abi::Prefix;
use serde::Deserialize;

use super::cidr;
use super::entry::{PortRef, Protocol};
use super::error::Fault;
use super::selector::{RawSelector, Selector};

/// `spec` as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSpec {
    #[serde(default)]
    pod_selector: Option<RawSelector>,
    #[serde(default)]
    policy_types: Option<Vec<String>>,
    #[serde(default)]
    ingress: Option<Vec<RawIngress>>,
    #[serde(default)]
    egress: Option<Vec<RawEgress>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawIngress {
    from: Option<Vec<RawPeer>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawEgress {
    to: Option<Vec<RawPeer>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct RawPeer {
    pod_selector: Option<RawSelector>,
    namespace_selector: Option<RawSelector>,
    ip_block: Option<RawBlock>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBlock {
    cidr: String,
    #[serde(default)]
    except: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    protocol: Option<String>,
    port: Option<PortRef>,
    end_port: Option<u16>,
}

/// Which namespaces a peer's pods are in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Spaces {
    /// That of the policy.
    Own(String),
    /// Those with such labels.
    Matching(Selector),
}

/// A peer of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Peer {
    /// Pods.
    Pods(Spaces, Selector),
    /// Addresses.
    Block {
        /// These,
        cidr: Prefix,
        /// without those.
        except: Vec<Prefix>,
    },
}

/// Ports of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Port {
    pub(super) protocol: Protocol,
    pub(super) which: Which,
}

/// Which ports of a protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Which {
    All,
    Range(u16, u16),
    Named(String),
}

/// What is allowed: any of the ports with any of the peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// `None`: anybody.
    pub(super) peers: Option<Vec<Peer>>,
    /// `None`: everything, whatever its protocol.
    pub(super) ports: Option<Vec<Port>>,
}

/// A checked NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetworkPolicy {
    /// How messages call its document.
    pub(super) label: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) selector: Selector,
    /// What may be opened on the pods; `None`: the policy is not about that.
    pub(super) ingress: Option<Vec<Rule>>,
    /// What the pods may open; `None`: the policy is not about that.
    pub(super) egress: Option<Vec<Rule>>,
}

impl NetworkPolicy {
    /// One that lists nothing, for the pods of a selector that can be read, or else all of the namespace.
    pub(super) fn isolating(
        label: &str,
        namespace: &str,
        name: &str,
        selector: Option<RawSelector>,
    ) -> Self {
        let all = || RawSelector::default().check().unwrap_or_default();
        Self {
            label: label.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            selector: selector.and_then(|raw| raw.check().ok()).unwrap_or_else(all),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
        }
    }

    pub(super) fn check(
        label: &str,
        namespace: String,
        name: String,
        raw: RawSpec,
    ) -> Result<Self, Fault> {
        let selector = raw.pod_selector.unwrap_or_default().check();
        let selector = selector.map_err(|fault| fault.within("podSelector"))?;
        let types = raw.policy_types.unwrap_or_default();
        for (at, kind) in types.iter().enumerate() {
            if !matches!(kind.as_str(), "Ingress" | "Egress") {
                let path = format!("policyTypes[{at}]");
                return Err(Fault::new(path, kind, "must be Ingress or Egress"));
            }
        }
        let ingress =
            raw.ingress.unwrap_or_default().into_iter().map(|rule| (rule.from, rule.ports));
        let egress = raw.egress.unwrap_or_default().into_iter().map(|rule| (rule.to, rule.ports));
        let ingress = rules("ingress", "from", ingress, &namespace)?;
        let egress = rules("egress", "to", egress, &namespace)?;
        let is = |kind| types.iter().any(|other| other == kind);
        // What the API server sets where nothing is said.
        let (of_ingress, of_egress) = match types.is_empty() {
            true => (true, !egress.is_empty()),
            false => (is("Ingress"), is("Egress")),
        };
        Ok(Self {
            label: label.to_owned(),
            namespace,
            name,
            selector,
            ingress: of_ingress.then_some(ingress),
            egress: of_egress.then_some(egress),
        })
    }
}

/// Peers and ports of a rule.
type RawRule = (Option<Vec<RawPeer>>, Option<Vec<RawPort>>);

fn rules(
    field: &str,
    side: &str,
    raw: impl Iterator<Item = RawRule>,
    namespace: &str,
) -> Result<Vec<Rule>, Fault> {
    let rule = |(at, (peers, ports)): (usize, RawRule)| {
        let within = |part: &str, inner: usize| format!("{field}[{at}].{part}[{inner}]");
        let peers = peers.unwrap_or_default().into_iter().enumerate().map(|(inner, peer)| {
            peer.check(namespace).map_err(|fault| fault.within(&within(side, inner)))
        });
        let ports = ports.unwrap_or_default().into_iter().enumerate().map(|(inner, port)| {
            port.check().map_err(|fault| fault.within(&within("ports", inner)))
        });
        let peers: Vec<Peer> = peers.collect::<Result<_, _>>()?;
        let ports: Vec<Port> = ports.collect::<Result<_, _>>()?;
        let peers = (!peers.is_empty()).then_some(peers);
        Ok(Rule { peers, ports: (!ports.is_empty()).then_some(ports) })
    };
    raw.enumerate().map(rule).collect()
}

impl RawPeer {
    fn check(self, namespace: &str) -> Result<Peer, Fault> {
        let Self { pod_selector, namespace_selector, ip_block } = self;
        if let Some(block) = ip_block {
            if pod_selector.is_some() || namespace_selector.is_some() {
                let reason = "must be without podSelector and namespaceSelector: those are peers of their own";
                return Err(Fault::new("ipBlock", block.cidr, reason));
            }
            return block.check().map_err(|fault| fault.within("ipBlock"));
        }
        if pod_selector.is_none() && namespace_selector.is_none() {
            let reason = "must have podSelector, namespaceSelector or ipBlock; {} as podSelector is every pod";
            return Err(Fault::new("", "{}", reason));
        }
        let pods = pod_selector.unwrap_or_default().check();
        let pods = pods.map_err(|fault| fault.within("podSelector"))?;
        let spaces = match namespace_selector {
            None => Spaces::Own(namespace.to_owned()),
            Some(raw) => {
                let selector = raw.check();
                Spaces::Matching(selector.map_err(|fault| fault.within("namespaceSelector"))?)
            }
        };
        Ok(Peer::Pods(spaces, pods))
    }
}

impl RawBlock {
    fn check(self) -> Result<Peer, Fault> {
        let parse = |path: String, text: &String| {
            let fault = |reason| Fault::new(path.clone(), text, reason);
            if !text.contains('/') {
                return Err(fault("must have a prefix length, as 10.0.0.0/8".to_owned()));
            }
            cidr::parse(text).map_err(fault)
        };
        let cidr = parse("cidr".to_owned(), &self.cidr)?;
        let mut except = Vec::new();
        for (at, text) in self.except.iter().flatten().enumerate() {
            let path = format!("except[{at}]");
            let part = parse(path.clone(), text)?;
            if !cidr::covers(cidr, part) || part == cidr {
                let reason = format!("must be a part of {} and not all of it", self.cidr);
                return Err(Fault::new(path, text, reason));
            }
            except.push(part);
        }
        except.sort();
        except.dedup();
        Ok(Peer::Block { cidr, except })
    }
}

impl RawPort {
    fn check(self) -> Result<Port, Fault> {
        let protocol = match self.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => {
                let reason = "is not supported: only TCP, UDP and ICMP pass a pod's wire";
                return Err(Fault::new("protocol", "SCTP", reason));
            }
            Some(other) => return Err(Fault::new("protocol", other, "must be TCP or UDP")),
        };
        let which = match (self.port, self.end_port) {
            (None, None) => Which::All,
            (None, Some(end)) => {
                return Err(Fault::new(
                    "endPort",
                    end,
                    "must be with port, the first of the range",
                ));
            }
            (Some(PortRef::Number(0)), _) => {
                return Err(Fault::new("port", 0, "must be 1 to 65535"));
            }
            (Some(PortRef::Number(first)), None) => Which::Range(first, first),
            (Some(PortRef::Number(first)), Some(last)) if first <= last => {
                Which::Range(first, last)
            }
            (Some(PortRef::Number(first)), Some(last)) => {
                return Err(Fault::new(
                    "endPort",
                    last,
                    format!("must not be below port, {first}"),
                ));
            }
            (Some(PortRef::Name(name)), Some(_)) => {
                return Err(Fault::new(
                    "endPort",
                    name,
                    "must be with a number as port, not a name",
                ));
            }
            (Some(PortRef::Name(name)), None) => {
                let fine = name.len() <= 15
                    && name.bytes().any(|byte| byte.is_ascii_lowercase())
                    && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
                if !fine {
                    let reason = "must be a number, or a port's name: 1 to 15 of a-z, 0-9 and -, with a letter";
                    return Err(Fault::new("port", name, reason));
                }
                Which::Named(name)
            }
        };
        Ok(Port { protocol, which })
    }
}
