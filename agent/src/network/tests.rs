#![allow(clippy::print_stdout)]

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 7, 7];

fn ip(text: &str) -> Vec<u8> {
    match text.parse().expect("an address") {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(text: &str, prefix: u32) -> api::Address {
    api::Address { ip: ip(text), prefix, ..Default::default() }
}

fn hop(destination: &str, prefix: u32, gateway: &str) -> api::Route {
    let of = |text: &str| if text.is_empty() { Vec::new() } else { ip(text) };
    api::Route {
        destination: of(destination),
        prefix,
        gateway: of(gateway),
        interface: "eth0".to_owned(),
        ipv6: destination.contains(':') || gateway.contains(':'),
        scope: if gateway.is_empty() { 253 } else { 0 },
        ..Default::default()
    }
}

fn network() -> api::Network {
    api::Network {
        interfaces: vec![api::Interface {
            name: "eth0".to_owned(),
            mac: MAC.to_vec(),
            mtu: 1400,
            addresses: vec![address("10.7.0.5", 24), address("fd07::5", 64)],
            ..Default::default()
        }],
        // Behind a gateway first: the agent has to find the order.
        routes: vec![
            hop("", 0, "10.7.0.1"),
            hop("10.7.0.0", 24, ""),
            hop("", 0, "fd07::1"),
            hop("fd07::", 64, ""),
        ],
        neighbours: vec![api::Neighbour {
            ip: ip("10.7.0.1"),
            mac: vec![2, 0, 0, 0, 0, 1],
            interface: "eth0".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn ip_tool(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("run ip");
    let (out, err) = (output.stdout, output.stderr);
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&err));
    String::from_utf8_lossy(&out).into_owned()
}

/// Runs in a thread with a network namespace of its own, if that is allowed here.
fn alone(test: fn()) {
    if !nix::unistd::geteuid().is_root() {
        crate::log::skipped("the guest's network", "needs root for a network namespace");
        return;
    }
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
        test();
    };
    std::thread::spawn(inside).join().expect("the test in its namespace");
}

#[test]
fn the_guest_gets_all_of_the_pods_network() {
    alone(|| {
        ip_tool("link add before type veth peer name other");
        ip_tool("link set other up");
        let mut links = Links::prepare().expect("prepare");
        links.apply(&network(), false).expect("apply");
        links.add_link_local(&network()).expect("link-local");
        let link = ip_tool("-d link show eth0");
        assert!(link.contains("mtu 1400") && link.contains("02:00:00:00:07:07"), "{link}");
        assert!(link.contains("UP"), "{link}");
        let addresses = ip_tool("-o addr show eth0");
        assert!(addresses.contains("10.7.0.5/24") && addresses.contains("fd07::5/64"));
        assert!(addresses.contains("fe80::ff:fe00:707/64"), "{addresses}");
        assert!(!addresses.contains("tentative"), "{addresses}");
        let routes = ip_tool("-4 route show table main");
        assert!(routes.contains("default via 10.7.0.1 dev eth0"), "{routes}");
        assert_eq!(routes.matches("10.7.0.0/24").count(), 1, "{routes}");
        let routes = ip_tool("-6 route show table main");
        assert!(routes.contains("default via fd07::1 dev eth0"), "{routes}");
        assert!(ip_tool("neigh show dev eth0").contains("10.7.0.1 lladdr 02:00:00:00:00:01 PERM"));
        assert!(ip_tool("link show lo").contains("LOOPBACK,UP"));
    });
}

#[test]
fn a_pod_without_interface_has_loopback() {
    alone(|| {
        let mut links = Links::prepare().expect("prepare");
        links.apply(&api::Network::new(), false).expect("apply");
        assert!(ip_tool("link show lo").contains("LOOPBACK,UP"));
    });
}

#[test]
fn what_cannot_be_is_refused() {
    alone(|| {
        let mut links = Links::prepare().expect("prepare");
        let error = links.apply(&network(), false).expect_err("no device");
        assert!(matches!(error, NetworkError::NoDevice { .. }), "{error}");
        ip_tool("link add before type veth peer name other");
        let mut links = Links::prepare().expect("prepare");
        let mut refused = |change: fn(&mut api::Network)| {
            let mut network = network();
            change(&mut network);
            let error = links.apply(&network, false).expect_err("must be refused");
            assert!(error.is_callers(), "{error}");
        };
        refused(|n| n.interfaces[0].name = "../eth0".to_owned());
        refused(|n| n.interfaces[0].mac.clear());
        refused(|n| n.interfaces[0].addresses[0].prefix = 33);
        refused(|n| n.interfaces[0].addresses[0].ip.clear());
        refused(|n| n.routes[1].gateway = vec![1; 16]);
        refused(|n| n.routes[1].interface = "eth1".to_owned());
        refused(|n| n.neighbours[0].mac.clear());
        assert!(ip_tool("link show").contains("before"), "nothing is changed by a refused request");
    });
}
