//! Putting services in force: whole, or not at all.
//!
//! ```text
//! lock ─ change ─ check ─ views of tenants ─ records ─┬─ each to its tenant's log ─ services.json
//!          └───────── refused: nothing was written ───┘   └── from here on its pods have it
//! ```
//!
//! Killed anywhere, logs are left that readers read as far as they are whole. The next step finds what they say,
//! and appends what is missing or puts a new log in the place of one that is not whole. A change that nobody was
//! told of as done may be in force at some tenants until then.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::compile::{self, Shared, View, Views};
use super::document::{Request, Service, Services};
use super::log::{self, Reader, SHARED, Writer};
use super::table::{Replay, Table};
use crate::failpoint;
use crate::policy::error::PolicyError;
use crate::policy::state::{self, Applied as Stored, Store};

/// What is to change.
#[derive(Debug, Clone)]
pub enum Change {
    /// Nothing: what was applied last is put in force again, as after a boot or under another policy.
    Restore,
    /// Services.
    Services(Request),
}

/// What is in force now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Number of the change that brought it; 0: none was ever made.
    pub generation: u32,
    /// How many services there are.
    pub services: usize,
    /// How many tenants have services of their own.
    pub tenants: usize,
    /// How many logs were written.
    pub logs: usize,
    /// How long it took, waiting for others not counted.
    pub took: Duration,
}

/// Makes changes, one after the other, beside others that do.
#[derive(Debug)]
pub struct Keeper {
    run_dir: PathBuf,
    store: Store,
    known: Option<Known>,
}

/// A file as it was read.
type Stamp = Option<(u64, i64, i64, u64)>;

/// What was in force at the last look, to spare reading it again.
#[derive(Debug)]
struct Known {
    services: Services,
    generation: u32,
    at: [Stamp; 2],
    shared: Shared,
    logs: BTreeMap<String, Log>,
}

/// A log of which this is the writer.
#[derive(Debug)]
struct Log {
    table: Table,
    writer: Writer,
    generation: u64,
}

fn stamp(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PolicyError {
    let path = path.to_owned();
    move |cause| PolicyError::State { step, path, cause }
}

impl Keeper {
    /// One for these directories of the configuration.
    #[must_use]
    pub fn new(run_dir: &Path, state_dir: &Path) -> Self {
        Self { run_dir: run_dir.to_owned(), store: Store::new(state_dir), known: None }
    }

    fn stamps(&self) -> [Stamp; 2] {
        [state::SERVICES, state::POLICY].map(|name| stamp(&self.store.path(name)))
    }

    /// Makes a change and puts what comes of it in force on this node.
    ///
    /// # Errors
    /// What would be in force is refused, and what was in force still is; or it cannot be written, which the next
    /// change mends.
    pub fn apply(&mut self, change: &Change) -> Result<Applied, PolicyError> {
        let path = self.run_dir.join("services.lock");
        let lock = || {
            fs::create_dir_all(&self.run_dir)?;
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))
        };
        let _lock = lock().map_err(failed("lock", &path))?;
        let begun = Instant::now();
        let mut known = self.look()?;
        let outcome = self.step(&mut known, change);
        // Of what was written in part the files tell.
        let refused = matches!(&outcome, Err(error) if !matches!(error, PolicyError::State { .. }));
        if outcome.is_ok() || refused {
            self.known = Some(known);
        }
        outcome.map(|applied| Applied { took: begun.elapsed(), ..applied })
    }

    /// What is in force, as the last step left it or as another has written since.
    fn look(&mut self) -> Result<Known, PolicyError> {
        let at = self.stamps();
        if let Some(known) = self.known.take().filter(|known| known.at == at) {
            return Ok(known);
        }
        let stored = self.store.services()?;
        let mut services = Services::new();
        Request { replace: Some(stored.content), ..Request::default() }.apply(&mut services)?;
        let shared = self.store.policy()?.content.check()?.shared_services();
        Ok(Known { services, generation: stored.epoch, at, shared, logs: BTreeMap::new() })
    }

    fn step(&self, known: &mut Known, change: &Change) -> Result<Applied, PolicyError> {
        let mut services = known.services.clone();
        match change {
            // Where nobody has told of any services, pods that need them do not start.
            Change::Restore if known.generation == 0 => return Ok(known.applied(0)),
            Change::Restore => {}
            Change::Services(request) => request.apply(&mut services)?,
        }
        let views = compile::views(&services, &known.shared)?;
        let changes = matches!(change, Change::Services(_));
        let last = self.open(known, &views)?;
        let generation = u64::from(known.generation).max(last);
        let next = u32::try_from(generation).unwrap_or(u32::MAX).saturating_add(1);
        let logs = self.write(known, &views, next)?;
        known.services = services;
        if changes || logs > 0 {
            failpoint::hold(&self.run_dir, "services-written");
            let content = known.services.values().map(|it| &it.service).collect();
            let stored = Stored { content, ..Stored::default() };
            self.store.write_services(&stored.stamped(next, false))?;
            known.generation = next;
            known.at = self.stamps();
        }
        Ok(known.applied(logs))
    }

    /// Opens the logs that are not open, as far as they are whole; the last generation that any of them has.
    fn open(&self, known: &mut Known, views: &Views) -> Result<u64, PolicyError> {
        let directory = log::directory(&self.run_dir);
        let names = views.tenants.keys().map(|tenant| log::name(tenant));
        let names: HashSet<String> = names.chain([SHARED.to_owned()]).collect();
        known.logs.retain(|name, log| names.contains(name) && log.writer.is_current());
        for name in names {
            if known.logs.contains_key(&name) {
                continue;
            }
            let path = directory.join(&name);
            if let Some(log) = resume(&path).map_err(failed("read", &path))? {
                known.logs.insert(name, log);
            }
        }
        Ok(known.logs.values().map(|log| log.generation).max().unwrap_or(0))
    }

    /// Brings every log to its view, and removes those of tenants that have no services any more; how many were
    /// written.
    fn write(&self, known: &mut Known, views: &Views, next: u32) -> Result<usize, PolicyError> {
        let directory = log::directory(&self.run_dir);
        let mut written = 0;
        let tenants = views.tenants.iter().map(|(tenant, view)| (log::name(tenant), view));
        let all: Vec<_> = tenants.chain([(SHARED.to_owned(), &views.shared)]).collect();
        for (name, view) in &all {
            let path = directory.join(name);
            let write = self.advance(&mut known.logs, name, &path, view, u64::from(next));
            written += usize::from(write.map_err(failed("write", &path))?);
        }
        let names: HashSet<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        for entry in fs::read_dir(&directory).map_err(failed("list", &directory))? {
            let path = entry.map_err(failed("list", &directory))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !names.contains(name) {
                fs::remove_file(&path).map_err(failed("remove", &path))?;
                written += 1;
            }
        }
        Ok(written)
    }

    fn advance(
        &self,
        logs: &mut BTreeMap<String, Log>,
        name: &str,
        path: &Path,
        view: &View,
        generation: u64,
    ) -> io::Result<bool> {
        let at = |point: &str| failpoint::hold(&self.run_dir, point);
        let create = |table: Table, base| -> io::Result<Log> {
            Ok(Log { table, writer: Writer::create(path, &base, &at)?, generation })
        };
        let Some(log) = logs.get_mut(name) else {
            let (table, base) = Table::base(generation, view);
            logs.insert(name.to_owned(), create(table, base)?);
            return Ok(true);
        };
        let Some(record) = log.table.advance(generation, view) else { return Ok(false) };
        if record.is_base() {
            *log = create(std::mem::take(&mut log.table), record)?;
        } else if log.writer.is_long() {
            let (table, base) = log.table.rebuilt(generation, view);
            *log = create(table, base)?;
        } else {
            log.writer.append(&record, &at)?;
            log.generation = generation;
        }
        Ok(true)
    }
}

