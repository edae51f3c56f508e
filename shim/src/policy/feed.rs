//! The identity table from what `kubectl get pods,services,namespaces -A -o json` prints, or from a plain
//! list of entries.
//!
//! Of a pod all addresses are taken, unless it is finished or has the node's own. Of a Service the virtual
//! addresses. Of addresses that several pods have, as while one that ends is replaced, the newest pod's is
//! the identity.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde::Deserialize;

use super::document;
use super::entry::{Entry, Kind, NamedPort, Namespace, PortRef, Protocol, ServicePort};
use super::error::PolicyError;
use super::tenant;

/// What was read.
#[derive(Debug, Default)]
pub struct Feed {
    /// The identities.
    pub entries: Vec<Entry>,
    /// The namespaces.
    pub namespaces: Vec<Namespace>,
    /// Of each entry, when its object was made: of two with one address the later one counts.
    made: HashMap<IpAddr, (bool, String, usize)>,
    objects: Vec<Object>,
}

/// Anything that kubectl lists, with what of it is of use.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Option<Spec>,
    #[serde(default)]
    status: Option<Status>,
    #[serde(default)]
    items: Option<Vec<Object>>,
    /// Of a plain list, which has no kind.
    #[serde(default)]
    entries: Option<Vec<Entry>>,
    #[serde(default)]
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: String,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    host_network: bool,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    selector: Option<serde_json::Value>,
    ports: Option<Vec<Port>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default)]
    name: Option<String>,
    container_port: u16,
    #[serde(default)]
    protocol: Option<Protocol>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    port: u16,
    #[serde(default)]
    protocol: Option<Protocol>,
    #[serde(default)]
    target_port: Option<PortRef>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

impl Feed {
    /// Adds what a file says: `List`s and objects of Kubernetes, as JSON or YAML, one or more; or a plain
    /// list, `[entries]` or `{"entries": [...], "namespaces": [...]}`.
    pub fn read(&mut self, origin: &str, text: &str) -> Result<(), PolicyError> {
        document::parts(origin, text, |part| match part {
            document::Part::Entries(entries) => {
                self.entries.extend(entries);
                Ok(())
            }
            document::Part::Object(object) => self.whole(origin, object),
        })
    }

    fn whole(&mut self, origin: &str, object: Object) -> Result<(), PolicyError> {
        if !object.kind.is_empty() {
            self.object(object);
            return Ok(());
        }
        if object.entries.is_none() && object.namespaces.is_none() {
            return Err(PolicyError::Shape {
                document: origin.to_owned(),
                path: "kind".to_owned(),
                reason: "must be Pod, Service, Namespace or a List of those; or else there must be entries"
                    .to_owned(),
            });
        }
        self.entries.extend(object.entries.into_iter().flatten());
        self.namespaces.extend(object.namespaces.into_iter().flatten());
        Ok(())
    }

    fn object(&mut self, object: Object) {
        match object.items {
            Some(items) => {
                let kind = object.kind.strip_suffix("List").unwrap_or_default().to_owned();
                for mut item in items {
                    if item.kind.is_empty() {
                        item.kind.clone_from(&kind);
                    }
                    self.object(item);
                }
            }
            None => self.objects.push(object),
        }
    }

    /// What all files say together. `keys` are the annotations that are believed about tenants.
    pub fn finish(mut self, keys: &[String]) -> Result<(Vec<Entry>, Vec<Namespace>), PolicyError> {
        let objects = std::mem::take(&mut self.objects);
        for object in objects.iter().filter(|object| object.kind == "Namespace") {
            let Metadata { name, labels, .. } = &object.metadata;
            let labels = labels.clone().unwrap_or_default();
            self.namespaces.push(Namespace { name: name.clone(), labels });
        }
        for object in &objects {
            // Who can annotate a pod must not be able to stop the feed: its address is nobody's instead.
            let tenant = tenant_of(&object.metadata, keys);
            if let Some(Err(fault)) = tenant.map(|tenant| super::node::name("tenant", tenant)) {
                let (who, tenant) = (who(&object.kind, &object.metadata), fault.value);
                tracing::warn!(
                    who,
                    tenant,
                    "its tenant {}: passed over, so it reaches nobody",
                    fault.reason
                );
                continue;
            }
            match object.kind.as_str() {
                "Pod" => self.pod(object, keys)?,
                "Service" => self.service(object, keys)?,
                _ => {}
            }
        }
        Ok((self.entries, self.namespaces))
    }

