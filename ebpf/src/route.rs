//! Requests about links, addresses, routes and neighbours, and the fixed headers of the answers.

use crate::netlink::{Message, Reply};

/// Length of `struct ifinfomsg`.
pub const LINK: usize = 16;
/// Length of `struct ifaddrmsg`.
pub const ADDRESS: usize = 8;
/// Length of `struct rtmsg`.
pub const ROUTE: usize = 12;
/// Length of `struct ndmsg`.
pub const NEIGHBOUR: usize = 12;

/// `IFLA_ADDRESS`: hardware address.
pub const LINK_MAC: u16 = 1;
/// `IFLA_IFNAME`.
pub const LINK_NAME: u16 = 3;
/// `IFLA_MTU`.
pub const LINK_MTU: u16 = 4;
/// `IFLA_NET_NS_FD`: moves the link into the namespace that the descriptor stands for.
pub const LINK_NETNS_FD: u16 = 28;
/// `IFLA_NEW_IFINDEX`: the index that a moved link gets (Linux 5.13).
pub const LINK_NEW_INDEX: u16 = 49;
/// `IFA_ADDRESS`: the address, or its peer when there is a local one.
pub const ADDRESS_ADDRESS: u16 = 1;
/// `IFA_LOCAL`.
pub const ADDRESS_LOCAL: u16 = 2;
/// `IFA_BROADCAST`.
pub const ADDRESS_BROADCAST: u16 = 4;
/// `IFA_FLAGS`.
pub const ADDRESS_FLAGS: u16 = 8;
/// `NDA_DST`.
pub const NEIGHBOUR_IP: u16 = 1;
/// `NDA_LLADDR`.
pub const NEIGHBOUR_MAC: u16 = 2;

/// `RTNH_F_ONLINK` of a route's flags.
pub const ON_LINK: u32 = 4;

/// Makes if missing, replaces if there.
pub const PUT: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// The address family of an address.
#[must_use]
pub fn family(ip: &[u8]) -> u8 {
    (if ip.len() == 16 { libc::AF_INET6 } else { libc::AF_INET }) as u8
}

/// `RTM_GETLINK`, `RTM_GETADDR`, `RTM_GETROUTE` or `RTM_GETNEIGH` for all of a namespace.
#[must_use]
pub fn list(step: &str, kind: u16) -> Message {
    let header: &[u8] = match kind {
        libc::RTM_GETLINK => &[0; LINK],
        libc::RTM_GETADDR => &[0; ADDRESS],
        _ => &[0; ROUTE],
    };
    Message::new(step, kind, 0, header)
}

/// A request about the link with `index`: `RTM_NEWLINK` to change it, `RTM_DELLINK` to remove it.
/// `up` sets it up.
#[must_use]
pub fn link(step: impl Into<String>, kind: u16, index: u32, up: bool) -> Message {
    let flags = if up { libc::IFF_UP as u32 } else { 0 };
    let mut header = [0; LINK];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    Message::new(step, kind, 0, &header)
}

/// A request that sets the link with `index` down.
#[must_use]
pub fn down(step: impl Into<String>, index: u32) -> Message {
    let mut header = [0; LINK];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    Message::new(step, libc::RTM_NEWLINK, 0, &header)
}

/// `RTM_NEWADDR` of `ip` on a link, to which the caller adds attributes.
#[must_use]
pub fn address(step: impl Into<String>, index: u32, ip: &[u8], prefix: u8) -> Message {
    about_address(step, libc::RTM_NEWADDR, PUT, (index, ip, prefix))
}

/// `RTM_DELADDR` of `ip` on a link.
#[must_use]
pub fn no_address(step: impl Into<String>, index: u32, ip: &[u8], prefix: u8) -> Message {
    about_address(step, libc::RTM_DELADDR, 0, (index, ip, prefix))
}

