//! What CNI left in a pod's namespace, read once, in four listings.

use std::net::IpAddr;
use std::path::Path;

use joey_ebpf::attach;
use joey_ebpf::netlink::{Attributes, NetlinkError, Reply, Socket};
use joey_ebpf::route::{self, word};
use joey_protocol::api::{Address, Interface, Neighbour, Network, Route};

use super::{NetError, TAP};

/// `RTA_VIA`.
const RTA_VIA: u16 = 18;
/// `RTM_F_CLONED`: a cache entry, not a route.
const CLONED: u32 = 0x200;

/// A device of the namespace.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) mac: Option<[u8; 6]>,
    loopback: bool,
    /// Number of the namespace that a veth device's other end is in, and its index there, unless it is in this one
    /// or the device has a qdisc.
    other_end: Option<(u32, u32)>,
}

/// The interface that the guest gets.
#[derive(Debug)]
pub(super) struct PodInterface {
    pub(super) index: u32,
    pub(super) mtu: u32,
    pub(super) mac: [u8; 6],
    /// See [`other_end`].
    pub(super) other_end: Option<[u8; 6]>,
}

/// The namespace's content.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) interface: Option<PodInterface>,
    /// A tap that an earlier attempt left.
    pub(super) tap: Option<u32>,
    pub(super) network: Network,
}

/// All devices.
pub(super) fn links(place: &mut Socket, netns: &Path) -> Result<Vec<Link>, NetError> {
    let links = list(place, netns, "list links", libc::RTM_GETLINK)?;
    Ok(links.iter().filter_map(link).collect())
}

