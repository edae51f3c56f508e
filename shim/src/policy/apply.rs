//! Putting a policy in force: whole, or not at all.
//!
//! ```text
//! lock ─ remove other epochs ─ compile ─ write the next epoch ─ persist ─ activate ─ remove the old epoch
//!                                        └── fails: removed again ──┘       └── from here on it is in force
//! ```
//!
//! Until `activate`, one write of eight bytes, programs read the entries of the epoch before; killed anywhere,
//! a step leaves the old policy or the new one in force, and the next one cleans up. What was persisted and
//! not activated is in force after the next step: a change that nobody was told of as done may happen.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use joey_ebpf::policy::maps::{Lock, Maps};

use super::change::Change;
use super::compile::{Compiled, Input, compile};
use super::document::{Checked, Documents};
use super::entry::{Entry, Namespace};
use super::error::PolicyError;
use super::state::{Applied as Stored, Store, Table};
use super::versions;
use crate::config::Config;
use crate::failpoint;

/// What is in force now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Its epoch.
    pub epoch: u32,
    /// How many identities were written.
    pub identities: usize,
    /// How many rules.
    pub rules: usize,
    /// How long it took, waiting for others not counted.
    pub took: Duration,
    /// What does not hold as it was written, or not for all pods.
    pub warnings: Vec<String>,
}

/// What would be in force, and of what it was made.
#[derive(Debug)]
pub(super) struct Merged {
    documents: Stored<Documents>,
    table: Stored<Table>,
    checked: Checked,
}

impl Merged {
    /// What a change makes of what was applied before.
    pub(super) fn new(store: &Store, change: Change) -> Result<Self, PolicyError> {
        let (mut documents, mut table);
        match change {
            Change::Restore => (documents, table) = (store.policy()?, store.identities()?),
            Change::Policy(new) => {
                // What is replaced need not be readable.
                documents = store.policy().unwrap_or_default();
                documents.content = new;
                // Neither must be the other's way out: addresses that nobody knows are refused until they
                // are told again.
                table = store.identities().unwrap_or_else(|error| {
                    tracing::error!(%error, "identities are forgotten: apply them anew");
                    Stored::default()
                });
            }
            Change::Replace { entries, namespaces } => {
                documents = store.policy()?;
                table = store.identities().unwrap_or_default();
                table.content = Table { entries, namespaces };
            }
            Change::Update { put, remove, namespaces } => {
                (documents, table) = (store.policy()?, store.identities()?);
                update(&mut table.content, put, &remove, namespaces);
            }
        }
        Self::of(documents, table)
    }

    pub(super) fn of(
        documents: Stored<Documents>,
        table: Stored<Table>,
    ) -> Result<Self, PolicyError> {
        let checked = documents.content.check()?;
        Ok(Self { documents, table, checked })
    }

    pub(super) fn input(&self) -> Input<'_> {
        let Table { entries, namespaces } = &self.table.content;
        Input { documents: &self.checked, namespaces, entries }
    }

    pub(super) fn checked(&self) -> &Checked {
        &self.checked
    }

    /// With which epoch the younger of the two was applied.
    pub(super) fn epoch(&self) -> u32 {
        self.documents.epoch.max(self.table.epoch)
    }
}

fn update(table: &mut Table, put: Vec<Entry>, remove: &[IpAddr], namespaces: Vec<Namespace>) {
    let new = put.iter().map(|entry| entry.address).chain(remove.iter().copied());
    let new: HashSet<IpAddr> = new.collect();
    table.entries.retain(|entry| !new.contains(&entry.address));
    table.entries.extend(put);
    for namespace in namespaces {
        table.namespaces.retain(|other| other.name != namespace.name);
        table.namespaces.push(namespace);
    }
}

/// Makes a change and puts what comes of it in force on this node.
///
/// # Errors
/// What would be in force is refused, or cannot be written. What was in force still is.
pub fn apply(config: &Config, change: Change) -> Result<Applied, PolicyError> {
    let fail = |step| {
        let path = config.bpf_dir.clone();
        move |cause| PolicyError::NotLoaded { path, step, cause }
    };
    let lock = Lock::take(&config.bpf_dir).map_err(fail("take its lock"))?;
    let maps = Maps::open(&config.bpf_dir).map_err(fail("open its maps"))?;
    let at = |point: &str| failpoint::hold(&config.run_dir, point);
    let mut applied = on(&maps, &lock, &config.state_dir, change, &at)?;
    match versions::warning(config) {
        Ok(warning) => applied.warnings.extend(warning),
        Err(error) => tracing::warn!(%error, "whether pods have another version's policy"),
    }
    Ok(applied)
}

