//! Pods in a service mesh: who gets their connections, and that nobody does who should not.

mod lab;
mod sidecar;

use crate::context::Test;

pub const TESTS: &[Test] = &[
    Test { name: "mesh::lab::outbound", run: lab::outbound },
    Test { name: "mesh::sidecar_outbound", run: sidecar::outbound },
];
