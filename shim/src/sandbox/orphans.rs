//! Sandboxes whose shim is gone and for which nobody called `delete`.
//!
//! containerd calls `delete` when a shim's connection breaks, but not always: it gives up when the
//! shim dies between `start` and the first request, and 1.7 removes the bundle, in which `delete` is
//! to run, beside the call. The VM itself dies with its shim ([`crate::host::jail`]); what the record
//! names besides is removed here, by the shims of other sandboxes, `joey network serve` and `joey clean`.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use super::record::{ProcessId, Record, directory};
use super::teardown::{self, Incomplete};

/// How long a record must have been left alone: containerd's own `delete` comes first, and a shim
/// that is just being started is not an orphan.
pub const GRACE: Duration = Duration::from_secs(10);
/// How often the shims of a node look, all together.
const EVERY: Duration = Duration::from_secs(30);
/// Held by the one that looks; its time stamp tells when somebody last did.
const LOCK: &str = "orphans.lock";

/// Whether nobody will end this sandbox any more.
#[must_use]
pub fn is_orphan(run_dir: &Path, record: &Record) -> bool {
    let alone = record.shim.is_none_or(|shim| !shim.alive());
    alone && Record::age(&directory(run_dir, &record.id)).is_some_and(|age| age >= GRACE)
}

/// Removes what orphans have left; tells of each whether nothing is left now.
///
/// # Errors
/// The records cannot be listed.
pub fn collect(run_dir: &Path) -> io::Result<Vec<Collected>> {
    remove_bare_names(run_dir);
    let all = Record::all(run_dir)?.into_iter();
    Ok(all
        .filter(|record| is_orphan(run_dir, record))
        .map(|record| undo(run_dir, record))
        .collect())
}

/// An orphan, and whether nothing of it is left.
pub type Collected = (Record, Result<(), Incomplete>);

fn undo(run_dir: &Path, record: Record) -> Collected {
    let undone = teardown::undo(run_dir, &record);
    (record, undone)
}

/// Logs what became of orphans.
pub(crate) fn tell(orphans: &[Collected]) {
    for (record, undone) in orphans {
        let pod = record.pod.as_deref().unwrap_or("-");
        match undone {
            Ok(()) => tracing::warn!(sandbox = record.id, pod, "orphan removed"),
            Err(error) => tracing::error!(sandbox = record.id, pod, %error, "orphan"),
        }
    }
}

/// For a daemon that looks again and again: an orphan is collected once it has been one for [`GRACE`].
#[derive(Debug, Default)]
pub struct Watch {
    /// Orphans by id, with their shim that is dead and when that was seen first.
    orphans: HashMap<String, (Option<ProcessId>, Instant)>,
}

impl Watch {
    /// Looks once. One whose socket is served is none, whatever this process sees of others: it may be in a
    /// container.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn look(&mut self, run_dir: &Path) -> io::Result<Vec<Collected>> {
        self.look_at(run_dir, Instant::now())
    }

    fn look_at(&mut self, run_dir: &Path, now: Instant) -> io::Result<Vec<Collected>> {
        let mut orphans = Record::all(run_dir)?;
        orphans.retain(|it| is_orphan(run_dir, it) && UnixStream::connect(&it.socket).is_err());
        let is = |id: &String, shim| orphans.iter().any(|it| it.id == *id && it.shim == shim);
        self.orphans.retain(|id, (shim, _)| is(id, *shim));
        let mut ripe = |record: &Record| {
            let known = self.orphans.entry(record.id.clone()).or_insert((record.shim, now));
            now.duration_since(known.1) >= GRACE
        };
        orphans.retain(|record| ripe(record));
        Ok(orphans.into_iter().map(|record| undo(run_dir, record)).collect())
    }
}

