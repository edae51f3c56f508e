//! The node policy: what all tenants share, and what some may open to others.

use joey_ebpf::policy::abi::{Ports, Prefix};
use serde::Deserialize;

use super::cidr;
use super::error::Fault;
use super::ports;
use crate::mesh::{MODES, Mode, Namespaces};
use crate::services::Shared as SharedServices;

/// `spec` as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawNode {
    node: Option<RawShared>,
    services: Option<Vec<RawService>>,
    allow: Option<Vec<RawAllow>>,
    mesh: Option<Vec<RawMesh>>,
    #[serde(rename = "sharedServices")]
    shared_services: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawShared {
    ports: Option<Vec<String>>,
    opens: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: String,
    addresses: Vec<String>,
    #[serde(default)]
    except: Option<Vec<String>>,
    #[serde(default)]
    ports: Option<Vec<String>>,
    #[serde(default)]
    opens: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAllow {
    from: String,
    to: String,
    ports: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMesh {
    namespaces: Vec<String>,
    mode: String,
}

/// What is shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shared {
    /// What pods may open there.
    pub(super) ports: Vec<Ports>,
    /// What may be opened on pods from there.
    pub(super) opens: Vec<Ports>,
}

/// A shared service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) addresses: Vec<Prefix>,
    /// Parts of `addresses` that are not of the service.
    pub(super) except: Vec<Prefix>,
    pub(super) shared: Shared,
}

/// In `allow`: every tenant that has an address in the identity table.
pub(super) const EVERY: &str = "*";

/// What a tenant may open to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Allow {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) ports: Vec<Ports>,
}

/// A checked node policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodePolicy {
    /// How messages call its document.
    pub(super) label: String,
    /// The node's own addresses.
    pub(super) node: Shared,
    pub(super) services: Vec<Service>,
    pub(super) allow: Vec<Allow>,
    /// How pods of these namespaces are in a mesh where they do not say it themselves.
    pub(super) mesh: Namespaces,
    /// What all tenants see of the services that guests translate.
    pub(super) shared_services: SharedServices,
}

impl NodePolicy {
    /// What holds where there is no node policy: the node itself may open any port of any pod, for the
    /// kubelet's probes, and nothing else is shared.
    pub(super) fn absent() -> Self {
        let node = Shared { ports: Vec::new(), opens: vec![Ports::Any] };
        Self {
            label: "no NodePolicy".into(),
            node,
            services: Vec::new(),
            allow: Vec::new(),
            mesh: Namespaces::new(),
            shared_services: SharedServices::default(),
        }
    }

    pub(super) fn check(label: &str, raw: RawNode) -> Result<Self, Fault> {
        let mut policy = Self { label: label.to_owned(), ..Self::absent() };
        if let Some(RawShared { ports, opens }) = raw.node {
            policy.node.ports = words("node.ports", ports.unwrap_or_default())?;
            if let Some(opens) = opens {
                policy.node.opens = words("node.opens", opens)?;
            }
        }
        for (at, service) in raw.services.into_iter().flatten().enumerate() {
            let service =
                service.check().map_err(|fault| fault.within(&format!("services[{at}]")))?;
            if policy.services.iter().any(|other| other.name == service.name) {
                let path = format!("services[{at}].name");
                return Err(Fault::new(
                    path,
                    service.name,
                    "must be another than that of a service before",
                ));
            }
            policy.services.push(service);
        }
        for (at, allow) in raw.allow.into_iter().flatten().enumerate() {
            let allow = allow.check().map_err(|fault| fault.within(&format!("allow[{at}]")))?;
            policy.allow.push(allow);
        }
        for (at, mesh) in raw.mesh.into_iter().flatten().enumerate() {
            let fault = |fault: Fault| fault.within(&format!("mesh[{at}]"));
            mesh.check(&mut policy.mesh).map_err(fault)?;
        }
        let shared = raw.shared_services.unwrap_or_default();
        policy.shared_services = SharedServices::new("sharedServices", shared)?;
        Ok(policy)
    }
}

fn words(path: &str, words: Vec<String>) -> Result<Vec<Ports>, Fault> {
    let mut all = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let ports = ports::parse(word);
        all.extend(ports.map_err(|reason| Fault::new(format!("{path}[{at}]"), word, reason))?);
    }
    all.sort();
    all.dedup();
    Ok(all)
}

