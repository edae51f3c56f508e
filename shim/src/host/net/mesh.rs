//! The pod's network namespace as a mesh's proxy needs it: what enters its devices and was not passed on is for the
//! namespace's own sockets, whatever its destination, and what these send to the pod goes to the VM.
//!
//! ```text
//!   rule 0   from joey0, eth0      ─▶ table TAKEN   everything is local
//!   rule 0   from the own sockets  ─▶ table VM      the pod's addresses: by joey0
//!   rule 1                         ─▶ table local   which the kernel has at 0
//! ```
//!
//! No address, and no route of the kernel's or of CNI's, is changed; what is made is found by its tables' numbers, and
//! taken away knowing nothing but the namespace. Rules by device need no marks, so nobody else's are in the way.

use std::fs;
use std::io;
use std::net::IpAddr;

use joey_ebpf::netlink::{Message, NetlinkError, Socket};
use joey_ebpf::route::{self, Rule};

use super::TAP;

/// Tables' numbers: "jy", as the limits' qdiscs have, and the next one.
const TAKEN: u32 = 0x6A79;
const VM: u32 = 0x6A7A;
/// Every namespace has its loopback at this index (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
const LOCAL: u32 = libc::RT_TABLE_LOCAL as u32;

/// Joey's rules for one family.
fn rules(ipv6: bool, interface: &str) -> [Rule<'_>; 3] {
    let rule =
        |device, table| Rule { ipv6, device: Some(device), priority: 0, table, kernels: false };
    [rule(TAP, TAKEN), rule(interface, TAKEN), rule("lo", VM)]
}

/// The kernel's rule for its own table, at another place.
fn local(ipv6: bool, priority: u32) -> Rule<'static> {
    Rule { ipv6, device: None, priority, table: LOCAL, kernels: true }
}

fn families(addresses: &[IpAddr]) -> impl Iterator<Item = bool> {
    let any = |ipv6| addresses.iter().any(|ip| ip.is_ipv6() == ipv6);
    [any(false).then_some(false), any(true).then_some(true)].into_iter().flatten()
}

/// Has what enters the interface and the tap be for the namespace's sockets.
pub(super) fn take(
    place: &mut Socket,
    interface: &str,
    addresses: &[IpAddr],
) -> Result<(), NetlinkError> {
    for ipv6 in families(addresses) {
        place.request(route::table_route(libc::RTM_NEWROUTE, TAKEN, ipv6, &[], LOOPBACK, true))?;
        let rules = rules(ipv6, interface);
        for rule in rules.iter().chain([&local(ipv6, 1)]) {
            ignore(place.request(rule.add()), &[libc::EEXIST])?;
        }
        ignore(place.request(local(ipv6, 0).remove()), &[libc::ENOENT])?;
    }
    Ok(())
}

/// The requests that lead to the VM, once the tap is up.
pub(super) fn lead(tap: u32, mac: [u8; 6], addresses: &[IpAddr]) -> Vec<Message> {
    let one = |ip: &IpAddr| {
        let bytes = octets(ip);
        [
            route::table_route(libc::RTM_NEWROUTE, VM, ip.is_ipv6(), &bytes, tap, false),
            route::neighbour("enter the VM as a neighbour", tap, &bytes, &mac),
        ]
    };
    addresses.iter().flat_map(one).collect()
}

fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Gives the namespace back as it was. Fine when nothing was changed; the tap is gone already.
pub(super) fn give_back(place: &mut Socket) -> Result<(), NetlinkError> {
    const GONE: [i32; 3] = [libc::ENOENT, libc::ESRCH, libc::EEXIST];
    let found = place.dump(Message::new("list rules", libc::RTM_GETRULE, 0, &[0; route::RULE]))?;
    // The device's name and the family of each.
    let own: Vec<(bool, String, u32)> = found
        .iter()
        .filter_map(|reply| {
            let attributes = reply.attributes(route::RULE);
            let table = attributes.number(route::RULE_TABLE).filter(|t| [TAKEN, VM].contains(t))?;
            let ipv6 = i32::from(*reply.header(1)?.first()?) == libc::AF_INET6;
            Some((ipv6, attributes.text(route::RULE_DEVICE)?.to_owned(), table))
        })
        .collect();
    for ipv6 in [false, true] {
        if own.iter().any(|(of, ..)| *of == ipv6) {
            let routes = route::table_route(libc::RTM_DELROUTE, TAKEN, ipv6, &[], LOOPBACK, true);
            for request in [local(ipv6, 0).add(), local(ipv6, 1).remove(), routes] {
                ignore(place.request(request), &GONE)?;
            }
        }
    }
    // Last: by them it is known that there is something to be done.
    for (ipv6, device, table) in &own {
        let (ipv6, device) = (*ipv6, Some(device.as_str()));
        let rule = Rule { ipv6, device, priority: 0, table: *table, kernels: false };
        ignore(place.request(rule.remove()), &GONE)?;
    }
    Ok(())
}

fn ignore(result: Result<(), NetlinkError>, fine: &[i32]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| fine.contains(&errno)) => Ok(()),
        other => other,
    }
}

/// Has the tap of the thread's namespace carry the proxy's packets, and nothing that the host's stack says by itself.
/// With `dns` these may come from loopback, where the proxy's resolver is.
pub(super) fn ready_tap(dns: bool) -> io::Result<()> {
    let path = |family, key| format!("/proc/sys/net/{family}/conf/{TAP}/{key}");
    if dns {
        fs::write(path("ipv4", "route_localnet"), "1")?;
    }
    // No address of its own, so nothing to be announced or asked.
    for (key, value) in [("addr_gen_mode", "1"), ("accept_ra", "0"), ("disable_ipv6", "0")] {
        match fs::write(path("ipv6", key), value) {
            // A host without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_families_are_changed() {
        let [v4, v6]: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(families(&[]).count(), 0);
        assert_eq!(families(&[v6]).collect::<Vec<_>>(), [true]);
        assert_eq!(families(&[v6, v4]).collect::<Vec<_>>(), [false, true]);
    }
}
