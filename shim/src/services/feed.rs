//! Services from what `kubectl get services,endpointslices -A -o json` prints, or from a plain list.
//!
//! Of a Service its cluster addresses are taken; one without any (headless, ExternalName) is passed over, and so are
//! ports of SCTP. Who answers is said by its EndpointSlices, whose ports have the names of the Service's ports.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde::Deserialize;

use super::document::{Endpoint, Port, Service};
use crate::policy::document;
use crate::policy::entry::Protocol;
use crate::policy::error::PolicyError;
use crate::policy::tenant;

/// Label of an EndpointSlice with its Service's name (`k8s.io/api/discovery/v1`, `LabelServiceName`).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What was read.
#[derive(Debug, Default)]
pub struct Feed {
    services: Vec<Service>,
    objects: Vec<Object>,
}

/// A Service, an EndpointSlice, or a list of them, with what of it is of use.
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
    items: Option<Vec<Object>>,
    /// Of an EndpointSlice.
    #[serde(default)]
    endpoints: Option<Vec<SliceEndpoint>>,
    #[serde(default)]
    ports: Option<Vec<SlicePort>>,
    /// Of a plain list, which has no kind.
    #[serde(default)]
    services: Option<Vec<Service>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: String,
    namespace: String,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    ports: Option<Vec<ServicePort>>,
    session_affinity: Option<String>,
    session_affinity_config: Option<AffinityConfig>,
}

