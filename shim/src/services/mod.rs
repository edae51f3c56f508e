//! Services in the guest: for pods whose packets bypass the node's own service rules.
//!
//! ```text
//! kubectl ──▶ feed ─┐                                  ┌─▶ <run_dir>/services/TENANT ──▶ follow ──▶ the guest
//! socket ───────────┴─▶ document ─▶ compile ─▶ table ──┤   (log: a base, then changes)   (each shim)
//!                       checked     per tenant  bytes  └─▶ <state_dir>/network/services.json
//! ```
//!
//! [`keeper`] puts a change in force: whole, or not at all. A tenant's log holds its own services and the shared
//! ones; a tenant that has none of its own reads `shared`. Shims read the logs and ask nobody, so that pods start
//! with the services that were known last, whoever is dead. `docs/services.md` says what documents mean.

pub mod document;
pub mod feed;
pub mod follow;
pub mod keeper;
pub mod log;
pub mod table;

mod compile;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use serde::Deserialize;

pub use self::compile::Shared;
use crate::sizing::SizingError;

/// Annotation by which a pod says who translates its connections to services.
pub const ANNOTATION: &str = "io.joey.services";

/// Who translates connections to services' addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The node, or whatever is on the way of the pod's packets.
    #[default]
    Host,
    /// The pod's own guest.
    Guest,
}

impl Mode {
    /// What a pod's annotations say, or else the node's default.
    ///
    /// # Errors
    /// The annotation is neither.
    pub fn annotated(self, notes: &HashMap<String, String>) -> Result<Self, SizingError> {
        match notes.get(ANNOTATION).map(String::as_str) {
            None => Ok(self),
            Some("host") => Ok(Self::Host),
            Some("guest") => Ok(Self::Guest),
            Some(value) => Err(SizingError {
                name: ANNOTATION.to_owned(),
                value: value.to_owned(),
                reason: "must be guest or host".to_owned(),
            }),
        }
    }
}