fn about_address(
    step: impl Into<String>,
    kind: u16,
    flags: i32,
    (index, ip, prefix): (u32, &[u8], u8),
) -> Message {
    let mut header = [family(ip), prefix, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    Message::new(step, kind, flags, &header)
        .attribute(ADDRESS_LOCAL, ip)
        .attribute(ADDRESS_ADDRESS, ip)
}

/// What [`route`] is told beside attributes.
#[derive(Debug, Clone, Copy)]
pub struct RouteHeader {
    /// Destination is IPv6.
    pub ipv6: bool,
    /// Length of the destination's prefix.
    pub prefix: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The gateway is on the link although no route says so.
    pub on_link: bool,
}

/// `RTM_NEWROUTE` into the main table, to which the caller adds attributes.
#[must_use]
pub fn route(step: impl Into<String>, route: RouteHeader) -> Message {
    let family = if route.ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    let flags = if route.on_link { ON_LINK } else { 0 };
    let table = libc::RT_TABLE_MAIN;
    let (protocol, kind) = (libc::RTPROT_STATIC, libc::RTN_UNICAST);
    let mut header = [family, route.prefix, 0, 0, table, protocol, route.scope, kind, 0, 0, 0, 0];
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    Message::new(step, libc::RTM_NEWROUTE, PUT, &header)
}

/// A permanent `RTM_NEWNEIGH`.
#[must_use]
pub fn neighbour(step: impl Into<String>, index: u32, ip: &[u8], mac: &[u8]) -> Message {
    let mut header = [0; NEIGHBOUR];
    header[0] = family(ip);
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    Message::new(step, libc::RTM_NEWNEIGH, PUT, &header)
        .attribute(NEIGHBOUR_IP, ip)
        .attribute(NEIGHBOUR_MAC, mac)
}

/// The 32-bit word at `offset` of an answer's fixed header.
#[must_use]
pub fn word(reply: &Reply, offset: usize) -> Option<u32> {
    let bytes = reply.header(offset + 4)?.get(offset..)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// Length of `struct fib_rule_hdr`.
pub const RULE: usize = 12;
/// `FRA_IIFNAME`: the device that a packet enters by; `lo` for those of the namespace's own sockets.
pub const RULE_DEVICE: u16 = 3;
/// `FRA_PRIORITY`; none is 0.
pub const RULE_PRIORITY: u16 = 6;
/// `FRA_TABLE`.
pub const RULE_TABLE: u16 = 15;
/// `FRA_PROTOCOL`: who made it.
const RULE_PROTOCOL: u16 = 21;
/// `FR_ACT_TO_TBL`.
const TO_TABLE: u8 = 1;

/// A rule of the namespace: which table is asked for a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule<'a> {
    /// About IPv6.
    pub ipv6: bool,
    /// Of packets that enter by this device, or else of all.
    pub device: Option<&'a str>,
    /// Lower ones first; among equal ones the older.
    pub priority: u32,
    /// The table's number.
    pub table: u32,
    /// The kernel made it, or it looks so.
    pub kernels: bool,
}

impl Rule<'_> {
    /// `RTM_NEWRULE`, refused with `EEXIST` if it is there.
    #[must_use]
    pub fn add(&self) -> Message {
        self.message("add", libc::RTM_NEWRULE, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
    }

    /// `RTM_DELRULE`, refused with `ENOENT` if it is not there.
    #[must_use]
    pub fn remove(&self) -> Message {
        self.message("remove", libc::RTM_DELRULE, 0)
    }

    fn message(&self, what: &str, kind: u16, flags: i32) -> Message {
        let family = if self.ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
        let mut header = [0; RULE];
        (header[0], header[7]) = (family, TO_TABLE);
        let step = format!("{what} the routing rule {} of table {}", self.priority, self.table);
        let message = Message::new(step, kind, flags, &header)
            .number(RULE_TABLE, self.table)
            .number(RULE_PRIORITY, self.priority);
        let protocol = if self.kernels { libc::RTPROT_KERNEL } else { libc::RTPROT_STATIC };
        let message = message.attribute(RULE_PROTOCOL, &[protocol]);
        self.device.into_iter().fold(message, |it, name| it.text(RULE_DEVICE, name))
    }
}

/// A route of a table other than main: to `destination`, all addresses if it is empty, by the device `index`; `local`:
/// what goes there is the namespace's own.
#[must_use]
pub fn table_route(
    kind: u16,
    table: u32,
    ipv6: bool,
    destination: &[u8],
    index: u32,
    local: bool,
) -> Message {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    let prefix = u8::try_from(destination.len() * 8).unwrap_or(0);
    let (scope, way) = match local {
        true => (libc::RT_SCOPE_HOST, libc::RTN_LOCAL),
        false => (libc::RT_SCOPE_LINK, libc::RTN_UNICAST),
    };
    let header = [family, prefix, 0, 0, 0, libc::RTPROT_STATIC, scope, way, 0, 0, 0, 0];
    let flags = if kind == libc::RTM_NEWROUTE { PUT } else { 0 };
    let message = Message::new(format!("change the routes of table {table}"), kind, flags, &header)
        .number(libc::RTA_TABLE, table)
        .number(libc::RTA_OIF, index);
    if destination.is_empty() { message } else { message.attribute(libc::RTA_DST, destination) }
}
