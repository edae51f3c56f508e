//! `joey-agent`: PID 1 of a Joey guest. Runs containers for the host, and nothing else.
//!
//! Order of work: mounts and kernel modules, the channel to the host, then one event loop. The
//! process has a single thread for its whole life, so that it may fork a container's process and run
//! ordinary Rust in it; that is asserted before the loop takes its first call. The end of the channel
//! is the end of the sandbox: whatever ends the agent ends the machine, and the host sees it.

mod apart;
mod block_devices;
mod boot;
mod calls;
mod channel;
mod clock;
mod connections;
mod container;
mod containers;
mod damage;
mod device_mapper;
mod disk_volumes;
mod events;
mod fd_io;
mod forward;
mod identity;
mod log;
mod network;
mod oom;
mod paths;
mod phases;
mod pod_disk;
mod pod_pid;
mod programs;
mod reap;
mod rehearsal;
mod rootfs;
mod rpc;
mod sandbox;
mod services;
mod share;
mod storage;
mod streams;
mod sys;
mod volumes;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use joey_protocol::mux::{Mux, MuxError, OpenError};
use joey_protocol::{api, limits};
use nix::sys::reboot::{RebootMode, reboot};

use crate::log::{info, warning};

/// Containers of most pods: the one, and its sidecar or its next start.
const SPARES: usize = 2;

/// What ends the agent.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    #[error("preparing the guest: {0}")]
    Prepare(#[from] identity::IdentityError),
    #[error(transparent)]
    Channel(#[from] channel::ChannelError),
    #[error("the event loop: {0}")]
    Loop(#[from] io::Error),
    #[error("the channel to the host: {0}")]
    Mux(#[from] MuxError),
    #[error(transparent)]
    Stream(#[from] OpenError),
    #[error("the calls: {0}")]
    Calls(#[from] ttrpc::Error),
    #[error("preparing the pod's disk: {0}")]
    Disk(#[from] storage::StorageError),
    #[error(transparent)]
    Programs(#[from] programs::ProgramsError),
    #[error("preparing containers: {0}")]
    Spares(#[from] container::Error),
    #[error("the agent has {0} threads; it may only fork with one")]
    Threads(usize),
}

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == rehearsal::ARGUMENT) {
        return rehearsal::main();
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == pod_disk::REMOVE) {
        return pod_disk::remove(std::env::args_os().nth(2));
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == disk_volumes::PROGRAM) {
        return disk_volumes::main(std::env::args_os().nth(2));
    }
    if std::process::id() != 1 {
        warning!("this program is the init process of a Joey guest; it does nothing elsewhere");
        return ExitCode::from(2);
    }
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        // A forked child panics for itself alone.
        if std::process::id() == 1 {
            end_machine();
        }
    }));
    match work() {
        Ok(()) => info!("the host closed the channel"),
        Err(error) => warning!("the agent ends: {error}"),
    }
    end_machine();
    ExitCode::FAILURE
}

/// Resets the machine, which the VMM was told to take as its end: unlike power-off this needs no
/// driver.
fn end_machine() {
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    warning!("resetting the machine: {error}");
}

fn work() -> Result<(), AgentError> {
    let blank = boot::boot()?;
    let port = channel::open()?;
    if let Err(error) = sys::be_patient() {
        warning!("choosing the agent's scheduling: {error}");
    }
    let prepared = identity::Prepared::new()?;
    info!("booted");
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(port, prepared, blank))
}

async fn serve(
    port: OwnedFd,
    prepared: identity::Prepared,
    blank: Vec<u8>,
) -> Result<(), AgentError> {
    let (mux, driver) = Mux::new(fd_io::FdIo::new(port)?);
    let reaper = reap::Reaper::default();
    tokio::spawn(reaper.clone().run());
    let (events, queues) = events::Events::new();
    tokio::spawn(events::run(queues, mux.open(limits::STREAM_EVENTS)?));
    let (listener, found) = (damage::listen()?, events.clone());
    tokio::spawn(async move {
        if let Err(error) = damage::watch(listener, found).await {
            warning!("damage to images is not told to the host any more: {error}");
        }
    });
    let disk = pod_disk::PodDisk::new(blank, reaper.clone());
    disk.prepare()?;
    let cgroups = Path::new(boot::CGROUP_ROOT);
    // The loader reads megabytes. A heap that stayed as large would be written to all over, and each page that a
    // clone writes to is its own.
    sys::map_large_memory();
    let programs = Some(programs::Programs::attach(cgroups)?);
    sys::trim_heap();
    let sandbox =
        Arc::new(sandbox::Sandbox::new(prepared, disk, programs, mux.clone(), reaper, events));
    container::prepare_device_policy(cgroups)?;
    sandbox.spares.fork(cgroups, SPARES)?;
    let calls = mux.open(limits::STREAM_RPC)?;
    let connection = futures::stream::once(async move { Ok(calls) });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(ttrpc::r#async::transport::Listener::new(connection))
        .register_service(api::create_agent(Arc::new(rpc::Service(sandbox))));
    server.start().await?;
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(AgentError::Threads(threads));
    }
    driver.await.map_err(AgentError::from)
}
