//! Sidecar mode: Istio's annotations about what its proxy gets, and Joey's own about the proxy.
//!
//! Names, defaults and meanings are Istio's: the annotations' reference, its injection template (`istio-init`'s
//! arguments) and what istio-iptables makes of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use joey_protocol::api;

use crate::policy::cidr;
use crate::sizing::SizingError;

/// Ranges of addresses that connections are redirected for; `*` for all.
pub const INCLUDE_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
/// Ranges of addresses that they are not redirected for.
pub const EXCLUDE_RANGES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
/// Ports that connections are redirected for, outside the ranges too.
pub const INCLUDE_OUTBOUND: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
/// Ports that they are not redirected for.
pub const EXCLUDE_OUTBOUND: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
/// Ports of the pod that the proxy gets what comes in for; `*` for all.
pub const INCLUDE_INBOUND: &str = "traffic.sidecar.istio.io/includeInboundPorts";
/// Ports of the pod that what comes in reaches directly.
pub const EXCLUDE_INBOUND: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
/// Where the proxy listens for what leaves the pod.
pub const OUTBOUND_PORT: &str = "io.joey.mesh.outbound-port";
/// Where it listens for what comes in.
pub const INBOUND_PORT: &str = "io.joey.mesh.inbound-port";
/// Users whose connections are left alone: the proxy's.
pub const USERS: &str = "io.joey.mesh.exclude-uids";
/// Groups, likewise.
pub const GROUPS: &str = "io.joey.mesh.exclude-gids";

/// Joey's own.
pub const OWN: [&str; 4] = [OUTBOUND_PORT, INBOUND_PORT, USERS, GROUPS];

/// Where Istio's proxy listens, and its agent for DNS.
const ISTIO_OUTBOUND: u32 = 15001;
const ISTIO_INBOUND: u32 = 15006;
const ISTIO_DNS: u32 = 15053;
/// The user and group that it runs as.
const ISTIO_OWNER: u32 = 1337;
/// Ports of the proxy itself, which Istio always has reached directly: Envoy's metrics, its health, and the status
/// port, to which the kubelet's probes are rewritten.
const ISTIO_PORTS: [u32; 3] = [15090, 15021, 15020];
/// Of ports, ranges and owners, which the guest has room for, several lists together.
const MOST: usize = 200;
const ALL: &str = "*";

type Notes = HashMap<String, String>;

/// What the agent is to do for a pod with these annotations. `dns`: the proxy answers queries.
///
/// # Errors
/// An annotation that cannot be followed.
pub fn of(notes: &Notes, dns: bool) -> Result<api::Mesh, SizingError> {
    let every_inbound_port = notes.get(INCLUDE_INBOUND).is_none_or(|value| value.trim() == ALL);
    let include_inbound_ports =
        if every_inbound_port { Vec::new() } else { ports(notes, INCLUDE_INBOUND)? };
    let mut exclude_inbound_ports = ports(notes, EXCLUDE_INBOUND)?;
    exclude_inbound_ports.extend(ISTIO_PORTS);
    let include_outbound = match notes.get(INCLUDE_RANGES).map(|value| value.trim()) {
        None | Some(ALL) => [4, 16].map(|length| range(vec![0; length], 0)).to_vec(),
        Some(_) => ranges(notes, INCLUDE_RANGES)?,
    };
    let mesh = api::Mesh {
        capture: true,
        outbound_port: listener(notes, OUTBOUND_PORT, ISTIO_OUTBOUND)?,
        inbound_port: listener(notes, INBOUND_PORT, ISTIO_INBOUND)?,
        dns_port: if dns { ISTIO_DNS } else { 0 },
        every_inbound_port,
        exclude_inbound_ports,
        include_inbound_ports,
        exclude_outbound_ports: ports(notes, EXCLUDE_OUTBOUND)?,
        include_outbound_ports: ports(notes, INCLUDE_OUTBOUND)?,
        exclude_outbound: ranges(notes, EXCLUDE_RANGES)?,
        include_outbound,
        users: owners(notes, USERS)?,
        groups: owners(notes, GROUPS)?,
        ..Default::default()
    };
    if mesh.outbound_port == mesh.inbound_port {
        let value = mesh.inbound_port.to_string();
        return Err(bad(INBOUND_PORT, &value, format!("must differ from {OUTBOUND_PORT}")));
    }
    Ok(mesh)
}

fn bad(name: &str, value: &str, reason: impl Into<String>) -> SizingError {
    SizingError { name: name.to_owned(), value: value.to_owned(), reason: reason.into() }
}