fn prefixes(path: &str, texts: &[String]) -> Result<Vec<Prefix>, Fault> {
    let prefix = |(at, text): (usize, &String)| {
        cidr::parse(text).map_err(|reason| Fault::new(format!("{path}[{at}]"), text, reason))
    };
    texts.iter().enumerate().map(prefix).collect()
}

/// Checks the name of a tenant, or another that people give.
pub(super) fn name(path: &str, name: String) -> Result<String, Fault> {
    let fine = !name.is_empty() && name.len() <= 253 && !name.contains(char::is_control);
    if fine && name.trim() == name {
        return Ok(name);
    }
    let reason = "must be a name of 1 to 253 bytes, without blanks around it";
    Err(Fault::new(path, name, reason))
}

impl RawService {
    fn check(self) -> Result<Service, Fault> {
        let name = name("name", self.name)?;
        let addresses = prefixes("addresses", &self.addresses)?;
        if addresses.is_empty() {
            return Err(Fault::new("addresses", "[]", "must have at least one"));
        }
        let texts = self.except.unwrap_or_default();
        let except = prefixes("except", &texts)?;
        for (at, (text, except)) in texts.iter().zip(&except).enumerate() {
            let fault = |reason: String| Err(Fault::new(format!("except[{at}]"), text, reason));
            if !addresses.iter().any(|address| cidr::covers(*address, *except)) {
                return fault("must be a part of one of the addresses".to_owned());
            }
            if let Some(lost) = addresses.iter().find(|address| cidr::covers(*except, **address)) {
                return fault(format!("takes all of {} away", cidr::show(*lost)));
            }
        }
        let shared = Shared {
            ports: words("ports", self.ports.unwrap_or_default())?,
            opens: words("opens", self.opens.unwrap_or_default())?,
        };
        if shared.ports.is_empty() && shared.opens.is_empty() {
            let reason = "one of ports (what pods may open there) and opens (what these may open on pods) \
                          must be there";
            return Err(Fault::new("ports", "[]", reason));
        }
        Ok(Service { name, addresses, except, shared })
    }
}

impl Allow {
    /// Whether it is about these two. `known` says which tenants every one is.
    pub(super) fn is_about(&self, from: &str, to: &str, known: impl Fn(&str) -> bool) -> bool {
        let is = |said: &str, name: &str| said == name || (said == EVERY && known(name));
        is(&self.from, from) && is(&self.to, to)
    }
}

impl RawAllow {
    fn check(self) -> Result<Allow, Fault> {
        let (from, to) = (name("from", self.from)?, name("to", self.to)?);
        if from == EVERY && to == EVERY {
            let reason = "must be a tenant where from is every one: there would be no tenants";
            return Err(Fault::new("to", to, reason));
        }
        if from == to {
            return Err(Fault::new(
                "to",
                to,
                "is from, too: within a tenant everything is allowed",
            ));
        }
        let ports = words("ports", self.ports)?;
        if ports.is_empty() {
            return Err(Fault::new("ports", "[]", "must have at least one, or any"));
        }
        Ok(Allow { from, to, ports })
    }
}

