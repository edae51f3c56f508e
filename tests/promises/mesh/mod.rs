//! Pods in a mesh: who gets their connections, and that nobody does who should not.

mod sidecar;

use crate::context::Test;

pub const TESTS: &[Test] = &[Test { name: "mesh::sidecar_outbound", run: sidecar::outbound }];
