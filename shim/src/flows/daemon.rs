//! `joey network serve`: reads the ring of events, keeps the book, serves the socket and the metrics, and keeps the
//! policy's addresses those of the node and of pods that are there. Enforcement depends on none of it.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use joey_ebpf::policy::events::Events;
use joey_ebpf::policy::maps::Maps;
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::addresses;
use super::book::{Book, Clock, LIVING, PAST, Sweep};
use super::metrics::{self, Sample, Told};
use super::names::{Names, Places};
use super::places;
use super::server::{Hub, MAX_LINE};
use crate::config::Config;
use crate::policy::apply::apply;
use crate::services::{self, keeper::Keeper};

/// How often the tables are read whole.
const SWEEP: Duration = Duration::from_secs(10);
/// Events that are noted before anybody else has a turn.
const TURN: usize = 512;

/// Name of the daemon's socket in the run directory.
pub const SOCKET: &str = "network.sock";

fn nanoseconds(clock: ClockId) -> io::Result<u64> {
    let now = Duration::from(clock_gettime(clock)?);
    Ok(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

fn monotonic() -> io::Result<u64> {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

/// Listens on a socket for root, in place of what a predecessor left.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes the place of the node's daemon.
fn take_place(run_dir: &Path) -> Result<Flock<File>> {
    std::fs::create_dir_all(run_dir)?;
    let path = run_dir.join("network.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::Error::EWOULDBLOCK)) => {
            bail!("another daemon has {}; there can be one on a node", path.display())
        }
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// Serves until it is told to end. `metrics` is `unix:PATH` or `HOST:PORT`.
///
/// # Errors
/// The policy is not loaded, another daemon runs, or a socket cannot be had.
pub async fn serve(config: Config, metrics: Option<&str>) -> Result<()> {
    let _place = take_place(&config.run_dir)?;
    let bpf_dir = config.bpf_dir.clone();
    let load = || format!("the policy below {}; `joey ebpf load` loads it", bpf_dir.display());
    let maps = Arc::new(Maps::open(&bpf_dir).with_context(load)?);
    let events = Events::open(&bpf_dir).with_context(load)?;
    let clock = Clock { boot: nanoseconds(ClockId::CLOCK_REALTIME)?.saturating_sub(monotonic()?) };
    let (run_dir, state_dir) = (config.run_dir.clone(), config.state_dir.clone());
    let places = Places { run_dir, state_dir, bpf_dir: bpf_dir.clone(), maps: Arc::clone(&maps) };
    let mut names = Names::new(places);
    names.refresh();
    let socket = config.run_dir.join(SOCKET);
    let listener = listen(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let book = Arc::new(Mutex::new(Book::new(clock, PAST, LIVING, names)));
    let applied = config.clone();
    let keeper = Arc::new(Mutex::new(Keeper::new(&config.run_dir, &config.state_dir)));
    let make = move |change: &services::keeper::Change| {
        let mut keeper = keeper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        keeper.apply(change).map(|applied| applied.generation).map_err(|error| error.to_string())
    };
    // What was told before a boot holds until it is told anew.
    if let Err(error) = make(&services::keeper::Change::Restore) {
        tracing::error!(error, "services are as they were: apply them anew");
    }
    let change = move |change| {
        apply(&applied, change).map(|applied| applied.epoch).map_err(|error| error.to_string())
    };
    let services = move |request| make(&services::keeper::Change::Services(request));
    let hub = Hub::new(book, MAX_LINE, Arc::new(change), Arc::new(services));
    let seen = Arc::new(Told::default());
    if let Some(address) = metrics {
        expose(address, &maps, &hub, seen).await?;
    }
    tracing::info!(socket = %socket.display(), "serving");
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        ended = watch(events, hub.clone()) => ended.context("read events"),
        () = sweep(maps, hub.clone()) => Ok(()),
        () = hub.clone().serve(listener) => Ok(()),
        () = keep_addresses(&bpf_dir) => Ok(()),
        () = places::keep(config) => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

async fn keep_addresses(bpf_dir: &Path) {
    loop {
        let Err(error) = addresses::keep(bpf_dir).await;
        tracing::error!(%error, "the node's own addresses are not kept; again in 5 s");
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

/// Notes events as they come.
async fn watch(events: Events, hub: Hub) -> io::Result<()> {
    #[allow(
        deprecated,
        reason = "the ring owns its descriptor, which the new one asks for, unsafely"
    )]
    let mut events = AsyncFd::with_interest(events, tokio::io::Interest::READABLE)?;
    loop {
        let mut ready = events.readable_mut().await?;
        let now = monotonic()?;
        let events = ready.get_inner_mut();
        let emptied = hub.with(|book| {
            for _ in 0..TURN {
                match events.take() {
                    None => return true,
                    Some(None) => tracing::warn!("an event that no program writes"),
                    Some(Some(event)) => book.note(&event, now),
                }
            }
            false
        });
        if emptied {
            ready.clear_ready();
        }
        tokio::task::yield_now().await;
    }
}

/// Reads the tables now and then.
async fn sweep(maps: Arc<Maps>, hub: Hub) {
    let mut timer = tokio::time::interval(SWEEP);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let (maps, hub) = (Arc::clone(&maps), hub.clone());
        let swept = tokio::task::spawn_blocking(move || -> Result<()> {
            let read = Sweep::read(&*maps, monotonic()?)?;
            let locals = maps.locals()?;
            let whose = |key: &joey_ebpf::policy::abi::FlowKey| {
                locals.get(&key.remote).map(|local| local.pod)
            };
            hub.with(|book| {
                // Addresses that changed hands are not unknown, so nobody would look.
                book.names.refresh();
                book.sweep(&read, &*maps, whose)
            })?;
            Ok(())
        });
        match swept.await.map_err(anyhow::Error::from).and_then(|swept| swept) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(error = %format!("{error:#}"), "the tables could not be read")
            }
        }
    }
}

async fn expose(address: &str, maps: &Arc<Maps>, hub: &Hub, seen: Arc<Told>) -> Result<()> {
    let (maps, hub) = (Arc::clone(maps), hub.clone());
    let body = move || {
        let (maps, hub, seen) = (Arc::clone(&maps), hub.clone(), Arc::clone(&seen));
        async move { tokio::task::spawn_blocking(move || text(&maps, &hub, &seen)).await? }
    };
    let failed = || format!("serve metrics at {address}: unix:PATH or HOST:PORT is wanted");
    if let Some(path) = address.strip_prefix("unix:") {
        let listener = Arc::new(listen(&PathBuf::from(path)).with_context(failed)?);
        tokio::spawn(answer_all(body, move || {
            let listener = Arc::clone(&listener);
            async move { Ok(listener.accept().await?.0) }
        }));
    } else {
        let listener = Arc::new(TcpListener::bind(address).await.with_context(failed)?);
        tokio::spawn(answer_all(body, move || {
            let listener = Arc::clone(&listener);
            async move { Ok(listener.accept().await?.0) }
        }));
    }
    Ok(())
}

/// Answers who connects, one after the other.
async fn answer_all<S, A, T>(body: impl Fn() -> T, accept: impl Fn() -> A)
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Future<Output = io::Result<S>>,
    T: Future<Output = io::Result<String>>,
{
    loop {
        if let Ok(stream) = accept().await {
            let _ = tokio::time::timeout(
                metrics::PATIENCE,
                metrics::answer(stream, async || body().await),
            )
            .await;
        } else {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// The metrics' text. The book is asked for its numbers and names, and is free again before the text is made of them.
fn text(maps: &Maps, hub: &Hub, seen: &Told) -> io::Result<String> {
    let others = hub.with(|book| {
        let [open, refused, homeless] =
            [book.open(), book.refused(), book.homeless].map(|count| count as u64);
        vec![
            ("flows_open", "gauge", "Flows that live.", open),
            ("denials_open", "gauge", "Refused attempts of the last minute.", refused),
            ("flows_unkept", "gauge", "Of both, those for which there is no record.", homeless),
            ("flow_records_unkept_total", "counter", "Of both, those told of.", book.unkept),
            (
                "flow_records_dropped_total",
                "counter",
                "Records of the past that made room.",
                book.dropped,
            ),
        ]
    });
    let names = |pods: &[_]| hub.with(|book| book.names.pods(pods));
    let mut sample = Sample::read(maps, names).map_err(io::Error::other)?;
    seen.keep(&mut sample);
    sample.others = others;
    Ok(metrics::text(&sample))
}
