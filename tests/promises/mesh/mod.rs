//! Pods in a service mesh.

mod lab;

use crate::context::Test;

pub const TESTS: &[Test] = &[Test { name: "mesh::lab::outbound", run: lab::outbound }];
