//! The pod's network in the guest: exactly what CNI made on the host, on the virtio device instead.
//!
//! The host sends what it read; here it is checked and turned into one batch of netlink requests, in
//! the order their effects need: link, addresses, routes on the link, routes behind a gateway,
//! neighbours. Addresses bring no routes of their own, since the pod's are complete, and are used
//! at once: nobody else on the network can have them.
//!
//! All that does not depend on the pod is done before a template is saved ([`Links::prepare`]): the
//! links are found and up. A clone then only changes addresses, a tenth of the kernel's work.

use std::fs;
use std::io;
use std::net::IpAddr;

use joey_ebpf::netlink::{Message, NetlinkError, Reply, Socket};
use joey_ebpf::route::{self, RouteHeader, word};
use joey_protocol::api;

/// `ARPHRD_ETHER`.
const ETHERNET: u32 = 1;
/// Index of every namespace's loopback.
const LOOPBACK: u32 = 1;
/// `IFA_F_NODAD | IFA_F_NOPREFIXROUTE`.
const ADDRESS_FLAGS: u32 = NO_DETECTION | 0x200;
/// `IFA_F_NODAD`: no duplicate address detection, which would only cost a second.
const NO_DETECTION: u32 = 0x02;
/// `::6`: by which a sidecar, bound to it, marks what it hands on to the pod. Loopback has 127.0.0.6 already; this
/// Istio's init container adds (`configureIPv6Addresses` of istio-iptables).
pub(crate) const HANDED_ON: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6];
/// Longest name of an interface.
const NAME_MAX: usize = 15;

