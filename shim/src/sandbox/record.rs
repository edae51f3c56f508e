//! What a sandbox has acquired on the host: a file on tmpfs, written before each acquisition.
//!
//! It is what `delete` works from after the shim was killed, and what `joey ps` reads. Writing is
//! atomic (beside, then rename), so a reader sees one state or the next, never half of one.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

/// File name in the sandbox's run directory.
const FILE: &str = "record.json";

/// A process that can be told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks after boot (proc(5)).
    pub start: u64,
}

impl ProcessId {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, in parentheses, may hold anything: count from its end.
        let start = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(19))
            .and_then(|field| field.parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/<pid>/stat"))?;
        Ok(Self { pid, start })
    }

    /// Whether the very same process still exists.
    #[must_use]
    pub fn alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

/// A block of an image that is not what it was when the image was unpacked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Names of the image, as its containers give them.
    pub image: String,
    /// The layer; empty: what joins the layers.
    pub layer: String,
    /// The file of the host.
    pub file: PathBuf,
    /// The block in it, of 4096 bytes.
    pub block: u64,
}

/// What the node's policy knows of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// `bpf_dir`.
    pub bpf_dir: PathBuf,
    /// Where that policy's maps are pinned below it, which names their layout.
    pub maps: PathBuf,
    /// Its number.
    pub id: u16,
    /// When it got that, in monotonic nanoseconds: tells it from others that had the number.
    pub since: u64,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whose it is.
    pub tenant: String,
}

/// The record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// containerd's id of the pod; the name of the directory that the record lies in.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Kubernetes name of the pod, `namespace/name`, where CRI gave it.
    pub pod: Option<String>,
    /// The shim.
    pub shim: Option<ProcessId>,
    /// The socket it serves.
    pub socket: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory of the guest in MiB.
    pub memory_mib: u32,
    /// Network namespace into which the wire is plugged.
    pub netns: Option<PathBuf>,
    /// The pod in the node's policy, if it has a place there.
    #[serde(default)]
    pub network: Option<PodNetwork>,
    /// Control groups that were made.
    pub cgroups: Vec<PathBuf>,
    /// The VMM.
    pub vmm: Option<ProcessId>,
    /// Whether it came from a template; `None` before it runs.
    pub cloned: Option<bool>,
    /// The guest's machine id, as the guest has it.
    #[serde(default)]
    pub machine_id: String,
    /// The guest's boot id.
    #[serde(default)]
    pub boot_id: String,
    /// What of its images its guest has found damaged, the first few.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<Damage>,
    /// Seconds after the epoch when the shim started.
    pub started_at: u64,
}

/// Run directory of a sandbox.
#[must_use]
pub fn directory(run_dir: &Path, id: &str) -> PathBuf {
    run_dir.join("sandboxes").join(id)
}

impl Record {
    /// Of a sandbox whose shim is about to bind `socket`.
    #[must_use]
    pub fn begun(id: &str, namespace: &str, socket: &Path) -> Self {
        Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            socket: socket.to_owned(),
            started_at: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            ..Self::default()
        }
    }

    /// Gives a sandbox's directory another name, which must be free: once somebody has it, be it with
    /// nothing in it yet, it is theirs.
    ///
    /// # Errors
    /// The name is taken, or the file system refuses.
    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?)
    }

    /// Writes the record into `directory`, which is made if it is missing.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let beside = directory.join(".record.json");
        let mut file = std::fs::File::create(&beside)?;
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        std::fs::rename(beside, directory.join(FILE))
    }

    /// How long ago the record in `directory` was written; `None` if there is none.
    #[must_use]
    pub fn age(directory: &Path) -> Option<Duration> {
        let written =
            std::fs::metadata(directory.join(FILE)).and_then(|meta| meta.modified()).ok()?;
        Some(SystemTime::now().duration_since(written).unwrap_or_default())
    }

    /// Reads the record of a sandbox; `None` if there is none.
    ///
    /// # Errors
    /// It exists and cannot be read.
    pub fn read(directory: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(directory.join(FILE)) {
            Ok(text) => {
                let mut record: Self = serde_json::from_slice(&text)?;
                // Whoever was killed between a renaming and the writing left another one.
                if let Some(name) = directory.file_name().and_then(|name| name.to_str()) {
                    name.clone_into(&mut record.id);
                }
                Ok(Some(record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All records below `run_dir`; what cannot be read is skipped and logged.
    ///
    /// # Errors
    /// The directory exists and cannot be listed.
    pub fn all(run_dir: &Path) -> io::Result<Vec<Self>> {
        let mut records = Vec::new();
        for path in directories(run_dir)? {
            match Self::read(&path) {
                Ok(record) => records.extend(record),
                Err(error) => tracing::warn!(path = %path.display(), %error, "record unreadable"),
            }
        }
        records.sort_by(|a: &Self, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        Ok(records)
    }

    /// The same, for whoever must not miss one.
    ///
    /// # Errors
    /// The directory exists and cannot be listed, or a record cannot be read.
    pub fn each(run_dir: &Path) -> io::Result<Vec<Self>> {
        let read = |path: PathBuf| {
            Self::read(&path).transpose().map(|record| {
                let fail = |error| {
                    io::Error::other(format!("read the record in {}: {error}", path.display()))
                };
                record.map_err(fail)
            })
        };
        directories(run_dir)?.into_iter().filter_map(read).collect()
    }
}

/// The sandboxes' run directories.
fn directories(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(run_dir.join("sandboxes")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_listed() {
        let run = tempfile::tempdir().unwrap();
        let record = Record {
            id: "abc".to_owned(),
            shim: Some(ProcessId::of(std::process::id()).unwrap()),
            ..Record::default()
        };
        let dir = directory(run.path(), "abc");
        assert_eq!(Record::read(&dir).unwrap(), None);
        assert_eq!(Record::all(run.path()).unwrap(), []);
        record.write(&dir).unwrap();
        assert_eq!(Record::read(&dir).unwrap().as_ref(), Some(&record));
        assert_eq!(Record::all(run.path()).unwrap(), [record]);
    }

    #[test]
    fn a_name_is_taken_once_and_is_the_records_id() {
        let run = tempfile::tempdir().unwrap();
        let [from, to] = ["standby-1", "abc"].map(|id| directory(run.path(), id));
        Record { id: "standby-1".to_owned(), ..Record::default() }.write(&from).unwrap();
        std::fs::create_dir(&to).unwrap();
        let taken = Record::rename(&from, &to).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        std::fs::remove_dir(&to).unwrap();
        Record::rename(&from, &to).unwrap();
        assert_eq!(Record::read(&to).unwrap().unwrap().id, "abc");
    }

    #[test]
    fn a_process_is_told_from_a_later_one() {
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(me.alive());
        assert!(!ProcessId { start: me.start + 1, ..me }.alive());
    }
}
