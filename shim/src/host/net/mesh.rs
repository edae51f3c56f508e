//! The pod's network namespace as a mesh's proxy needs it: what enters its devices and was not passed on is for the
//! namespace's own sockets, whatever its destination, and what these send to the pod goes to the VM.
//!
//! ```text
//!   rule 0   from joey0, eth0      ─▶ table TAKEN   everything is local
//!   rule 0   from the own sockets  ─▶ table VM      the pod's addresses: by joey0
//!   rule 1                         ─▶ table local   which the kernel has at 0
//! ```
//!
//! A connection's end there waits for no late segments (`TIME-WAIT`): a listener that is given a segment which opens
//! another one of the same ports could not take it for a minute (`net/ipv4/inet_hashtables.c`, `inet_ehash_insert()`;
//! iptables' TPROXY ends the old one first, which programs cannot). Between proxy and VM nothing comes late, and
//! others are answered by a reset.
//!
//! No address, and no route of the kernel's or of CNI's, is changed; what is made is found by its tables' numbers, and
//! taken away knowing nothing but the namespace. Rules by device need no marks, so nobody else's are in the way.

use std::fs;
use std::io;
use std::net::IpAddr;

use joey_ebpf::netlink::{Message, NetlinkError, Reply, Socket};
use joey_ebpf::route::{self, Rule};

use super::TAP;

/// Tables' numbers: "jy", as the limits' qdiscs have, and the next one.
const TAKEN: u32 = 0x6A79;
const VM: u32 = 0x6A7A;
/// Every namespace has its loopback at this index (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
const LOCAL: u32 = libc::RT_TABLE_LOCAL as u32;
/// How many ends of connections may wait. What it was is kept as the metric of the routes of [`TAKEN`].
const WAITING: &str = "/proc/sys/net/ipv4/tcp_max_tw_buckets";

/// Why the namespace is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum MeshNetError {
    /// A request.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A setting.
    #[error("{WAITING}: {0}")]
    Setting(#[from] io::Error),
}

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

/// Has what enters the interface and the tap be for the namespace's sockets. What an earlier attempt left is taken
/// away first.
pub(super) fn take(
    place: &mut Socket,
    interface: &str,
    addresses: &[IpAddr],
) -> Result<(), MeshNetError> {
    give_back(place)?;
    let waiting = fs::read_to_string(WAITING)?;
    let waiting = waiting.trim().parse().map_err(io::Error::other)?;
    let requests = families(addresses).flat_map(|ipv6| {
        let rules = rules(ipv6, interface).map(|rule| rule.add());
        let route = taken(libc::RTM_NEWROUTE, ipv6).number(libc::RTA_PRIORITY, waiting);
        rules.into_iter().chain([route, local(ipv6, 1).add(), local(ipv6, 0).remove()])
    });
    place.batch(requests)?;
    Ok(fs::write(WAITING, "0")?)
}

/// About the route by which everything is local.
fn taken(kind: u16, ipv6: bool) -> Message {
    route::table_route(kind, TAKEN, ipv6, &[], LOOPBACK, true)
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

/// A rule that is there.
struct Found {
    ipv6: bool,
    device: Option<String>,
    priority: u32,
    table: u32,
}

impl Found {
    fn read(reply: &Reply) -> Option<Self> {
        let attributes = reply.attributes(route::RULE);
        Some(Self {
            ipv6: i32::from(*reply.header(1)?.first()?) == libc::AF_INET6,
            device: attributes.text(route::RULE_DEVICE).map(str::to_owned),
            priority: attributes.number(route::RULE_PRIORITY).unwrap_or(0),
            table: attributes.number(route::RULE_TABLE)?,
        })
    }

    /// Whether Joey made it, or put it where it is.
    fn is_joeys(&self) -> bool {
        [TAKEN, VM].contains(&self.table) || (self.table == LOCAL && self.priority == 1)
    }
}

/// Gives the namespace back as it was. Fine when nothing was changed, or is changed any more.
pub(super) fn give_back(place: &mut Socket) -> Result<(), MeshNetError> {
    const GONE: [i32; 3] = [libc::ENOENT, libc::ESRCH, libc::EEXIST];
    let found = place.dump(Message::new("list rules", libc::RTM_GETRULE, 0, &[0; route::RULE]))?;
    let found: Vec<Found> = found.iter().filter_map(Found::read).collect();
    if !found.iter().any(Found::is_joeys) {
        return Ok(());
    }
    for reply in place.dump(route::list("list routes", libc::RTM_GETROUTE))? {
        let attributes = reply.attributes(route::ROUTE);
        let of_table = attributes.number(libc::RTA_TABLE) == Some(TAKEN);
        if let Some(waiting) = attributes.number(libc::RTA_PRIORITY).filter(|_| of_table) {
            fs::write(WAITING, waiting.to_string())?;
        }
    }
    for ipv6 in [false, true] {
        if found.iter().any(|rule| rule.ipv6 == ipv6 && rule.is_joeys()) {
            let requests =
                [local(ipv6, 0).add(), local(ipv6, 1).remove(), taken(libc::RTM_DELROUTE, ipv6)];
            for request in requests {
                ignore(place.request(request), &GONE)?;
            }
        }
    }
    // Last: by them it is known that there is something to be done.
    for Found { ipv6, device, table, .. } in &found {
        if [TAKEN, VM].contains(table) {
            let device = device.as_deref();
            let rule = Rule { ipv6: *ipv6, device, priority: 0, table: *table, kernels: false };
            ignore(place.request(rule.remove()), &GONE)?;
        }
    }
    Ok(())
}

fn ignore(result: Result<(), NetlinkError>, fine: &[i32]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| fine.contains(&errno)) => Ok(()),
        other => other,
    }
}

/// Has the tap of the thread's namespace carry the proxy's packets. With `dns` these may come from loopback, where the
/// proxy's resolver is.
pub(super) fn ready_tap(dns: bool) -> io::Result<()> {
    let path = |family, key| format!("/proc/sys/net/{family}/conf/{TAP}/{key}");
    if dns {
        fs::write(path("ipv4", "route_localnet"), "1")?;
    }
    // As a host may have it for all new devices. Written only then: see `tap::silence`.
    let off = path("ipv6", "disable_ipv6");
    match fs::read_to_string(&off) {
        Ok(value) if value.trim() != "0" => fs::write(&off, "0"),
        // A host without IPv6.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
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