#[derive(Debug, Deserialize)]
struct ServicePort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    protocol: Option<Protocol>,
    port: u16,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct AffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<ClientIp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ClientIp {
    timeout_seconds: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SliceEndpoint {
    addresses: Option<Vec<String>>,
    conditions: Option<Conditions>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SlicePort {
    name: Option<String>,
    protocol: Option<Protocol>,
    port: Option<u16>,
}

/// What Kubernetes has where a Service asks for affinity and says no time.
const AFFINITY: u32 = 10_800;

impl Feed {
    /// Adds what a file says: `List`s and objects of Kubernetes, as JSON or YAML, one or more; or a plain
    /// list, `[services]` or `{"services": [...]}`.
    ///
    /// # Errors
    /// It is none of these.
    pub fn read(&mut self, origin: &str, text: &str) -> Result<(), PolicyError> {
        document::parts(origin, text, |part| match part {
            document::Part::Entries(services) => {
                self.services.extend(services);
                Ok(())
            }
            document::Part::Object(object) => self.add(origin, object),
        })
    }

    fn add(&mut self, origin: &str, object: Object) -> Result<(), PolicyError> {
        if let Some(items) = object.items {
            let kind = object.kind.strip_suffix("List").unwrap_or_default();
            for mut item in items {
                if item.kind.is_empty() {
                    kind.clone_into(&mut item.kind);
                }
                self.add(origin, item)?;
            }
        } else if let Some(services) = object.services.filter(|_| object.kind.is_empty()) {
            self.services.extend(services);
        } else if object.kind.is_empty() {
            return Err(PolicyError::Shape {
                document: origin.to_owned(),
                path: "kind".to_owned(),
                reason: "must be Service, EndpointSlice or a List of those; or else there must be services"
                    .to_owned(),
            });
        } else {
            self.objects.push(Object { items: None, services: None, ..object });
        }
        Ok(())
    }

    /// What all files say together. `keys` are the annotations that are believed about tenants.
    ///
    /// # Errors
    /// An address is none.
    pub fn finish(mut self, keys: &[String]) -> Result<Vec<Service>, PolicyError> {
        let mut slices: HashMap<(&str, &str), Vec<&Object>> = HashMap::new();
        for object in self.objects.iter().filter(|object| object.kind == "EndpointSlice") {
            let name = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
            if let Some(name) = name {
                slices.entry((&object.metadata.namespace, name)).or_default().push(object);
            }
        }
        for object in self.objects.iter().filter(|object| object.kind == "Service") {
            let Metadata { namespace, name, .. } = &object.metadata;
            let own =
                slices.get(&(namespace.as_str(), name.as_str())).map_or(&[][..], Vec::as_slice);
            self.services.extend(service(object, own, keys)?);
        }
        Ok(self.services)
    }
}

fn service(
    object: &Object,
    slices: &[&Object],
    keys: &[String],
) -> Result<Option<Service>, PolicyError> {
    let (Some(spec), metadata) = (&object.spec, &object.metadata) else { return Ok(None) };
    let many = spec.cluster_ips.iter().flatten();
    let mut texts: Vec<&String> = spec.cluster_ip.iter().chain(many).collect();
    texts.retain(|text| !text.is_empty() && *text != "None");
    texts.sort();
    texts.dedup();
    if texts.is_empty() {
        return Ok(None);
    }
    // Who can annotate a Service must not be able to stop the feed: it is nobody's instead.
    let annotation = |key: &str| metadata.annotations.as_ref()?.get(key).map(String::as_str);
    let owner = tenant::of(annotation, Some(&metadata.namespace), keys);
    let owner = owner.filter(|tenant| *tenant != metadata.namespace);
    if let Some(Err(reason)) = owner.as_deref().map(tenant::check) {
        let who = format!("{}/{}", metadata.namespace, metadata.name);
        tracing::warn!(who, reason, "service passed over: it is nobody's");
        return Ok(None);
    }
    let addresses = texts.iter().map(|text| parse(metadata, "spec.clusterIPs", text));
    let given = spec.session_affinity_config.as_ref().and_then(|it| it.client_ip.as_ref());
    let seconds = given.and_then(|it| it.timeout_seconds).unwrap_or(AFFINITY);
    let sticky = spec.session_affinity.as_deref() == Some("ClientIP");
    let mut ports = Vec::new();
    for port in spec.ports.iter().flatten() {
        let protocol = port.protocol.unwrap_or_default();
        if protocol == Protocol::Sctp {
            continue;
        }
        let name = port.name.clone().unwrap_or_default();
        let endpoints = endpoints(slices, &name, protocol)?;
        ports.push(Port { name, protocol, port: port.port, endpoints });
    }
    Ok(Some(Service {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        tenant: owner,
        addresses: addresses.collect::<Result<_, _>>()?,
        affinity_seconds: sticky.then_some(seconds),
        ports,
    }))
}

/// Who answers at the port with this name.
fn endpoints(
    slices: &[&Object],
    name: &str,
    protocol: Protocol,
) -> Result<Vec<Endpoint>, PolicyError> {
    let mut all = Vec::new();
    for slice in slices {
        let is_it = |port: &&SlicePort| {
            let same = port.name.as_deref().unwrap_or_default() == name;
            same && port.protocol.unwrap_or_default() == protocol
        };
        let port = slice.ports.iter().flatten().find(is_it).and_then(|port| port.port);
        let Some(port) = port.filter(|port| *port != 0) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            let told = endpoint.conditions.unwrap_or_default();
            // Not told is ready; the other two follow from it (EndpointConditions' documentation).
            let ready = told.ready.unwrap_or(true);
            // Addresses of one endpoint are the same one: only the first is of use there.
            let Some(text) = endpoint.addresses.iter().flatten().next() else { continue };
            all.push(Endpoint {
                address: parse(&slice.metadata, "endpoints.addresses", text)?,
                port,
                ready,
                serving: told.serving.filter(|serving| *serving != ready),
                terminating: told.terminating.unwrap_or(false),
            });
        }
    }
    Ok(all)
}

fn parse(metadata: &Metadata, path: &str, text: &str) -> Result<IpAddr, PolicyError> {
    text.parse().map_err(|_| PolicyError::Value {
        document: format!("{}/{}", metadata.namespace, metadata.name),
        path: path.to_owned(),
        value: text.to_owned(),
        reason: "must be an address".to_owned(),
    })
}
