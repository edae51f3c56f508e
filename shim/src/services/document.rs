//! Services as feeders tell them: what is checked of them, and what may change.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use joey_protocol::services::MAX_BACKENDS;
use serde::{Deserialize, Serialize};

use super::compile::Compiled;
use crate::policy::entry::Protocol;
use crate::policy::error::{Fault, PolicyError};
use crate::policy::tenant;

/// The longest that Kubernetes lets a client be kept at an endpoint, in seconds.
const MAX_AFFINITY: u32 = 86_400;

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whose it is; `None`: the namespace's name is the tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Its virtual addresses, of either family.
    pub addresses: Vec<IpAddr>,
    /// How long a client is kept at one endpoint after it was last there, in seconds; `None`: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_seconds: Option<u32>,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its name, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Its number at the virtual addresses.
    pub port: u16,
    /// Who answers.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
}

/// Who answers at a port. The conditions are those of Kubernetes' EndpointSlices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// It takes connections.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub ready: bool,
    /// It answers, even if it is about to end; `None`: if it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<bool>,
    /// It is about to end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub terminating: bool,
}

fn yes() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_true(it: &bool) -> bool {
    *it
}

/// A change of services as the daemon's socket takes it: `{"replace": [services]}`, or
/// `{"put": [services], "remove": ["namespace/name"]}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// All services.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace: Option<Vec<Service>>,
    /// Services, new or instead of those with the same names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub put: Vec<Service>,
    /// Names of services that are no more. Fine if they were not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// Services by namespace and name, each with what a guest makes of it.
pub(super) type Services = BTreeMap<String, Arc<Compiled>>;

impl Service {
    /// Namespace and name.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its tenant's name.
    #[must_use]
    pub fn tenant(&self) -> &str {
        self.tenant.as_deref().unwrap_or(&self.namespace)
    }

    /// Refuses what cannot be a service.
    ///
    /// # Errors
    /// Which field cannot be used, and why.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.faults().map_err(|fault| fault.of(&format!("service {}", self.id())))
    }

    fn faults(&self) -> Result<(), Fault> {
        for (path, name) in [("namespace", &self.namespace), ("name", &self.name)] {
            let fine =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
            if name.is_empty() || name.len() > 253 || !name.bytes().all(fine) {
                return Err(Fault::new(
                    path,
                    name,
                    "must be a name of 1 to 253 letters, digits, - . _",
                ));
            }
        }
        if let Some(tenant) = &self.tenant {
            tenant::check(tenant).map_err(|reason| Fault::new("tenant", tenant, reason))?;
        }
        if self.addresses.is_empty() {
            return Err(Fault::new("addresses", "[]", "must have at least one"));
        }
        let mut seen = HashSet::new();
        for (at, address) in self.addresses.iter().enumerate() {
            let fault = |reason| Err(Fault::new(format!("addresses[{at}]"), address, reason));
            if !usable(*address) {
                return fault("must be one host's address, and no IPv4 address within IPv6");
            }
            if !seen.insert(address) {
                return fault("is there twice");
            }
        }
        if let Some(seconds) = self.affinity_seconds
            && !(1..=MAX_AFFINITY).contains(&seconds)
        {
            return Err(Fault::new("affinity_seconds", seconds, "must be 1 to 86400"));
        }
        let mut seen = HashSet::new();
        for (at, port) in self.ports.iter().enumerate() {
            port.check().map_err(|fault| fault.within(&format!("ports[{at}]")))?;
            if !seen.insert((port.protocol, port.port)) {
                return Err(Fault::new(format!("ports[{at}].port"), port.port, "is there twice"));
            }
        }
        Ok(())
    }
}

impl Port {
    fn check(&self) -> Result<(), Fault> {
        if self.protocol == Protocol::Sctp {
            return Err(Fault::new("protocol", "SCTP", "must be TCP or UDP"));
        }
        if self.port == 0 {
            return Err(Fault::new("port", 0, "must be 1 to 65535"));
        }
        if self.endpoints.len() > MAX_BACKENDS as usize {
            let reason = format!("must be at most {MAX_BACKENDS}");
            return Err(Fault::new("endpoints", self.endpoints.len(), reason));
        }
        for (at, Endpoint { address, port, .. }) in self.endpoints.iter().enumerate() {
            let path = |field| format!("endpoints[{at}].{field}");
            if !usable(*address) || address.is_loopback() {
                let reason = "must be one host's address, not its loopback's";
                return Err(Fault::new(path("address"), address, reason));
            }
            if *port == 0 {
                return Err(Fault::new(path("port"), 0, "must be 1 to 65535"));
            }
        }
        Ok(())
    }

    /// Who takes connections: those that are ready, or, if there are none, those that still answer while they end
    /// (as kube-proxy does, Kubernetes' KEP-1669).
    pub(super) fn usable(&self) -> impl Iterator<Item = &Endpoint> {
        let any = self.endpoints.iter().any(|endpoint| endpoint.ready);
        self.endpoints.iter().filter(move |endpoint| match any {
            true => endpoint.ready,
            false => endpoint.terminating && endpoint.serving.unwrap_or(endpoint.ready),
        })
    }
}

fn usable(address: IpAddr) -> bool {
    let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
    !address.is_unspecified() && !address.is_multicast() && !mapped
}

impl Request {
    /// What is wrong with the request itself.
    fn form(&self) -> Result<(), &'static str> {
        match &self.replace {
            Some(_) if !self.put.is_empty() || !self.remove.is_empty() => {
                Err("replace goes alone: put and remove must not be there with it")
            }
            None if self.put.is_empty() && self.remove.is_empty() => {
                Err("nothing to change: give replace, or put or remove")
            }
            _ => Ok(()),
        }
    }

    /// Makes the change. What is refused changes nothing.
    ///
    /// # Errors
    /// A service is not one, is there twice, or the request is none.
    pub(super) fn apply(&self, to: &mut Services) -> Result<(), PolicyError> {
        self.form().map_err(|reason| PolicyError::Shape {
            document: "request".to_owned(),
            path: "services".to_owned(),
            reason: reason.to_owned(),
        })?;
        let new = self.replace.as_ref().unwrap_or(&self.put);
        let mut by_name = Services::new();
        for service in new {
            service.check()?;
            let id = service.id();
            let known = to.get(&id).filter(|known| known.service == *service);
            let compiled = known.cloned().unwrap_or_else(|| Arc::new(Compiled::of(service)));
            if by_name.insert(id.clone(), compiled).is_some() {
                let name = format!("service {id}");
                return Err(PolicyError::Twice { first: name.clone(), second: name });
            }
        }
        if self.replace.is_some() {
            *to = by_name;
        } else {
            for name in self.remove.iter().filter(|name| !by_name.contains_key(*name)) {
                to.remove(name);
            }
            to.extend(by_name);
        }
        Ok(())
    }

    /// Adds a later request, so that both are one change. A whole table stands alone.
    pub(crate) fn join(&mut self, later: &Self) -> bool {
        let forms = self.form().and(later.form());
        if self.replace.is_some() || later.replace.is_some() || forms.is_err() {
            return false;
        }
        let put = |name: &str| later.put.iter().any(|service| service.id() == name);
        self.put.retain(|service| {
            let id = service.id();
            !later.remove.contains(&id) && !put(&id)
        });
        self.remove.retain(|name| !put(name));
        self.put.extend(later.put.iter().cloned());
        self.remove.extend(later.remove.iter().cloned());
        true
    }
}