/// Why the sandbox has no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The host asks for something that cannot be.
    #[error("network: {what}: {problem}")]
    Invalid {
        /// Which part of the request.
        what: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The VM has fewer network devices than the pod interfaces.
    #[error("network: interface {name}: the VM has no network device {index}")]
    NoDevice {
        /// Interface.
        name: String,
        /// Device wanted.
        index: u32,
    },
    /// The kernel refused.
    #[error("network: {0}")]
    Netlink(#[from] NetlinkError),
    /// A setting could not be made.
    #[error("network: writing {path}: {source}")]
    Setting {
        /// File.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl NetworkError {
    /// Whether the request, not the guest, is at fault.
    pub(crate) fn is_callers(&self) -> bool {
        matches!(self, Self::Invalid { .. })
    }
}

/// A device of the guest.
struct Device {
    index: u32,
    name: String,
}

/// The guest's links: up, and without an address.
pub(crate) struct Links {
    socket: Socket,
    devices: Vec<Device>,
}

impl Links {
    /// Finds the links and sets them up.
    pub(crate) fn prepare() -> Result<Self, NetworkError> {
        let mut socket = Socket::open()?;
        let devices = devices(&mut socket)?;
        for device in &devices {
            without_own_addresses(&device.name)?;
        }
        let up = |index| route::link("set a link up", libc::RTM_NEWLINK, index, true);
        let indexes = devices.iter().map(|device| device.index);
        socket.batch([LOOPBACK].into_iter().chain(indexes).map(up).collect::<Vec<_>>())?;
        Ok(Self { socket, devices })
    }

    /// No links at all.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { socket: Socket::open().unwrap(), devices: Vec::new() }
    }

    /// Gives the links their link-local addresses, as far as the pod speaks IPv6. Once the pod has
    /// started: the kernel, too, gives them a while after a link is up.
    pub(crate) fn add_link_local(&mut self, network: &api::Network) -> Result<(), NetworkError> {
        let mut batch = Vec::new();
        for interface in &network.interfaces {
            if interface.addresses.iter().any(|address| address.ip.len() == 16) {
                let step = format!("add the link-local address of {}", interface.name);
                let index = device(&self.devices, interface)?.index;
                let address = route::address(step, index, &link_local(&interface.mac), 64);
                batch.push(address.number(route::ADDRESS_FLAGS, NO_DETECTION));
            }
        }
        Ok(self.socket.batch(batch)?)
    }

    /// Gives the links the pod's addresses and routes, and loopback what a `sidecar` needs; a link that the pod has
    /// no use for goes down.
    pub(crate) fn apply(
        &mut self,
        network: &api::Network,
        sidecar: bool,
    ) -> Result<(), NetworkError> {
        let mut batch = Vec::new();
        if sidecar {
            batch.push(route::address("add ::6 to lo", LOOPBACK, &HANDED_ON, 128));
        }
        for interface in &network.interfaces {
            configure(&mut batch, device(&self.devices, interface)?.index, interface)?;
        }
        let index = |name: &str| {
            let interface = network.interfaces.iter().find(|i| i.name == name);
            let interface = interface.ok_or_else(|| NetworkError::Invalid {
                what: format!("interface {name:?} of a route or neighbour"),
                problem: "is none of the pod's",
            })?;
            device(&self.devices, interface).map(|device| device.index)
        };
        let (near, far): (Vec<_>, Vec<_>) =
            network.routes.iter().partition(|route| route.gateway.is_empty());
        for route in near.into_iter().chain(far) {
            batch.push(self::route(route, index(&route.interface)?)?);
        }
        for neighbour in &network.neighbours {
            batch.push(self::neighbour(neighbour, index(&neighbour.interface)?)?);
        }
        let used = |index: usize| {
            network.interfaces.iter().any(|i| usize::try_from(i.device_index) == Ok(index))
        };
        let idle = self.devices.iter().enumerate().filter(|(index, _)| !used(*index));
        batch.extend(idle.map(|(_, device)| route::down("set an unused link down", device.index)));
        Ok(self.socket.batch(batch)?)
    }

    /// Takes addresses and routes back, the latter by setting the links down and up again.
    pub(crate) fn clear(
        &mut self,
        network: &api::Network,
        sidecar: bool,
    ) -> Result<(), NetworkError> {
        let mut batch = Vec::new();
        if sidecar {
            batch.push(route::no_address("remove ::6 from lo", LOOPBACK, &HANDED_ON, 128));
        }
        for interface in &network.interfaces {
            let index = device(&self.devices, interface)?.index;
            for address in &interface.addresses {
                let what = || format!("address {}", shown(&address.ip));
                let prefix = prefix(&address.ip, address.prefix, &what)?;
                let step = format!("remove {}", what());
                batch.push(route::no_address(step, index, &address.ip, prefix));
            }
        }
        let links = self.devices.iter().map(|device| device.index);
        for index in links {
            batch.push(route::down("set a link down", index));
            batch.push(route::link("set a link up", libc::RTM_NEWLINK, index, true));
        }
        Ok(self.socket.batch(batch)?)
    }
}

/// The Ethernet devices in the order of their probing.
fn devices(socket: &mut Socket) -> Result<Vec<Device>, NetworkError> {
    let links = socket.dump(route::list("list network devices", libc::RTM_GETLINK))?;
    let mut devices: Vec<Device> = links.iter().filter_map(ethernet).collect();
    devices.sort_by_key(|device| device.index);
    Ok(devices)
}

fn ethernet(reply: &Reply) -> Option<Device> {
    let name = reply.attributes(route::LINK).text(route::LINK_NAME)?.to_owned();
    let ethernet = word(reply, 0)? >> 16 == ETHERNET;
    ethernet.then_some(Device { index: word(reply, 4)?, name })
}

fn device<'a>(
    devices: &'a [Device],
    interface: &api::Interface,
) -> Result<&'a Device, NetworkError> {
    let index = usize::try_from(interface.device_index).unwrap_or(usize::MAX);
    devices.get(index).ok_or_else(|| NetworkError::NoDevice {
        name: interface.name.clone(),
        index: interface.device_index,
    })
}

/// The link gets the addresses and routes that it is given, and asks nobody for others: what routers
/// told the pod's interface on the host is among them.
fn without_own_addresses(device: &str) -> Result<(), NetworkError> {
    for (setting, value) in [
        ("addr_gen_mode", "1"),
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("router_solicitations", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/{device}/{setting}");
        match fs::write(&path, value) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(|source| NetworkError::Setting { path, source })?,
        }
    }
    Ok(())
}

/// The link-local address that belongs to a hardware address of 6 bytes (RFC 4291, appendix A).
pub(crate) fn link_local(mac: &[u8]) -> Vec<u8> {
    let mut ip = vec![0xfe, 0x80, 0, 0, 0, 0, 0, 0];
    ip.extend([mac[0] ^ 0x02, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]]);
    ip
}

