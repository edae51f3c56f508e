//! Pods in a service mesh: who gets their connections, and that nobody does who should not. Ambient mode on namespaces
//! with a fake VM (`lab`), what then fails (`closed`), and with real pods (`ambient`); `sidecar` and `observe`.

mod ambient;
mod closed;
mod istio;
mod lab;
mod observe;
mod sidecar;

use crate::context::Test;

pub const TESTS: &[Test] = &[
    Test { name: "mesh::lab_outbound", run: lab::outbound },
    Test { name: "mesh::lab_inbound", run: lab::inbound },
    Test { name: "mesh::lab_tunnel", run: lab::tunnel },
    Test { name: "mesh::lab_past_the_proxy", run: lab::past_the_proxy },
    Test { name: "mesh::lab_dns", run: lab::dns },
    Test { name: "mesh::lab_ports_come_again", run: lab::ports_come_again },
    Test { name: "mesh::lab_100000_connections", run: lab::many },
    Test { name: "mesh::lab_given_back", run: lab::given_back },
    Test { name: "mesh::lab_with_istios_rules", run: istio::with_its_rules },
    Test { name: "mesh::lab_no_proxy", run: closed::no_proxy },
    Test { name: "mesh::lab_killed_under_load", run: closed::killed_under_load },
    Test { name: "mesh::lab_nobodys_ports", run: closed::nobodys_ports },
    Test { name: "mesh::lab_tenants_through_the_proxy", run: closed::tenants },
    Test { name: "mesh::lab_without_rules", run: closed::without_rules },
    Test { name: "mesh::lab_needs_isolation", run: closed::needs_isolation },
    Test { name: "mesh::lab_limits", run: closed::limits },
    Test { name: "mesh::ambient", run: ambient::through_the_proxy },
    Test { name: "mesh::ambient_of_namespaces", run: ambient::of_namespaces },
    Test { name: "mesh::ambient_fails_closed", run: ambient::fails_closed },
    Test { name: "mesh::ambient_killed_shim", run: ambient::killed_shim },
    Test { name: "mesh::bad_annotations", run: ambient::bad_annotations },
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
    Test { name: "mesh::sidecar_guest_ends", run: sidecar::guest_ends },
    Test { name: "mesh::sidecar_bad_annotations", run: sidecar::bad_annotations },
];
