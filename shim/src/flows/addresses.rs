//! Keeps the node's own addresses in the policy's map: all of them at the start, then whenever the kernel says
//! that one came or went.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use joey_ebpf::netlink::{NetlinkError, Socket};
use joey_ebpf::policy::maps::{MapError, Maps};
use tokio::io::unix::AsyncFd;

use crate::host::net::{AdmissionError, Keeper, own_addresses};

/// The addresses are not in the map.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The kernel did not list them.
    #[error(transparent)]
    Own(#[from] AdmissionError),
    /// The kernel does not tell of changes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The map could not be written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The policy is not loaded, or its lock not to be had.
    #[error("the policy's maps: {0}")]
    Maps(#[from] io::Error),
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
    let mut keeper = None;
    loop {
        let own = own_addresses()?.into_iter().collect();
        let directory = bpf_dir.to_owned();
        let changed = tokio::task::spawn_blocking(move || put(&directory, &own));
        let changed = changed.await.map_err(io::Error::other)??;
        if changed > 0 {
            tracing::info!(changed, "the node's own addresses");
        }
        if keeper.is_none() {
            keeper = become_keeper(bpf_dir).await?;
        }
        let mut ready = changes.readable_mut().await?;
        ready.get_inner_mut().drain()?;
        ready.clear_ready();
    }
}

/// `None` if another process keeps them. Pods that start look in passing, a few microseconds each.
async fn become_keeper(bpf_dir: &Path) -> io::Result<Option<Keeper>> {
    const ATTEMPTS: usize = 100;
    for _ in 0..ATTEMPTS {
        if let Some(keeper) = Keeper::take(bpf_dir)? {
            return Ok(Some(keeper));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(None)
}