fn configure(
    batch: &mut Vec<Message>,
    index: u32,
    interface: &api::Interface,
) -> Result<(), NetworkError> {
    let name = interface.name.as_str();
    let invalid =
        |problem| Err(NetworkError::Invalid { what: format!("interface {name:?}"), problem });
    let printable = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if name.is_empty() || name.len() > NAME_MAX || !printable || name == "." || name == ".." {
        return invalid("is not a name for an interface");
    }
    if interface.mac.len() != 6 {
        return invalid("has a hardware address that is not 6 bytes long");
    }
    let link = route::link(format!("configure {name}"), libc::RTM_NEWLINK, index, false)
        .text(route::LINK_NAME, name)
        .attribute(route::LINK_MAC, &interface.mac)
        .number(route::LINK_MTU, interface.mtu);
    batch.push(link);
    for address in &interface.addresses {
        let what = || format!("address {} of {name}", shown(&address.ip));
        let prefix = prefix(&address.ip, address.prefix, &what)?;
        let mut message = route::address(format!("add {}", what()), index, &address.ip, prefix)
            .number(route::ADDRESS_FLAGS, ADDRESS_FLAGS);
        if !address.broadcast.is_empty() {
            message = message.attribute(route::ADDRESS_BROADCAST, &address.broadcast);
        }
        batch.push(message);
    }
    Ok(())
}

fn route(route: &api::Route, index: u32) -> Result<Message, NetworkError> {
    let what = || format!("route to {}/{}", shown(&route.destination), route.prefix);
    let length = if route.ipv6 { 16 } else { 4 };
    let fits = |bytes: &[u8]| bytes.is_empty() || bytes.len() == length;
    if ![&route.destination, &route.gateway, &route.source].iter().all(|bytes| fits(bytes)) {
        return Err(NetworkError::Invalid {
            what: what(),
            problem: "has addresses of another family",
        });
    }
    let prefix = match (route.destination.is_empty(), route.prefix) {
        (true, 0) => 0,
        _ => prefix(&route.destination, route.prefix, &what)?,
    };
    let scope = u8::try_from(route.scope).unwrap_or(libc::RT_SCOPE_UNIVERSE);
    let header = RouteHeader { ipv6: route.ipv6, prefix, scope, on_link: route.on_link };
    let mut message = route::route(format!("add {}", what()), header).number(libc::RTA_OIF, index);
    for (kind, value) in [
        (libc::RTA_DST, &route.destination),
        (libc::RTA_GATEWAY, &route.gateway),
        (libc::RTA_PREFSRC, &route.source),
    ] {
        if !value.is_empty() {
            message = message.attribute(kind, value);
        }
    }
    if route.metric != 0 {
        message = message.number(libc::RTA_PRIORITY, route.metric);
    }
    Ok(message)
}

fn neighbour(neighbour: &api::Neighbour, index: u32) -> Result<Message, NetworkError> {
    let what = format!("neighbour {}", shown(&neighbour.ip));
    if !matches!(neighbour.ip.len(), 4 | 16) || neighbour.mac.len() != 6 {
        return Err(NetworkError::Invalid { what, problem: "has no usable addresses" });
    }
    Ok(route::neighbour(format!("add {what}"), index, &neighbour.ip, &neighbour.mac))
}

fn prefix(ip: &[u8], prefix: u32, what: &dyn Fn() -> String) -> Result<u8, NetworkError> {
    let invalid = |problem| NetworkError::Invalid { what: what(), problem };
    if !matches!(ip.len(), 4 | 16) {
        return Err(invalid("is neither IPv4 nor IPv6"));
    }
    u8::try_from(prefix)
        .ok()
        .filter(|prefix| usize::from(*prefix) <= ip.len() * 8)
        .ok_or_else(|| invalid("has a prefix that is too long"))
}

fn shown(ip: &[u8]) -> String {
    let v4 = <[u8; 4]>::try_from(ip).map(IpAddr::from);
    let any = v4.or_else(|_| <[u8; 16]>::try_from(ip).map(IpAddr::from));
    match any {
        Ok(ip) => ip.to_string(),
        Err(_) if ip.is_empty() => "default".to_owned(),
        Err(_) => format!("{ip:?}"),
    }
}

#[cfg(test)]
#[path = "network/tests.rs"]
mod tests;
