//! Policy documents: the objects of the files that the operator applies, read and told apart.
//!
//! A file is YAML with any number of documents, or JSON, which YAML contains; a `List` holds objects, as
//! `kubectl get -o yaml` gives them. Everything is checked here, once: [`Checked`] is a policy.

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::entry::Namespace;
use super::error::PolicyError;
use super::network_policy::NetworkPolicy;
use super::node::NodePolicy;
use crate::services::Shared;

/// Most bytes that a file of documents may have.
pub const MOST_BYTES: usize = 16 << 20;

/// An object with where it came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// File and number in it.
    pub source: String,
    /// The object, as it was written.
    pub object: Value,
    /// It is a NetworkPolicy that is refused, and so isolates what it selects and lists nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolates: bool,
}

/// All policy documents.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Documents(pub Vec<Document>);

/// Documents whose fields are fine.
#[derive(Debug, Clone, Default)]
pub struct Checked {
    pub(super) node: Option<NodePolicy>,
    pub(super) networks: Vec<NetworkPolicy>,
    pub(super) namespaces: Vec<Namespace>,
    /// What was refused, and isolates instead.
    pub(super) warnings: Vec<String>,
}

/// What Kubernetes has around every object. What is of no use here is passed over: `kubectl get` gives much.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    labels: Option<super::selector::Labels>,
}

/// An object with a spec.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Object<S> {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    spec: S,
    #[serde(default, rename = "status")]
    _status: Value,
}

/// A namespace object, whose spec has finalizers only.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NamespaceObject {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    #[serde(default, rename = "spec")]
    _spec: Value,
    #[serde(default, rename = "status")]
    _status: Value,
}

/// A part of a file that a feed reads.
pub(crate) enum Part<E, O> {
    /// A plain list of entries.
    Entries(Vec<E>),
    /// An object, perhaps a `List` of others.
    Object(O),
}

/// Hands on the parts of a file for a feed: lists and objects as JSON or YAML, one or more.
pub(crate) fn parts<E: DeserializeOwned, O: DeserializeOwned>(
    origin: &str,
    text: &str,
    mut take: impl FnMut(Part<E, O>) -> Result<(), PolicyError>,
) -> Result<(), PolicyError> {
    let syntax = |error: serde_json::Error| PolicyError::Syntax {
        origin: origin.to_owned(),
        message: error.to_string(),
    };
    let start = text.trim_start();
    if start.starts_with('[') {
        return take(Part::Entries(serde_json::from_str(text).map_err(syntax)?));
    }
    if start.starts_with('{') {
        // Objects of a large cluster: straight into types, without a tree between.
        for object in serde_json::Deserializer::from_str(text).into_iter() {
            take(Part::Object(object.map_err(syntax)?))?;
        }
        return Ok(());
    }
    for value in yaml(origin, text)? {
        take(match value.is_array() {
            true => Part::Entries(typed(origin, &value)?),
            false => Part::Object(typed(origin, &value)?),
        })?;
    }
    Ok(())
}

/// Reads YAML documents, within bounds that no honest file comes near.
pub(crate) fn yaml(origin: &str, text: &str) -> Result<Vec<Value>, PolicyError> {
    let syntax = |message| PolicyError::Syntax { origin: origin.to_owned(), message };
    if text.len() > MOST_BYTES {
        let message = format!("has {} bytes; at most {MOST_BYTES} are read", text.len());
        return Err(syntax(message));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 4_000_000,
            max_nodes: 2_000_000,
            max_documents: 65_536,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_merge_keys: 1_000,
            max_depth: 64,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 16,
        },
        // YAML 1.2: a label `y` is text.
        strict_booleans: true,
        with_snippet: false,
    };
    let all: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| syntax(error.to_string()))?;
    Ok(all.into_iter().filter(|value| !value.is_null()).collect())
}

impl Documents {
    /// Adds the objects of a file.
    pub fn read(&mut self, origin: &str, text: &str) -> Result<(), PolicyError> {
        let mut number = 0;
        for object in yaml(origin, text)? {
            let items = match object {
                Value::Object(list) if kind_of_list(&list).is_some() => unpacked(list),
                other => vec![other],
            };
            for object in items {
                number += 1;
                let source = format!("{origin}#{number}");
                self.0.push(Document { source, object, isolates: false });
            }
        }
        Ok(())
    }

    /// Has NetworkPolicies that are refused isolate what they select and list nothing, instead of refusing all:
    /// where tenants write them, one's mistake must not keep the others' from being applied.
    pub fn isolate_refused(&mut self) {
        for document in &mut self.0 {
            let kind = document.object.get("kind").and_then(Value::as_str);
            let refused = Checked::default().add(document).is_err();
            document.isolates = kind == Some("NetworkPolicy") && refused;
        }
    }

    /// Checks all of them.
    pub fn check(&self) -> Result<Checked, PolicyError> {
        let mut checked = Checked::default();
        let mut seen: HashMap<String, String> = HashMap::new();
        for document in &self.0 {
            let (name, label) = checked.add(document)?;
            if let Some(first) = seen.insert(name, document.source.clone()) {
                return Err(PolicyError::Twice { first, second: label });
            }
        }
        Ok(checked)
    }
}

