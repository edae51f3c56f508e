//! The version check: both sides must speak exactly the same version.
//!
//! Host and guest come from one package, so there is no negotiation; a mismatch means a stale
//! template or a half-finished upgrade, and the words of the error say so.

use crate::limits::PROTOCOL_VERSION;

/// The other side speaks another version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {peer} speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: \
     host and guest image are of different releases, rebuild the templates"
)]
pub struct VersionMismatch {
    /// Who spoke: `host` or `guest`.
    pub peer: &'static str,
    /// The version that came.
    pub theirs: u32,
}

/// Checks the version in a message from `peer` (`host` or `guest`).
pub fn check(peer: &'static str, theirs: u32) -> Result<(), VersionMismatch> {
    if theirs == PROTOCOL_VERSION { Ok(()) } else { Err(VersionMismatch { peer, theirs }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_version_passes() {
        assert_eq!(check("guest", PROTOCOL_VERSION), Ok(()));
        let error = check("guest", 0).unwrap_err();
        assert!(error.to_string().contains("guest speaks protocol version 0"), "{error}");
    }
}