impl Known {
    fn applied(&self, logs: usize) -> Applied {
        let (generation, services) = (self.generation, self.services.len());
        let tenants = self.logs.len().saturating_sub(1);
        Applied { generation, services, tenants, logs, took: Duration::ZERO }
    }
}

/// Goes on with a log; `None` if there is none that is whole.
fn resume(path: &Path) -> io::Result<Option<Log>> {
    let mut reader = match Reader::open(path) {
        Ok(reader) => reader,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(path = %path.display(), %error, "written anew");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let (mut replay, mut generation, mut base) = (Replay::default(), 0, 0);
    while let Some(record) = reader.take()? {
        generation = record.generation;
        if let Err(error) = replay.add(&record) {
            tracing::warn!(path = %path.display(), %error, "written anew");
            return Ok(None);
        }
        if record.is_base() {
            base = reader.position();
        }
    }
    let whole = reader.is_at_end()?;
    match replay.table() {
        Ok(table) if whole => {
            Ok(Some(Log { table, writer: Writer::resume(path, &reader, base)?, generation }))
        }
        _ => {
            tracing::warn!(path = %path.display(), "it is not whole: written anew");
            Ok(None)
        }
    }
}

/// Reads what a tenant's pods see now: of its own log, or of the shared one.
///
/// # Errors
/// There is neither, or it cannot be read.
pub fn read(run_dir: &Path, tenant: &str) -> io::Result<(u64, Table)> {
    let directory = log::directory(run_dir);
    let own = directory.join(log::name(tenant));
    let mut reader = Reader::open(&own).or_else(|_| Reader::open(&directory.join(SHARED)))?;
    let (mut replay, mut generation) = (Replay::default(), 0);
    while let Some(record) = reader.take()? {
        replay.add(&record).map_err(io::Error::other)?;
        generation = record.generation;
    }
    Ok((generation, replay.table().map_err(io::Error::other)?))
}

/// What was applied last.
///
/// # Errors
/// The state cannot be read.
pub fn stored(state_dir: &Path) -> Result<Stored<Vec<Service>>, PolicyError> {
    Store::new(state_dir).services()
}
