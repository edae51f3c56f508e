//! The server: one runtime with one thread, the sandbox, its services, until Shutdown.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use containerd_shim::protos::api::DeleteResponse;
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use tokio::sync::oneshot;

use crate::api::convert::timestamp;
use crate::api::publisher::Publisher;
use crate::api::{events, sandbox, task};
use crate::bootstrap::{self, Invocation};
use crate::config::{CONFIG, Config};
use crate::host::cgroup;
use crate::mesh::connections;
use crate::sandbox::record::{Record, directory};
use crate::sandbox::{Boot, Handle, orphans, teardown};
use crate::standby::Standby;
use crate::vmm::template;
use crate::{log, sys};

/// How long the last events may take on their way to containerd once the sandbox is gone.
const LAST_EVENTS: Duration = Duration::from_secs(2);
/// Time for the answer to Shutdown to leave before its connection does.
const LAST_ANSWER: Duration = Duration::from_millis(100);
/// How often orphaned sandboxes are looked for, and how long after the start of this one first.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// Exit status that containerd is told for a shim that was killed: 128 + SIGKILL.
const KILLED: u32 = 137;

/// A sandbox's shim that is about to serve.
pub struct Start {
    /// Control groups in which containerd started it.
    pub(crate) home: Vec<PathBuf>,
    /// What containerd said.
    pub(crate) invocation: Invocation,
    /// Where containerd will call.
    pub(crate) listener: UnixListener,
    /// When containerd started it, as time since the host's boot.
    pub(crate) since_boot: Duration,
    /// The machine, if it has one already.
    pub(crate) standby: Option<Standby>,
}

/// Serves one sandbox on `listener` until it is shut down. Call in the forked child.
///
/// # Errors
/// The runtime or the server could not be started.
pub fn run(config: Config, invocation: Invocation, listener: UnixListener) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let home = cgroup::own();
    let since_boot = bootstrap::started_since_boot();
    let start = Start { home, invocation, listener, since_boot, standby: None };
    runtime.block_on(serve(config, start))
}

/// The same, inside a runtime.
pub(crate) async fn serve(config: Config, start: Start) -> Result<()> {
    log::init(&start.invocation.bundle, start.invocation.flags.debug);
    if let Some(file) = &config.file {
        // So that `joey`, run by this shim, reads the same configuration.
        sys::set_environment(CONFIG, file);
    }
    let socket = start.invocation.socket_path();
    let served = until_shutdown(config, start).await;
    // containerd may have been shut down with the socket still there.
    let _ = std::fs::remove_file(&socket);
    if let Err(error) = &served {
        tracing::error!(error = %format!("{error:#}"), "shim");
    }
    served
}

async fn until_shutdown(config: Config, start: Start) -> Result<()> {
    let Start { home, invocation, listener, since_boot, standby } = start;
    let (publisher, delivered) =
        Publisher::spawn(invocation.ttrpc_address.clone(), invocation.flags.namespace.clone());
    let boot = Boot {
        id: invocation.flags.id.clone(),
        namespace: invocation.flags.namespace.clone(),
        socket: invocation.socket_path(),
        bundle: invocation.bundle,
        home,
        spec: invocation.spec,
        since: nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .map_or(Duration::ZERO, |now| Duration::from(now).saturating_sub(since_boot)),
    };
    let house = (config.run_dir.clone(), config.templates_dir(), boot.bundle.clone());
    let (handle, outgoing) = Handle::new(Arc::new(config), boot, standby);
    tokio::spawn(keep_house(handle.clone(), house));
    let (close, closed) = oneshot::channel();
    let forwarding = tokio::spawn(events::forward(outgoing, publisher, closed));
    listener.set_nonblocking(true).context("socket")?;
    let listener = tokio::net::UnixListener::from_std(listener).context("socket")?;
    let listener = Listener::from(listener);
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(task::services(&handle))
        .register_service(sandbox::services(&handle))
        .register_service(connections::services(&handle));
    server.start().await.context("serve containerd")?;
    handle.left().await;
    tokio::time::sleep(LAST_ANSWER).await;
    server.shutdown().await.context("end the server")?;
    drop((handle, close));
    // What containerd does not take now it learns from `delete`.
    let _ = tokio::time::timeout(LAST_EVENTS, async { tokio::join!(forwarding, delivered) }).await;
    Ok(())
}

/// Removes what the shims of other sandboxes and the builders of templates have left, now and then, and ends this
/// one if containerd has forgotten it: it removes a bundle last, and only when the sandbox is gone for it.
async fn keep_house(handle: Handle, (run_dir, templates, bundle): (PathBuf, PathBuf, PathBuf)) {
    loop {
        // Not in the way of the sandbox's start.
        tokio::time::sleep(HOUSEKEEPING).await;
        if !bundle.exists() {
            tracing::warn!(sandbox = handle.id(), bundle = %bundle.display(), "forgotten; it ends");
            let _ = handle.shutdown(true).await;
            return;
        }
        let (run_dir, templates) = (run_dir.clone(), templates.clone());
        // What is removed is logged there; a panic in there must not end this sandbox.
        let tidy = move || {
            orphans::collect_in_turn(&run_dir);
            template::sweep(&templates);
        };
        let _ = tokio::task::spawn_blocking(tidy).await;
    }
}

/// `delete`: cleans up what a sandbox or container has left, and says how it ended.
///
/// # Errors
/// Something is left; containerd calls again.
pub fn delete(config: &Config, invocation: &Invocation) -> Result<Vec<u8>> {
    let id = &invocation.flags.id;
    // A container's delete (task API 2) has nothing to do unless its sandbox's shim was killed.
    let sandbox = invocation.sandbox_id();
    let record = Record::read(&directory(&config.run_dir, sandbox))
        .with_context(|| format!("read the record of sandbox {sandbox}"))?;
    if let Some(record) = record {
        let orphaned = record.shim.is_none_or(|shim| !shim.alive());
        if orphaned || id == sandbox {
            teardown::undo(&config.run_dir, &record)?;
        }
    }
    if id == sandbox {
        // A shim that was killed before its first record has a socket all the same.
        let _ = std::fs::remove_file(invocation.socket_path());
        // A `start` that was killed before its record leaves the name alone, with nothing in it.
        let _ = std::fs::remove_dir(directory(&config.run_dir, id));
    }
    let response = DeleteResponse {
        pid: 0,
        exit_status: KILLED,
        exited_at: timestamp(SystemTime::now()),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}