/// Puts in force what was applied last, or what holds where nothing was: for after a boot, when the maps are
/// new and know nothing.
///
/// # Errors
/// As [`apply`].
pub fn restore(config: &Config) -> Result<Applied, PolicyError> {
    apply(config, Change::Restore)
}

/// Checks and compiles what a change would put in force, and leaves everything as it is.
///
/// # Errors
/// It is refused.
pub fn rehearse(config: &Config, change: Change) -> Result<Applied, PolicyError> {
    let begun = Instant::now();
    let merged = Merged::new(&Store::new(&config.state_dir), change)?;
    let compiled = compile(merged.input(), &mut numbers_from(HashMap::new()))?;
    Ok(Applied { took: begun.elapsed(), ..counts(0, &compiled) })
}

/// Gives numbers to names that have none, outside the maps.
pub(super) fn numbers_from(
    mut known: HashMap<String, u32>,
) -> impl FnMut(&str) -> Result<u32, PolicyError> {
    let mut last = known.values().copied().max().unwrap_or(0);
    move |name| {
        if let Some(number) = known.get(name) {
            return Ok(*number);
        }
        last += 1;
        known.insert(name.to_owned(), last);
        Ok(last)
    }
}

fn counts(epoch: u32, compiled: &Compiled) -> Applied {
    let (identities, rules) = (compiled.identities.len(), compiled.rules.len());
    let warnings = compiled.warnings.clone();
    Applied { epoch, identities, rules, took: Duration::ZERO, warnings }
}

/// Makes a change on these maps. `at` is told of the moments at which a kill is of interest.
pub(super) fn on(
    maps: &Maps,
    lock: &Lock,
    state_dir: &Path,
    change: Change,
    at: &dyn Fn(&str),
) -> Result<Applied, PolicyError> {
    let begun = Instant::now();
    let store = Store::new(state_dir);
    let active = maps.active()?.epoch;
    // Whoever was killed left entries of an epoch that never came.
    maps.keep_only(lock, active)?;
    maps.spare_names(lock)?;
    let (of_policy, of_identities, again) = match &change {
        Change::Restore => (true, true, true),
        Change::Policy(_) => (true, false, false),
        Change::Replace { .. } | Change::Update { .. } => (false, true, false),
    };
    let merged = Merged::new(&store, change)?;
    let compiled = compile(merged.input(), &mut |name| Ok(maps.number_of(lock, name)?))?;
    let epoch = active.max(merged.epoch()).checked_add(1).unwrap_or(1);
    let undo = |error| {
        // If this fails as well, the next step does it.
        let _ = maps.keep_only(lock, active);
        error
    };
    write(maps, epoch, &compiled).map_err(undo)?;
    at("policy-written");
    let Merged { documents, table, checked } = merged;
    let mesh = checked.node.map(|node| node.mesh).unwrap_or_default();
    let persist = move || {
        if of_policy {
            let of = Stored { at: documents.at, content: mesh, ..Stored::default() };
            store.write_mesh(&of.stamped(epoch, again))?;
            store.write_policy(&documents.stamped(epoch, again))?;
        }
        if of_identities {
            store.write_identities(&table.stamped(epoch, again))?;
        }
        at("policy-persisted");
        maps.activate(lock, epoch).map_err(PolicyError::from)
    };
    persist().map_err(undo)?;
    at("policy-active");
    maps.keep_only(lock, epoch)?;
    Ok(Applied { took: begun.elapsed(), ..counts(epoch, &compiled) })
}

fn write(maps: &Maps, epoch: u32, compiled: &Compiled) -> Result<(), PolicyError> {
    for (prefix, identity) in &compiled.identities {
        maps.put_identity(epoch, *prefix, *identity)?;
    }
    for (space, policy) in &compiled.spaces {
        maps.put_space(epoch, *space, *policy)?;
    }
    for rule in &compiled.rules {
        maps.put_rule(epoch, rule)?;
    }
    Ok(())
}