    fn pod(&mut self, object: &Object, keys: &[String]) -> Result<(), PolicyError> {
        let (Some(spec), Some(status)) = (&object.spec, &object.status) else { return Ok(()) };
        if spec.host_network || matches!(status.phase.as_str(), "Succeeded" | "Failed") {
            return Ok(());
        }
        let many = status.pod_ips.iter().flatten().map(|it| &it.ip);
        let mut addresses: Vec<&String> = status.pod_ip.iter().chain(many).collect();
        addresses.retain(|address| !address.is_empty());
        addresses.sort();
        addresses.dedup();
        // Those that ended before the others began have no ports; the ones that stay have.
        let sidecars = spec.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|it| it.restart_policy.as_deref() == Some("Always"));
        let containers = spec.containers.iter().flatten().chain(sidecars);
        let ports = containers.filter_map(|container| container.ports.as_ref()).flatten();
        let ports = ports.filter_map(|port| {
            let name = port.name.clone().filter(|name| !name.is_empty())?;
            Some(NamedPort {
                name,
                protocol: port.protocol.unwrap_or_default(),
                port: port.container_port,
            })
        });
        let ports: Vec<NamedPort> = ports.collect();
        for text in addresses {
            let address = parse(&object.metadata, "status.podIPs", text)?;
            self.put(
                &object.metadata,
                Entry {
                    labels: object.metadata.labels.clone().unwrap_or_default(),
                    ports: ports.clone(),
                    ..entry(&object.metadata, keys, address, Kind::Pod)
                },
            );
        }
        Ok(())
    }

    fn service(&mut self, object: &Object, keys: &[String]) -> Result<(), PolicyError> {
        let Some(spec) = &object.spec else { return Ok(()) };
        let many = spec.cluster_ips.iter().flatten();
        let mut addresses: Vec<&String> = spec.cluster_ip.iter().chain(many).collect();
        addresses.retain(|address| !address.is_empty() && *address != "None");
        addresses.sort();
        addresses.dedup();
        let labels = spec
            .selector
            .as_ref()
            .map(|selector| document::typed(&who("Service", &object.metadata), selector));
        let labels: BTreeMap<String, String> = labels.transpose()?.unwrap_or_default();
        let targets = spec.ports.iter().flatten().map(|port| ServicePort {
            port: port.port,
            protocol: port.protocol.unwrap_or_default(),
            target: port.target_port.clone().unwrap_or(PortRef::Number(port.port)),
        });
        let targets: Vec<ServicePort> = targets.collect();
        for text in addresses {
            let address = parse(&object.metadata, "spec.clusterIPs", text)?;
            self.put(
                &object.metadata,
                Entry {
                    labels: labels.clone(),
                    targets: targets.clone(),
                    ..entry(&object.metadata, keys, address, Kind::Service)
                },
            );
        }
        Ok(())
    }

    /// Adds an entry, or passes over the older one of two pods with one address.
    fn put(&mut self, metadata: &Metadata, entry: Entry) {
        let stays = metadata.deletion_timestamp.is_none();
        let age = metadata.creation_timestamp.clone().unwrap_or_default();
        match self.made.get(&entry.address) {
            Some((other_stays, other, at)) => {
                if (stays, &age) > (*other_stays, other) {
                    let at = *at;
                    self.made.insert(entry.address, (stays, age, at));
                    self.entries[at] = entry;
                }
            }
            None => {
                self.made.insert(entry.address, (stays, age, self.entries.len()));
                self.entries.push(entry);
            }
        }
    }
}

/// What an object has at an address, but for what only its kind has.
fn entry(metadata: &Metadata, keys: &[String], address: IpAddr, kind: Kind) -> Entry {
    Entry {
        address,
        tenant: tenant_of(metadata, keys),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        kind,
        labels: BTreeMap::new(),
        ports: Vec::new(),
        targets: Vec::new(),
    }
}

/// As the shim says it of its own pods: by the object's annotations, so not by those of its namespace, which
/// no node sees.
fn tenant_of(metadata: &Metadata, keys: &[String]) -> Option<String> {
    let annotation = |key: &str| metadata.annotations.as_ref()?.get(key).map(String::as_str);
    let tenant = tenant::of(annotation, Some(&metadata.namespace), keys);
    tenant.filter(|tenant| *tenant != metadata.namespace)
}

fn who(kind: &str, metadata: &Metadata) -> String {
    format!("{kind} {}/{}", metadata.namespace, metadata.name)
}

fn parse(metadata: &Metadata, path: &str, text: &str) -> Result<IpAddr, PolicyError> {
    text.parse().map_err(|_| PolicyError::Value {
        document: format!("{}/{}", metadata.namespace, metadata.name),
        path: path.to_owned(),
        value: text.to_owned(),
        reason: "must be an address".to_owned(),
    })
}