impl RawMesh {
    fn check(self, all: &mut Namespaces) -> Result<(), Fault> {
        let Some(mode) = Mode::named(&self.mode) else {
            return Err(Fault::new("mode", self.mode, format!("must be {MODES}")));
        };
        if self.namespaces.is_empty() {
            return Err(Fault::new("namespaces", "[]", "must have at least one, or \"*\""));
        }
        for (at, namespace) in self.namespaces.into_iter().enumerate() {
            let namespace = name(&format!("namespaces[{at}]"), namespace)?;
            if all.insert(namespace.clone(), mode).is_some() {
                let path = format!("namespaces[{at}]");
                return Err(Fault::new(path, namespace, "must be named once"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Documents;
    use super::*;

    fn node(spec: &str) -> Result<NodePolicy, String> {
        let text = format!(
            "apiVersion: joey.io/v1\nkind: NodePolicy\nmetadata: {{name: node}}\nspec:\n{spec}"
        );
        let mut documents = Documents::default();
        documents.read("node.yaml", &text).map_err(|error| error.to_string())?;
        let checked = documents.check().map_err(|error| error.to_string())?;
        Ok(checked.node.unwrap())
    }

    #[test]
    fn a_policy_is_what_it_says() {
        let policy = node(
            "  node: {ports: [10250/tcp]}\n  services:\n  - name: dns\n    addresses: [10.96.0.10, 'fd00::a']\n    \
             ports: [53/udp, 53/tcp, 53/udp]\n  allow:\n  - {from: a, to: b, ports: [443/tcp]}\n",
        )
        .unwrap();
        assert_eq!(policy.node.opens, [Ports::Any]);
        assert_eq!(policy.services[0].shared.ports.len(), 2);
        assert_eq!(policy.allow[0].to, "b");
        assert_eq!(node("  node: {opens: []}").unwrap().node.opens, []);
        let policy = node(
            "  mesh:\n  - {namespaces: [a, '*'], mode: ambient}\n  - {namespaces: [b], mode: none}",
        );
        let mesh = policy.unwrap().mesh;
        assert_eq!((mesh.len(), mesh["*"], mesh["b"]), (3, Mode::Ambient, Mode::None));
        assert_eq!(node("  {}").unwrap().node, NodePolicy::absent().node);
    }

    #[test]
    fn errors_name_document_field_value_and_what_would_be_right() {
        let cases = [
            (
                "  services: [{name: x, addresses: [10.0.0.1/8], ports: [any]}]",
                "spec.services[0].addresses[0] = \"10.0.0.1/8\": has bits behind its prefix; 10.0.0.0/8",
            ),
            ("  services: [{name: x, addresses: [10.0.0.0/8], ports: [443]}]", "ports"),
            ("  services: [{name: x, addresses: [10.0.0.0/8], ports: ['443']}]", "443/tcp"),
            ("  services: [{name: x, addresses: [10.0.0.0/8]}]", "one of ports"),
            ("  services: [{name: x, addresses: [], ports: [any]}]", "at least one"),
            ("  services: [{name: '', addresses: ['::'], ports: [any]}]", "services[0].name"),
            (
                "  services: [{name: x, addresses: [10.0.0.0/8], except: [11.0.0.0/9], ports: [any]}]",
                "must be a part",
            ),
            (
                "  services: [{name: x, addresses: [10.0.0.0/8, 10.1.0.0/16], except: [10.0.0.0/9], ports: [any]}]",
                "takes all of 10.1.0.0/16 away",
            ),
            (
                "  services: [{name: x, addresses: [10.0.0.0/8], except: [10.0.0.0/8], ports: [any]}]",
                "takes all",
            ),
            (
                "  services:\n  - {name: x, addresses: ['::'], ports: [any]}\n  - {name: x, addresses: ['::'], ports: [any]}",
                "services[1].name",
            ),
            ("  service: []", "unknown field `service`"),
            ("  allow: [{from: a, to: a, ports: [any]}]", "within a tenant"),
            ("  allow: [{from: '*', to: '*', ports: [any]}]", "no tenants"),
            ("  allow: [{from: a, to: b, ports: []}]", "allow[0].ports"),
            ("  allow: [{from: a, to: ' b', ports: [any]}]", "allow[0].to"),
            ("  allow: [{from: a, to: b, ports: [any], ports: [any]}]", "node.yaml"),
            ("  node: {opens: [sctp]}", "node.opens[0]"),
            ("  node: any", "spec.node"),
            ("  mesh: [{namespaces: [a], mode: on}]", "mesh[0].mode = \"on\""),
            ("  mesh: [{namespaces: [], mode: none}]", "mesh[0].namespaces"),
            (
                "  mesh:\n  - {namespaces: [a], mode: none}\n  - {namespaces: [a], mode: ambient}",
                "mesh[1].namespaces[0] = \"a\": must be named once",
            ),
            (
                "  sharedServices: [kube-dns]",
                "spec.sharedServices[0] = \"kube-dns\": must be namespace/name",
            ),
            ("  sharedServices: ['*/*']", "namespace/*"),
        ];
        for (spec, words) in cases {
            let error = node(spec).unwrap_err();
            assert!(error.contains(words) && error.contains("node.yaml"), "{spec}: {error}");
        }
    }
}
