//! What connections containers have, told to the host: from the programs' ring buffer (`Events`), with the
//! container's name.
//!
//! At a pace that no container can drive: what comes faster stays in the ring, and what finds no room there is
//! counted as lost by the programs.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use joey_ebpf::guest::events::{Event, Events, What};
use joey_protocol::{api, limits};
use tokio::io::Interest;
use tokio::sync::mpsc;

use crate::log::warning;
use crate::sandbox::Sandbox;
use crate::sys;

/// Time that an event takes of the host's: so many a second, in the long run.
const PACE: Duration = Duration::from_millis(1);
/// Containers whose names are remembered, some of which are gone.
const MOST_NAMES: usize = 256;

/// Tells of connections for as long as the machine lives.
pub(crate) async fn tell(
    events: Events,
    sandbox: Arc<Sandbox>,
    host: mpsc::Sender<api::ConnectionsEvent>,
) {
    if let Err(error) = work(events, &sandbox, &host).await {
        warning!("connections are not told to the host any more: {error}");
    }
}

async fn work(
    mut events: Events,
    sandbox: &Sandbox,
    host: &mpsc::Sender<api::ConnectionsEvent>,
) -> std::io::Result<()> {
    let ring = sys::register(events.pollable()?, Interest::READABLE)?;
    let mut names = HashMap::new();
    loop {
        let mut ready = ring.readable().await?;
        let mut batch = api::ConnectionsEvent::new();
        while batch.connections.len() < limits::MAX_CONNECTIONS
            && let Some(event) = events.take()
        {
            if !names.contains_key(&event.cgroup) {
                learn(&mut names, sandbox);
            }
            let container = names.get(&event.cgroup).cloned().unwrap_or_default();
            batch.connections.push(connection(event, container));
        }
        if batch.connections.is_empty() {
            ready.clear_ready();
            continue;
        }
        batch.lost = events.lost().map_err(std::io::Error::other)?;
        let count = batch.connections.len() as u32;
        if host.send(batch).await.is_err() {
            return Ok(());
        }
        tokio::time::sleep(PACE * count).await;
    }
}

/// Takes the names of the containers that there are: a cgroup's number is its directory's.
fn learn(names: &mut HashMap<u64, String>, sandbox: &Sandbox) {
    if names.len() >= MOST_NAMES {
        names.clear();
    }
    for (id, cgroup) in sandbox.containers.cgroups() {
        if let Ok(directory) = std::fs::metadata(cgroup) {
            names.insert(directory.ino(), id);
        }
    }
}

fn connection(event: Event, container: String) -> api::Connection {
    let age = sys::monotonic().saturating_sub(Duration::from_nanos(event.time));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let octets = |ip| match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    api::Connection {
        at_ns: i64::try_from(now.saturating_sub(age).as_nanos()).unwrap_or(i64::MAX),
        container_id: container,
        process: event.process,
        user: event.user,
        command: event.command,
        protocol: event.protocol.into(),
        inbound: event.inbound,
        what: match event.what {
            What::Opened => api::What::OPENED,
            What::Failed => api::What::FAILED,
            What::Closed => api::What::CLOSED,
            What::Reset => api::What::RESET,
        }
        .into(),
        local_ip: octets(event.local.ip()),
        local_port: event.local.port().into(),
        remote_ip: octets(event.remote.ip()),
        remote_port: event.remote.port().into(),
        socket: event.socket,
        sent: event.sent,
        received: event.received,
        ..Default::default()
    }
}