/// Removes the directories in which nothing is: a `start` that was killed between taking a sandbox's name
/// and writing its record leaves one, and containerd calls no `delete` for it.
fn remove_bare_names(run_dir: &Path) {
    for entry in std::fs::read_dir(run_dir.join("sandboxes")).into_iter().flatten().flatten() {
        let made = entry.metadata().and_then(|meta| meta.modified());
        let age = made.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
        if age.is_ok_and(|age| age >= GRACE) {
            // Fails where something is in it.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// [`collect`], unless another shim of the node does, or did a short while ago.
pub(crate) fn collect_in_turn(run_dir: &Path) {
    let path = run_dir.join(LOCK);
    let recent = |file: &File| {
        let at = file.metadata().and_then(|meta| meta.modified());
        at.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < EVERY))
    };
    if File::open(&path).is_ok_and(|file| recent(&file)) {
        return;
    }
    let Ok(file) = File::options().create(true).append(true).open(&path) else { return };
    let Ok(turn) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return };
    // A time stamp that cannot be set costs the next shim a look.
    let _ = turn.set_modified(SystemTime::now());
    match collect(run_dir) {
        Err(error) => tracing::warn!(%error, "looking for orphaned sandboxes"),
        Ok(orphans) => tell(&orphans),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_old_record_of_a_dead_shim_is_collected() {
        let run = tempfile::tempdir().unwrap();
        let me = ProcessId::of(std::process::id()).unwrap();
        let dead = ProcessId { start: me.start + 1, ..me };
        let write = |id: &str, shim, age: Duration| {
            let dir = directory(run.path(), id);
            Record { id: id.to_owned(), shim: Some(shim), ..Record::default() }
                .write(&dir)
                .unwrap();
            let file = File::options().append(true).open(dir.join("record.json")).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        };
        write("alive", me, GRACE * 2);
        write("young", dead, GRACE / 2);
        write("orphan", dead, GRACE * 2);
        collect_in_turn(run.path());
        let left = |run: &Path| -> Vec<String> {
            Record::all(run).unwrap().into_iter().map(|record| record.id).collect()
        };
        assert_eq!(left(run.path()), ["alive", "young"]);
        write("orphan", dead, GRACE * 2);
        collect_in_turn(run.path());
        assert_eq!(left(run.path()), ["alive", "orphan", "young"], "looked a moment ago");
        assert_eq!(collect(run.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_daemon_waits_and_leaves_alone_who_answers() {
        let run = tempfile::tempdir().unwrap();
        let me = ProcessId::of(std::process::id()).unwrap();
        let dead = ProcessId { start: me.start + 1, ..me };
        let socket = run.path().join("socket");
        let _served = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let write = |id: &str, shim, socket: &Path| {
            let (id, dir) = (id.to_owned(), directory(run.path(), id));
            let socket = socket.to_owned();
            Record { id, shim: Some(shim), socket, ..Record::default() }.write(&dir).unwrap();
            let file = File::options().append(true).open(dir.join("record.json")).unwrap();
            file.set_modified(SystemTime::now() - GRACE * 2).unwrap();
        };
        write("unseen", dead, &socket);
        write("orphan", dead, &run.path().join("none"));
        write("alive", me, &run.path().join("none"));
        let (mut watch, begun) = (Watch::default(), Instant::now());
        let mut look = |after: Duration| -> Vec<String> {
            let collected = watch.look_at(run.path(), begun + after).unwrap();
            collected
                .into_iter()
                .map(|(record, undone)| undone.map(|()| record.id).unwrap())
                .collect()
        };
        assert_eq!(look(Duration::ZERO), [""; 0]);
        assert_eq!(look(GRACE / 2), [""; 0]);
        // Another shim has the name, and dies: it has its own time.
        write("orphan", ProcessId { start: me.start + 2, ..me }, &run.path().join("none"));
        assert_eq!(look(GRACE), [""; 0]);
        assert_eq!(look(GRACE * 2), ["orphan"]);
        assert_eq!(look(GRACE * 9), [""; 0]);
    }

    #[test]
    fn a_name_without_a_record_goes_when_it_is_old() {
        let run = tempfile::tempdir().unwrap();
        let [old, young, full] = ["old", "young", "full"].map(|id| directory(run.path(), id));
        for path in [&old, &young, &full] {
            std::fs::create_dir_all(path).unwrap();
        }
        std::fs::write(full.join("console.log"), "").unwrap();
        for path in [&old, &full] {
            File::open(path).unwrap().set_modified(SystemTime::now() - GRACE * 2).unwrap();
        }
        collect(run.path()).unwrap();
        assert_eq!([old, young, full].map(|path| path.exists()), [false, true, true]);
    }
}