/// Of what an object is a list; empty if its items say so themselves.
fn kind_of_list(object: &serde_json::Map<String, Value>) -> Option<&str> {
    object.get("kind").and_then(Value::as_str)?.strip_suffix("List")
}

/// The objects of a list. In `NetworkPolicyList` and the like they are not told that they are such.
fn unpacked(mut list: serde_json::Map<String, Value>) -> Vec<Value> {
    let kind = kind_of_list(&list).unwrap_or_default().to_owned();
    let mut items = match list.remove("items") {
        Some(Value::Array(items)) => items,
        None | Some(Value::Null) => Vec::new(),
        Some(other) => vec![other],
    };
    let version = list.remove("apiVersion").unwrap_or_default();
    for item in items.iter_mut().filter_map(Value::as_object_mut).filter(|_| !kind.is_empty()) {
        item.entry("kind").or_insert_with(|| kind.clone().into());
        item.entry("apiVersion").or_insert_with(|| version.clone());
    }
    items
}

/// Makes a type of a value, or says where it does not fit.
pub(crate) fn typed<T: DeserializeOwned>(document: &str, value: &Value) -> Result<T, PolicyError> {
    serde_path_to_error::deserialize(value).map_err(|error| PolicyError::Shape {
        document: document.to_owned(),
        path: error.path().to_string(),
        reason: error.inner().to_string(),
    })
}

impl Checked {
    /// Which services all tenants see.
    pub(crate) fn shared_services(&self) -> Shared {
        self.node.as_ref().map(|node| node.shared_services.clone()).unwrap_or_default()
    }

    /// Adds a document; what makes it one of its kind, and how messages call it.
    fn add(&mut self, document: &Document) -> Result<(String, String), PolicyError> {
        let Document { source, object, isolates } = document;
        let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let inner = |field: &str| {
            object
                .pointer(&format!("/metadata/{field}"))
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (space, name) = (inner("namespace"), inner("name"));
        let joint = if space.is_empty() { "" } else { "/" };
        let who = format!("{kind} {space}{joint}{name}");
        let label = format!("{source} ({})", who.trim());
        match (version, kind) {
            ("joey.io/v1", "NodePolicy") => {
                let object: Object<_> = typed(&label, object)?;
                name_is_there(&label, &object.metadata)?;
                if self.node.is_some() {
                    let first = "another NodePolicy".to_owned();
                    return Err(PolicyError::Twice { first, second: label });
                }
                let node = NodePolicy::check(&label, object.spec);
                self.node = Some(node.map_err(|fault| fault.within("spec").of(&label))?);
            }
            ("networking.k8s.io/v1", "NetworkPolicy") if *isolates => {
                let why = self.add(&Document { isolates: false, ..document.clone() });
                let why = why.err().map_or_else(String::new, |error| error.to_string());
                self.warnings.push(format!("{why}; its pods are isolated until it is mended"));
                let selector = object.pointer("/spec/podSelector").cloned();
                let selector = selector.and_then(|it| serde_json::from_value(it).ok());
                let space = if space.is_empty() { "default" } else { space };
                let policy = NetworkPolicy::isolating(&label, space, name, selector);
                self.networks.push(policy);
            }
            ("networking.k8s.io/v1", "NetworkPolicy") => {
                let object: Object<_> = typed(&label, object)?;
                name_is_there(&label, &object.metadata)?;
                let Metadata { namespace, name, .. } = object.metadata;
                // As kubectl does.
                let namespace = if namespace.is_empty() { "default".to_owned() } else { namespace };
                let policy = NetworkPolicy::check(&label, namespace, name, object.spec);
                self.networks.push(policy.map_err(|fault| fault.within("spec").of(&label))?);
            }
            ("v1", "Namespace") => {
                let object: NamespaceObject = typed(&label, object)?;
                name_is_there(&label, &object.metadata)?;
                let Metadata { name, labels, .. } = object.metadata;
                self.namespaces.push(Namespace { name, labels: labels.unwrap_or_default() });
            }
            _ => {
                return Err(PolicyError::Value {
                    document: label,
                    path: "apiVersion, kind".to_owned(),
                    value: format!("{version}, {kind}"),
                    reason: "must be joey.io/v1 NodePolicy, networking.k8s.io/v1 NetworkPolicy, \
                             v1 Namespace, or a List of those"
                        .to_owned(),
                });
            }
        }
        let space = match kind {
            "NetworkPolicy" if space.is_empty() => "default",
            _ => space,
        };
        Ok((format!("{kind} {space}/{name}"), label))
    }
}

fn name_is_there(label: &str, metadata: &Metadata) -> Result<(), PolicyError> {
    for (path, name, may_be_empty) in [
        ("metadata.name", &metadata.name, false),
        ("metadata.namespace", &metadata.namespace, true),
    ] {
        if name.len() > 253 || (name.is_empty() && !may_be_empty) {
            return Err(PolicyError::Value {
                document: label.to_owned(),
                path: path.to_owned(),
                value: name.clone(),
                reason: "must be a name of 1 to 253 characters".to_owned(),
            });
        }
    }
    Ok(())
}
