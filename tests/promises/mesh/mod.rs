//! Pods in a service mesh: who gets their connections, and that nobody does who should not.

mod lab;
mod observe;
mod sidecar;

use crate::context::Test;

pub const TESTS: &[Test] = &[
    Test { name: "mesh::lab::outbound", run: lab::outbound },
    Test { name: "mesh::sidecar_outbound", run: sidecar::outbound },
    Test { name: "mesh::sidecar_inbound", run: sidecar::inbound },
    Test { name: "mesh::sidecar_exclusions", run: sidecar::exclusions },
    Test { name: "mesh::sidecar_impostor", run: sidecar::impostor },
    Test { name: "mesh::sidecar_killed_under_load", run: sidecar::killed_under_load },
    Test { name: "mesh::sidecar_many_connections", run: sidecar::many_connections },
    Test { name: "mesh::sidecar_dns", run: sidecar::dns },
    Test { name: "mesh::sidecar_real_proxy", run: sidecar::real_proxy },
    Test { name: "mesh::observe", run: observe::connections },
    Test { name: "mesh::observe_hostile", run: observe::hostile },
    Test { name: "mesh::observe_only_where_wanted", run: observe::only_where_wanted },
    Test { name: "mesh::sidecar_bad_annotations", run: sidecar::bad_annotations },
];
