//! What a pod has to do with a service mesh: by annotation, or else by what the node's policy says of its
//! namespace.
//!
//! `docs/network.md` follows a connection in each mode.

use std::collections::{BTreeMap, HashMap};

use joey_protocol::api;
use serde::{Deserialize, Serialize};

use crate::policy::error::PolicyError;
use crate::sizing::SizingError;

pub mod connections;
pub mod sidecar;

/// Annotation: how the pod is in a mesh, one of [`Mode`]'s words.
pub const MODE: &str = "io.joey.mesh";
/// Annotation: whether the proxy answers the pod's DNS queries, `true` or `false`; not of
/// [`Mode::Observe`] and [`Mode::None`].
pub const DNS: &str = "io.joey.mesh.dns";

/// In a node policy: every namespace that no other entry names.
pub const EVERY: &str = "*";

/// How a pod is in a mesh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Not at all.
    #[default]
    None,
    /// The node's proxy, which listens in the pod's network namespace, has the VM's TCP connections.
    Ambient,
    /// A proxy in one of the pod's containers has the others' connections.
    Sidecar,
    /// Connections are told of, and go where they would.
    Observe,
}

impl Mode {
    /// The mode of this name; `None` if there is none.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "ambient" => Some(Self::Ambient),
            "sidecar" => Some(Self::Sidecar),
            "observe" => Some(Self::Observe),
            _ => None,
        }
    }
}

/// Why it is not known how a pod is in a mesh.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// An annotation that cannot be followed.
    #[error(transparent)]
    Annotation(#[from] SizingError),
    /// What the node's policy says of its namespace cannot be read.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// The names of all modes, for messages.
pub(crate) const MODES: &str = "ambient, sidecar, observe or none";

/// What a node's policy says of its namespaces: the mode of each that it names, and of [`EVERY`] other.
pub type Namespaces = BTreeMap<String, Mode>;

/// How one pod is in a mesh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mesh {
    /// The mode.
    pub mode: Mode,
    /// Whether the proxy answers the pod's DNS queries.
    pub dns: bool,
}

impl Mesh {
    /// How a pod with these annotations, of this namespace, is in a mesh.
    ///
    /// # Errors
    /// An annotation that cannot be followed.
    pub fn of(
        notes: &HashMap<String, String>,
        namespace: Option<&str>,
        namespaces: &Namespaces,
    ) -> Result<Self, SizingError> {
        let bad = |name: &str, value: &str, reason: String| SizingError {
            name: name.to_owned(),
            value: value.to_owned(),
            reason,
        };
        let mode = match notes.get(MODE) {
            Some(name) => {
                Mode::named(name).ok_or_else(|| bad(MODE, name, format!("must be {MODES}")))?
            }
            None => namespace
                .and_then(|name| namespaces.get(name))
                .or_else(|| namespaces.get(EVERY))
                .copied()
                .unwrap_or_default(),
        };
        let dns = match notes.get(DNS).map(String::as_str) {
            None | Some("false") => false,
            Some("true") if matches!(mode, Mode::Ambient | Mode::Sidecar) => true,
            Some(value @ "true") => {
                let reason = format!("needs {MODE} = \"ambient\" or \"sidecar\"");
                return Err(bad(DNS, value, reason));
            }
            Some(value) => return Err(bad(DNS, value, "must be true or false".to_owned())),
        };
        Ok(Self { mode, dns })
    }

    /// What the agent is to do about it, for a pod with these annotations.
    ///
    /// # Errors
    /// An annotation that cannot be followed.
    pub fn in_guest(
        &self,
        notes: &HashMap<String, String>,
    ) -> Result<Option<api::Mesh>, SizingError> {
        match self.mode {
            Mode::None | Mode::Ambient => Ok(None),
            Mode::Sidecar => sidecar::of(notes, self.dns).map(Some),
            Mode::Observe => Ok(Some(api::Mesh { observe: true, ..Default::default() })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(notes: &[(&str, &str)], namespace: &str) -> Result<Mesh, String> {
        let notes = notes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let namespaces = [("shop", Mode::Ambient), ("plain", Mode::None), (EVERY, Mode::Observe)];
        let namespaces = namespaces.map(|(name, mode)| (name.to_owned(), mode)).into();
        Mesh::of(&notes, Some(namespace), &namespaces).map_err(|error| error.to_string())
    }

    #[test]
    fn annotations_go_before_the_namespace() {
        let mode = |notes: &[_], namespace| of(notes, namespace).unwrap().mode;
        assert_eq!(mode(&[], "shop"), Mode::Ambient);
        assert_eq!(mode(&[], "plain"), Mode::None);
        assert_eq!(mode(&[], "other"), Mode::Observe);
        assert_eq!(mode(&[(MODE, "none")], "shop"), Mode::None);
        assert_eq!(mode(&[(MODE, "sidecar")], "plain"), Mode::Sidecar);
        assert!(of(&[(DNS, "true")], "shop").unwrap().dns);
        assert_eq!(Mesh::of(&HashMap::new(), None, &Namespaces::new()).unwrap(), Mesh::default());
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        for (name, value, words) in [
            (MODE, "Ambient", "must be ambient, sidecar, observe or none"),
            (MODE, "", "must be"),
            (DNS, "yes", "true or false"),
            (DNS, "true", "needs io.joey.mesh"),
        ] {
            let error = of(&[(name, value)], "plain").unwrap_err();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
    }
}
