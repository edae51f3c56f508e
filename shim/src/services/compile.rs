//! From services to what each tenant sees: pure.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use joey_protocol::services::{Backend, Key, MAX_BACKENDS, MAX_FRONTS};

use super::document::{Service, Services};
use crate::policy::error::{Fault, PolicyError};

/// What is behind a virtual address and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// As in the guest's table: seconds, or 0.
    pub(super) affinity: u32,
    /// In order, each once.
    pub(super) backends: Vec<Backend>,
}

/// What somebody sees.
pub(super) type View = BTreeMap<Key, Arc<Wanted>>;

/// A service with its part of every view that it is in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Compiled {
    pub(super) service: Service,
    fronts: Vec<(Key, Arc<Wanted>)>,
}

impl Compiled {
    pub(super) fn of(service: &Service) -> Self {
        Self { service: service.clone(), fronts: fronts(service) }
    }
}

/// A service's virtual addresses and ports, each with its endpoints of the same family.
fn fronts(service: &Service) -> Vec<(Key, Arc<Wanted>)> {
    let mut fronts = Vec::new();
    for port in &service.ports {
        for address in &service.addresses {
            let backends = port.usable().filter(|it| it.address.is_ipv4() == address.is_ipv4());
            let backends = backends.map(|it| Backend { address: it.address, port: it.port });
            let mut backends: Vec<_> = backends.collect();
            backends.sort_unstable();
            backends.dedup();
            let key = Key { address: *address, port: port.port, protocol: port.protocol.number() };
            let affinity = service.affinity_seconds.unwrap_or(0);
            fronts.push((key, Arc::new(Wanted { affinity, backends })));
        }
    }
    fronts
}

/// Names of services that all tenants see: `namespace/name` or `namespace/*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shared(Vec<String>);

impl Shared {
    /// Reads the names.
    ///
    /// # Errors
    /// One is none; which, and why.
    pub(crate) fn new(path: &str, names: Vec<String>) -> Result<Self, Fault> {
        for (at, name) in names.iter().enumerate() {
            let parts = name.split_once('/');
            let fine = |part: &str| !part.is_empty() && !part.contains(['/', '*']);
            if !parts.is_some_and(|(space, name)| fine(space) && (name == "*" || fine(name))) {
                let reason = "must be namespace/name, or namespace/* for all of a namespace";
                return Err(Fault::new(format!("{path}[{at}]"), name, reason));
            }
        }
        Ok(Self(names))
    }

    fn has(&self, service: &Service) -> bool {
        self.0.iter().any(|pattern| {
            pattern.split_once('/').is_some_and(|(space, name)| {
                space == service.namespace && (name == "*" || name == service.name)
            })
        })
    }
}

/// What all tenants see, and what each tenant that has services of its own does.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Views {
    pub(super) shared: View,
    pub(super) tenants: BTreeMap<String, View>,
}

/// Sorts services by who sees them.
///
/// # Errors
/// Two services that somebody sees have the same address and port, or somebody sees more than fits a guest.
pub(super) fn views(services: &Services, shared: &Shared) -> Result<Views, PolicyError> {
    let mut views = Views::default();
    let mut owners = Owners::default();
    let (common, own): (Vec<_>, Vec<_>) =
        services.iter().partition(|(_, it)| shared.has(&it.service));
    for (id, it) in common {
        owners.add(&mut views.shared, id, &it.fronts)?;
    }
    owners.room("all tenants", &views.shared)?;
    let mut by_tenant: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for (id, it) in own {
        by_tenant.entry(it.service.tenant()).or_default().push((id, it));
    }
    for (tenant, all) in by_tenant {
        let (mut view, mut owners) = (views.shared.clone(), owners.clone());
        for (id, it) in all {
            owners.add(&mut view, id, &it.fronts)?;
        }
        owners.room(&format!("tenant {tenant}"), &view)?;
        views.tenants.insert(tenant.to_owned(), view);
    }
    Ok(views)
}

/// Which service has a key.
#[derive(Debug, Clone, Default)]
struct Owners<'s>(HashMap<Key, &'s str>);

impl<'s> Owners<'s> {
    fn add(
        &mut self,
        view: &mut View,
        id: &'s str,
        fronts: &[(Key, Arc<Wanted>)],
    ) -> Result<(), PolicyError> {
        for (key, wanted) in fronts {
            if let Some(other) = self.0.insert(*key, id) {
                let fault = Fault::new(
                    "addresses",
                    key.address,
                    format!("port {} is service {other}'s already, for who sees both", key.port),
                );
                return Err(fault.of(&format!("service {id}")));
            }
            view.insert(*key, Arc::clone(wanted));
        }
        Ok(())
    }

    /// Refuses what does not fit a guest's maps.
    fn room(&self, who: &str, view: &View) -> Result<(), PolicyError> {
        let backends: usize = view.values().map(|wanted| wanted.backends.len()).sum();
        let largest = || {
            let largest = view.iter().max_by_key(|(_, wanted)| wanted.backends.len());
            let (service, count) = largest.map_or(("", 0), |(key, wanted)| {
                (self.0.get(key).copied().unwrap_or_default(), wanted.backends.len())
            });
            format!("{who}, of these {count} of service {service}")
        };
        for (what, count, most) in [
            ("addresses and ports of services in a guest", view.len(), MAX_FRONTS),
            ("endpoints of services in a guest", backends, MAX_BACKENDS),
        ] {
            let most = most as usize;
            if count > most {
                return Err(PolicyError::TooMany { what, count, most, largest: largest() });
            }
        }
        Ok(())
    }
}
