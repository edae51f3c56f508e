//! Keeps the node's own addresses in the policy's map: all of them at the start, then whenever the kernel says
//! that one came or went.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use joey_ebpf::netlink::{NetlinkError, Socket};
use joey_ebpf::policy::maps::{MapError, Maps};
use joey_ebpf::route;
use tokio::io::unix::AsyncFd;

/// The addresses are not in the map.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The kernel did not list them.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The map could not be written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The policy is not loaded, or its lock not to be had.
    #[error("the policy's maps: {0}")]
    Maps(#[from] io::Error),
}

/// All addresses of the calling thread's network namespace.
pub fn list() -> Result<HashSet<IpAddr>, NetlinkError> {
    let replies = Socket::open()?.dump(route::list("list addresses", libc::RTM_GETADDR))?;
    let address = |reply: &joey_ebpf::netlink::Reply| {
        let attributes = reply.attributes(route::ADDRESS);
        let bytes = attributes
            .get(route::ADDRESS_LOCAL)
            .or_else(|| attributes.get(route::ADDRESS_ADDRESS))?;
        if let Ok(four) = <[u8; 4]>::try_from(bytes) {
            return Some(IpAddr::from(four));
        }
        <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
    };
    Ok(replies.iter().filter_map(address).filter(|ip| names_somebody(*ip)).collect())
}

/// An address of one link is everybody's, and loopback never leaves.
fn names_somebody(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

/// Makes the map hold these addresses of the node's and no others. Returns how many were changed.
pub fn put(bpf_dir: &Path, own: &HashSet<IpAddr>) -> Result<usize, AddressError> {
    let maps = Maps::open(bpf_dir)?;
    let known = maps.locals()?;
    let new: Vec<IpAddr> = own.iter().filter(|ip| !known.contains_key(ip)).copied().collect();
    let gone: Vec<IpAddr> = known
        .iter()
        .filter(|(ip, local)| local.pod == 0 && !own.contains(ip))
        .map(|(ip, _)| *ip)
        .collect();
    maps.put_node_addresses(&new)?;
    maps.remove_node_addresses(&gone)?;
    Ok(new.len() + gone.len())
}

/// Does so now, and whenever an address comes or goes. Ends only by an error.
pub async fn keep(bpf_dir: &Path) -> Result<std::convert::Infallible, AddressError> {
    // Listens first: what changes while the list is made is told.
    #[allow(
        deprecated,
        reason = "the socket owns its descriptor, which the new one asks for, unsafely"
    )]
    let mut changes = AsyncFd::new(Socket::addresses()?)?;
    loop {
        let own = list()?;
        let directory = bpf_dir.to_owned();
        let changed = tokio::task::spawn_blocking(move || put(&directory, &own));
        let changed = changed.await.map_err(io::Error::other)??;
        if changed > 0 {
            tracing::info!(changed, "the node's own addresses");
        }
        let mut ready = changes.readable_mut().await?;
        ready.get_inner_mut().drain()?;
        ready.clear_ready();
    }
}