/// The parts of a list, by commas; nothing for one that is not there or empty.
fn list<T>(
    notes: &Notes,
    name: &str,
    what: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, SizingError> {
    let Some(value) = notes.get(name).filter(|value| !value.trim().is_empty()) else {
        return Ok(Vec::new());
    };
    let read = |part: &str| {
        read(part.trim()).ok_or_else(|| bad(name, value, format!("{part:?} is not {what}")))
    };
    let all = value.split(',').map(read).collect::<Result<Vec<_>, _>>()?;
    if all.len() > MOST {
        return Err(bad(name, value, format!("must have at most {MOST} entries")));
    }
    Ok(all)
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn port(text: &str) -> Option<u32> {
    number(text).filter(|port| (1..=65535).contains(port))
}

fn ports(notes: &Notes, name: &str) -> Result<Vec<u32>, SizingError> {
    list(notes, name, "a port from 1 to 65535", port)
}

fn listener(notes: &Notes, name: &str, usual: u32) -> Result<u32, SizingError> {
    let Some(value) = notes.get(name) else { return Ok(usual) };
    port(value).ok_or_else(|| bad(name, value, "must be a port from 1 to 65535"))
}

fn owners(notes: &Notes, name: &str) -> Result<Vec<u32>, SizingError> {
    let owners = list(notes, name, "a number of a user or group", number)?;
    let usual = || vec![ISTIO_OWNER];
    Ok(if notes.contains_key(name) { owners } else { usual() })
}

fn range(ip: Vec<u8>, prefix: u32) -> api::Address {
    api::Address { ip, prefix, ..Default::default() }
}

fn ranges(notes: &Notes, name: &str) -> Result<Vec<api::Address>, SizingError> {
    let read = |text: &str| {
        let prefix = cidr::parse(text).ok()?;
        // The guest looks IPv4 addresses up as ::ffff:a.b.c.d, in the same list.
        let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
        if let IpAddr::V6(ip) = prefix.address
            && prefix.bits <= 96
            && (ip.to_bits() ^ mapped.to_bits()).leading_zeros() >= prefix.bits.into()
        {
            return None;
        }
        let ip = match prefix.address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        Some(range(ip, prefix.bits.into()))
    };
    let what = "a range of addresses like 10.0.0.0/8 or fd00::/64 (of IPv6 not ::/80 or wider, which has IPv4's in it: \
                2000::/3 are the public ones)";
    list(notes, name, what, read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(notes: &[(&str, &str)]) -> Result<api::Mesh, String> {
        let notes = notes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        super::of(&notes, false).map_err(|error| error.to_string())
    }

    #[test]
    fn without_annotations_it_is_as_istio_has_it() {
        let mesh = of(&[]).unwrap();
        assert_eq!((mesh.outbound_port, mesh.inbound_port, mesh.dns_port), (15001, 15006, 0));
        assert_eq!((mesh.users, mesh.groups), (vec![1337], vec![1337]));
        assert!(mesh.every_inbound_port);
        assert_eq!(mesh.exclude_inbound_ports, [15090, 15021, 15020]);
        assert_eq!(mesh.include_outbound.len(), 2);
        assert!(mesh.exclude_outbound.is_empty() && mesh.exclude_outbound_ports.is_empty());
        assert_eq!(super::of(&Notes::new(), true).unwrap().dns_port, 15053);
    }

    #[test]
    fn annotations_say_what_is_captured() {
        let mesh = of(&[
            (INCLUDE_RANGES, "10.0.0.0/8, fd00::/64"),
            (EXCLUDE_RANGES, "10.1.0.0/16"),
            (INCLUDE_OUTBOUND, "443"),
            (EXCLUDE_OUTBOUND, "3306,5432"),
            (INCLUDE_INBOUND, "80"),
            (EXCLUDE_INBOUND, "22"),
            (USERS, "0,1337"),
            (GROUPS, ""),
            (OUTBOUND_PORT, "16001"),
        ])
        .unwrap();
        assert_eq!(mesh.include_outbound[1], range([vec![0xfd], vec![0; 15]].concat(), 64));
        assert_eq!(mesh.exclude_outbound, [range(vec![10, 1, 0, 0], 16)]);
        assert_eq!(mesh.exclude_outbound_ports, [3306, 5432]);
        assert_eq!((mesh.every_inbound_port, mesh.include_inbound_ports), (false, vec![80]));
        assert_eq!(mesh.exclude_inbound_ports, [22, 15090, 15021, 15020]);
        assert_eq!((mesh.users, mesh.groups), (vec![0, 1337], vec![]));
        assert_eq!(mesh.outbound_port, 16001);
        assert!(of(&[(INCLUDE_RANGES, "")]).unwrap().include_outbound.is_empty());
        let none = of(&[(INCLUDE_INBOUND, "")]).unwrap();
        assert!(!none.every_inbound_port && none.include_inbound_ports.is_empty());
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        let many = vec!["1"; 201].join(",");
        for (name, value, words) in [
            (OUTBOUND_PORT, "0", "a port from 1 to 65535"),
            (INBOUND_PORT, "15001", "must differ"),
            (INBOUND_PORT, "http", "a port"),
            (EXCLUDE_OUTBOUND, "80,65536", "\"65536\" is not a port"),
            (EXCLUDE_INBOUND, "80,,81", "\"\" is not a port"),
            (INCLUDE_INBOUND, "*,80", "\"*\" is not"),
            (EXCLUDE_RANGES, "10.0.0.1/8", "a range of addresses"),
            (EXCLUDE_RANGES, "*", "a range of addresses"),
            (EXCLUDE_RANGES, "::/0", "2000::/3"),
            (EXCLUDE_RANGES, "::ffff:0:0/96", "2000::/3"),
            (INCLUDE_RANGES, "::/80", "2000::/3"),
            (INCLUDE_RANGES, "10.0.0.0/33", "a range"),
            (USERS, "+1", "a user"),
            (USERS, "4294967296", "a user"),
            (EXCLUDE_OUTBOUND, &many, "at most 200"),
        ] {
            let error = of(&[(name, value)]).unwrap_err();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
    }
}