/// The hardware address of an interface's other end, if the kernel can hand frames to that without passing the
/// interface, and nobody there would miss them: no qdisc that shapes, no filter that watches. A netkit device
/// is passed, as the CNI plugin's programs are on it.
pub(super) fn other_end(place: &mut Socket, link: &Link) -> Result<Option<[u8; 6]>, NetlinkError> {
    let Some((namespace, index)) = link.other_end else { return Ok(None) };
    if attach::is_watched(place, link.index)? {
        return Ok(None);
    }
    let get = route::link("look at the interface's other end", libc::RTM_GETLINK, index, false);
    match place.get(get.number(route::LINK_TARGET_NETNS, namespace)) {
        Ok(reply) => Ok(self::link(&reply).and_then(|link| link.mac)),
        // It is not to be seen from here.
        Err(error) if error.errno().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}

/// All global addresses, but those of a device.
pub(super) fn addresses(place: &mut Socket, but: u32) -> Result<Vec<IpAddr>, NetlinkError> {
    let addresses = place.dump(route::list("list addresses", libc::RTM_GETADDR))?;
    let addresses = addresses.iter().filter_map(address).filter(|(index, _)| *index != but);
    Ok(addresses.filter_map(|(_, address)| IpAddr::try_from(Bytes(&address.ip)).ok()).collect())
}

/// The addresses of an interface.
pub(super) fn own(network: &Network) -> Vec<IpAddr> {
    let addresses = network.interfaces.iter().flat_map(|interface| &interface.addresses);
    addresses.filter_map(|address| IpAddr::try_from(Bytes(&address.ip)).ok()).collect()
}

/// The interface with its addresses, routes and neighbours.
pub(super) fn pod(place: &mut Socket, netns: &Path) -> Result<Pod, NetError> {
    let unsupported = |reason| NetError::Unsupported { netns: netns.to_owned(), reason };
    let links = links(place, netns)?;
    let tap = links.iter().find(|link| link.name == TAP).map(|link| link.index);
    let addresses = list(place, netns, "list addresses", libc::RTM_GETADDR)?;
    let addresses: Vec<_> = addresses.iter().filter_map(address).collect();
    let addressed: Vec<&Link> = links
        .iter()
        .filter(|link| !link.loopback && link.name != TAP)
        .filter(|link| addresses.iter().any(|(index, _)| *index == link.index))
        .collect();
    let link = match addressed.as_slice() {
        [] => return Ok(Pod { interface: None, tap, network: Network::new() }),
        [link] => *link,
        more => {
            let names: Vec<&str> = more.iter().map(|link| link.name.as_str()).collect();
            return Err(unsupported(format!(
                "it has {} interfaces with addresses ({}); a Joey pod can have one: remove the \
                 additional networks from the pod",
                names.len(),
                names.join(", ")
            )));
        }
    };
    let Some(mac) = link.mac else {
        return Err(unsupported(format!(
            "interface {} is no Ethernet device; a Joey pod needs a CNI plugin that makes one",
            link.name
        )));
    };
    let routes = list(place, netns, "list routes", libc::RTM_GETROUTE)?;
    let routes = routes
        .iter()
        .filter_map(|reply| route(reply, link).transpose())
        .collect::<Result<_, _>>()
        .map_err(unsupported)?;
    let neighbours = list(place, netns, "list neighbours", libc::RTM_GETNEIGH)?;
    let network = Network {
        interfaces: vec![Interface {
            name: link.name.clone(),
            mac: mac.to_vec(),
            mtu: link.mtu,
            addresses: addresses
                .into_iter()
                .filter(|(index, _)| *index == link.index)
                .map(|(_, address)| address)
                .collect(),
            ..Default::default()
        }],
        routes,
        neighbours: neighbours.iter().filter_map(|reply| neighbour(reply, link)).collect(),
        ..Default::default()
    };
    let other_end = other_end(place, link)
        .map_err(|source| NetError::Netlink { netns: netns.to_owned(), source })?;
    let interface = PodInterface { index: link.index, mtu: link.mtu, mac, other_end };
    Ok(Pod { interface: Some(interface), tap, network })
}

fn list(
    place: &mut Socket,
    netns: &Path,
    step: &'static str,
    kind: u16,
) -> Result<Vec<Reply>, NetError> {
    place
        .dump(route::list(step, kind))
        .map_err(|source: NetlinkError| NetError::Netlink { netns: netns.to_owned(), source })
}

fn link(reply: &Reply) -> Option<Link> {
    let attributes = reply.attributes(route::LINK);
    let info = Attributes::of(attributes.get(route::LINK_INFO).unwrap_or_default());
    let plain = info.text(route::LINK_KIND) == Some("veth")
        && attributes.text(route::LINK_QDISC) == Some("noqueue");
    let other_end =
        attributes.number(route::LINK_LINK_NETNS).zip(attributes.number(route::LINK_LINK));
    Some(Link {
        index: word(reply, 4)?,
        name: attributes.text(route::LINK_NAME)?.to_owned(),
        mtu: attributes.number(route::LINK_MTU)?,
        mac: attributes.get(route::LINK_MAC).and_then(|mac| mac.try_into().ok()),
        loopback: word(reply, 8)? & libc::IFF_LOOPBACK as u32 != 0,
        other_end: other_end.filter(|_| plain),
    })
}

/// A global address and its link.
fn address(reply: &Reply) -> Option<(u32, Address)> {
    let &[_, prefix, _, scope, ..] = reply.header(route::ADDRESS)? else { return None };
    if scope != libc::RT_SCOPE_UNIVERSE {
        return None;
    }
    let attributes = reply.attributes(route::ADDRESS);
    let ip =
        attributes.get(route::ADDRESS_LOCAL).or_else(|| attributes.get(route::ADDRESS_ADDRESS))?;
    let address = Address {
        ip: ip.to_vec(),
        prefix: prefix.into(),
        broadcast: attributes.get(route::ADDRESS_BROADCAST).unwrap_or_default().to_vec(),
        ..Default::default()
    };
    Some((word(reply, 4)?, address))
}

/// A unicast route of the main table over the interface; an error for one the guest cannot have.
fn route(reply: &Reply, link: &Link) -> Result<Option<Route>, String> {
    let Some(&[family, prefix, _, _, table, _, scope, kind, ..]) = reply.header(route::ROUTE)
    else {
        return Ok(None);
    };
    let flags = word(reply, 8).unwrap_or_default();
    let attributes = reply.attributes(route::ROUTE);
    let table = attributes.number(libc::RTA_TABLE).unwrap_or(table.into());
    let ipv6 = i32::from(family) == libc::AF_INET6;
    let known = ipv6 || i32::from(family) == libc::AF_INET;
    if !known || table != u32::from(libc::RT_TABLE_MAIN) || kind != libc::RTN_UNICAST {
        return Ok(None);
    }
    let destination = attributes.get(libc::RTA_DST).unwrap_or_default();
    // The guest's own kernel makes the routes to link-local addresses.
    if flags & CLONED != 0 || (ipv6 && matches!(destination, [0xfe, 0x80..=0xbf, ..])) {
        return Ok(None);
    }
    let shown = || {
        let ip = IpAddr::try_from(Bytes(destination)).map_or("default".into(), |ip| ip.to_string());
        format!("route {ip}/{prefix}")
    };
    if attributes.get(libc::RTA_MULTIPATH).is_some() {
        return Err(format!("{} has several next hops, which Joey does not support", shown()));
    }
    if attributes.get(RTA_VIA).is_some() {
        return Err(format!(
            "{} has a gateway of the other address family, which Joey does not support",
            shown()
        ));
    }
    if attributes.number(libc::RTA_OIF) != Some(link.index) {
        return Ok(None);
    }
    let bytes = |kind| attributes.get(kind).unwrap_or_default().to_vec();
    Ok(Some(Route {
        destination: destination.to_vec(),
        prefix: prefix.into(),
        gateway: bytes(libc::RTA_GATEWAY),
        source: bytes(libc::RTA_PREFSRC),
        interface: link.name.clone(),
        metric: attributes.number(libc::RTA_PRIORITY).unwrap_or_default(),
        on_link: flags & route::ON_LINK != 0,
        ipv6,
        scope: scope.into(),
        ..Default::default()
    }))
}

/// The bytes of an address.
struct Bytes<'a>(&'a [u8]);

impl TryFrom<Bytes<'_>> for IpAddr {
    type Error = std::array::TryFromSliceError;

    fn try_from(bytes: Bytes<'_>) -> Result<Self, Self::Error> {
        <[u8; 4]>::try_from(bytes.0)
            .map(Self::from)
            .or_else(|_| <[u8; 16]>::try_from(bytes.0).map(Self::from))
    }
}

/// A permanent neighbour: one that CNI entered, because nobody would answer for it.
fn neighbour(reply: &Reply, link: &Link) -> Option<Neighbour> {
    let state = u16::try_from(word(reply, 8)? & 0xFFFF).ok()?;
    if word(reply, 4)? != link.index || state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let attributes: Attributes<'_> = reply.attributes(route::NEIGHBOUR);
    let mac = attributes.get(route::NEIGHBOUR_MAC).filter(|mac| mac.len() == 6)?;
    Some(Neighbour {
        ip: attributes.get(route::NEIGHBOUR_IP)?.to_vec(),
        mac: mac.to_vec(),
        interface: link.name.clone(),
        ..Default::default()
    })
}
