//! QEMU as the VMM: its version, and a running machine.

pub mod args;
pub(crate) mod checkpoint;
pub mod qmp;
pub(crate) mod relocate;
mod spawn;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex as SyncMutex;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::BoxFuture;
use joey_protocol::limits::DISK_SLOTS;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use self::args::slot_is_writable;
use self::qmp::{Qmp, QmpError};
pub(crate) use self::spawn::Launch;
use super::error::VmmError;
use super::{Disk, DiskLimits, Phases, Vm};

/// The oldest QEMU with `file:` migration and private mappings of read-only memory files.
pub const OLDEST: (u32, u32) = (8, 2);
const OLDEST_TEXT: &str = "8.2";
/// How long QEMU may take until its control socket answers.
const READY_DEADLINE: Duration = Duration::from_secs(20);
/// How long it may take to restore a template.
const RESTORE_DEADLINE: Duration = Duration::from_secs(20);

/// QEMU's threads beside those of processors: its main loop, RCU's, and the control socket's.
const THREADS: usize = 3;
/// Most worker threads of QEMU, its default.
const WORKERS: u32 = 64;
/// How long QEMU may take to come to rest. Its worker threads wait ten seconds for more work.
const REST_DEADLINE: Duration = Duration::from_secs(30);

/// Which QEMU this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// As it says itself.
    pub text: String,
    /// Device, inode, size and time of change of the binary: a package update changes them.
    pub identity: String,
}

/// The version of the QEMU at `path`; asks the binary once per boot of the node and binary.
pub fn version(path: &Path, run_dir: &Path) -> Result<Version, VmmError> {
    let metadata = fs::metadata(path).map_err(|_| VmmError::QemuMissing(path.to_owned()))?;
    let identity = format!(
        "{}:{}:{}:{}.{}",
        metadata.dev(),
        metadata.ino(),
        metadata.size(),
        metadata.ctime(),
        metadata.ctime_nsec()
    );
    let known = run_dir.join("qemu.json");
    if let Some(version) = fs::read(&known)
        .ok()
        .and_then(|text| serde_json::from_slice::<Version>(&text).ok())
        .filter(|version| version.identity == identity)
    {
        return Ok(version);
    }
    let version = Version { text: ask_version(path)?, identity };
    let temporary = known.with_extension(std::process::id().to_string());
    let _ = fs::create_dir_all(run_dir);
    if fs::write(&temporary, serde_json::to_vec(&version).unwrap_or_default()).is_ok() {
        let _ = fs::rename(temporary, known);
    }
    Ok(version)
}

fn ask_version(path: &Path) -> Result<String, VmmError> {
    let output = std::process::Command::new(path)
        .arg("--version")
        .output()
        .map_err(VmmError::io(format!("running {} --version", path.display())))?;
    let answer = String::from_utf8_lossy(&output.stdout);
    let unknown = || VmmError::QemuUnknown {
        path: path.to_owned(),
        answer: answer.chars().take(100).collect(),
    };
    let text = answer
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("QEMU emulator version "))
        .ok_or_else(unknown)?;
    let mut numbers = text.split(['.', ' ']).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(unknown());
    };
    if (major, minor) < OLDEST {
        return Err(VmmError::QemuTooOld {
            path: path.to_owned(),
            found: text.to_owned(),
            needed: OLDEST_TEXT,
        });
    }
    Ok(text.to_owned())
}

/// A machine run by QEMU.
pub struct QemuVm {
    id: String,
    running: spawn::Running,
    qmp: Mutex<Qmp>,
    channel: SyncMutex<Option<UnixStream>>,
    attached: Mutex<BTreeMap<u32, String>>,
    stderr: spawn::Tail,
    /// Whether it goes on from a checkpoint, in which all of the machine is.
    continues: bool,
}

impl QemuVm {
    /// Starts QEMU, waits for its control socket, empties its jail, and waits until it runs.
    pub(crate) async fn start(launch: Launch<'_>, phases: &mut Phases) -> Result<Self, VmmError> {
        let (id, continues) = (launch.id.clone(), launch.continues);
        let begun = Instant::now();
        let process = spawn::spawn(launch).await?;
        phases.push(("vmm_spawn", begun.elapsed()));
        let (running, stderr, jail) = (process.running, process.stderr, process.jail);
        let begun = Instant::now();
        let connect = async {
            match continues {
                true => Ok(Qmp::resume(process.qmp)),
                false => Qmp::connect(process.qmp).await,
            }
        };
        let ready = timeout(READY_DEADLINE, connect).await;
        let qmp = match ready {
            Ok(Ok(qmp)) => qmp,
            Ok(Err(error)) => return Err(explain(&id, error, &running.ended, &stderr).await),
            Err(_) => {
                return Err(VmmError::Deadline { id, what: "QEMU's start", limit: READY_DEADLINE });
            }
        };
        let vm = Self {
            id,
            running,
            qmp: Mutex::new(qmp),
            channel: SyncMutex::new(Some(process.channel)),
            attached: Mutex::default(),
            stderr,
            continues,
        };
        phases.push(("vmm_ready", begun.elapsed()));
        let begun = Instant::now();
        jail.empty(vm.running.pid)
            .map_err(VmmError::io(format!("sandbox {}: emptying the VMM's jail", vm.id)))?;
        phases.push(("jail_empty", begun.elapsed()));
        Ok(vm)
    }

    /// Restores a clone's state and waits until it runs.
    pub(crate) async fn restored(&self) -> Result<(), VmmError> {
        let wait = async {
            let mut qmp = self.qmp.lock().await;
            if !self.continues {
                qmp.execute("migrate-set-capabilities", capabilities()).await?;
                // The template's address is nobody's: the network shall not learn it.
                qmp.execute("migrate-set-parameters", json!({"announce-rounds": 0})).await?;
                let source = json!({"uri": "file:/dev/fdset/1"});
                qmp.execute("migrate-incoming", source).await?;
                migrated(&mut qmp).await?;
            }
            // A machine that runs already does not mind.
            qmp.execute("cont", json!({})).await?;
            Ok(())
        };
        match timeout(RESTORE_DEADLINE, wait).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                Err(explain(&self.id, error, &self.running.ended, &self.stderr).await)
            }
            Err(_) => Err(VmmError::Deadline {
                id: self.id.clone(),
                what: "restoring the template",
                limit: RESTORE_DEADLINE,
            }),
        }
    }

    /// Stops the machine and writes its device state to `state`.
    pub(crate) async fn save(&self, state: OwnedFd) -> Result<(), VmmError> {
        let mut qmp = self.qmp.lock().await;
        qmp.execute("stop", json!({})).await?;
        qmp.execute("migrate-set-capabilities", capabilities()).await?;
        let set = json!({"fdset-id": 900});
        qmp.execute_with("add-fd", set, Some(state.as_fd())).await?;
        qmp.execute("migrate", json!({"uri": "file:/dev/fdset/900"})).await?;
        Ok(migrated(&mut qmp).await?)
    }

    /// Stops the machine and writes a checkpoint of its process: the program that [`Launch::continues`].
    pub(crate) async fn checkpoint(&self, vcpus: usize, file: &File) -> anyhow::Result<()> {
        let mut qmp = self.qmp.lock().await;
        qmp.execute("stop", json!({})).await?;
        // The state from which it was restored.
        qmp.execute("remove-fd", json!({"fdset-id": 1})).await?;
        // Each worker that ends wakes another for as long again; but all beyond the most there may be end
        // at once.
        let workers = |most: u32| json!({"path": "/objects/main-loop", "property": "thread-pool-max", "value": most});
        qmp.execute("qom-set", workers(1)).await?;
        let resting = async {
            while checkpoint::threads(self.running.pid)? > THREADS + vcpus {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        };
        let rested: std::io::Result<()> =
            timeout(REST_DEADLINE, resting).await.context("QEMU's worker threads did not end")?;
        rested?;
        qmp.execute("qom-set", workers(WORKERS)).await?;
        Ok(checkpoint::take(self.running.pid, args::fd::STATE, file)?)
    }

    async fn swap(&self, slot: u32, file: &str) -> Result<(), QmpError> {
        let node = json!({"options": [{
            "driver": "raw", "node-name": format!("slot{slot}"), "discard": "unmap",
            "read-only": !slot_is_writable(slot), "file": file,
        }]});
        self.qmp.lock().await.execute("blockdev-reopen", node).await.map(drop)
    }

    async fn attach(&self, slot: u32, disk: &Disk) -> Result<(), VmmError> {
        let mut attached = self.attached.lock().await;
        if attached.contains_key(&slot) {
            return Err(VmmError::Slot { slot, reason: "already has a disk" });
        }
        let node = format!("file{slot}");
        let read_only = !slot_is_writable(slot);
        {
            let mut qmp = self.qmp.lock().await;
            let mut sets = Vec::with_capacity(disk.files.len() + 1);
            let added = add_node(&mut qmp, slot, &node, disk, read_only, &mut sets).await;
            // The block nodes hold their own duplicates.
            for set in sets {
                let _ = qmp.execute("remove-fd", json!({"fdset-id": set})).await;
            }
            added?;
        }
        if let Err(error) = self.swap(slot, &node).await {
            let _ = self.delete_node(&node).await;
            return Err(error.into());
        }
        attached.insert(slot, node);
        Ok(())
    }

    async fn detach(&self, slot: u32) -> Result<(), VmmError> {
        let mut attached = self.attached.lock().await;
        let Some(node) = attached.get(&slot) else {
            return Ok(());
        };
        self.swap(slot, &format!("empty{slot}")).await?;
        self.delete_node(node).await?;
        attached.remove(&slot);
        Ok(())
    }

    async fn resize(&self, slot: u32, bytes: u64) -> Result<(), VmmError> {
        let arguments = json!({"node-name": format!("slot{slot}"), "size": bytes});
        self.qmp.lock().await.execute("block_resize", arguments).await?;
        Ok(())
    }

    /// All slots are one group, which shares the limits.
    async fn limit(&self, limits: DiskLimits) -> Result<(), VmmError> {
        let mut qmp = self.qmp.lock().await;
        for slot in 0..DISK_SLOTS {
            let arguments = json!({
                "id": format!("disk{slot}"), "group": "pod", "bps": 0, "iops": 0,
                "bps_rd": limits.read_bytes, "bps_wr": limits.write_bytes,
                "iops_rd": limits.read_operations, "iops_wr": limits.write_operations,
            });
            qmp.execute("block_set_io_throttle", arguments).await?;
        }
        Ok(())
    }

    async fn delete_node(&self, node: &str) -> Result<(), QmpError> {
        let arguments = json!({"node-name": node});
        self.qmp.lock().await.execute("blockdev-del", arguments).await.map(drop)
    }

    async fn command(&self, name: &str) -> Result<(), VmmError> {
        self.qmp.lock().await.execute(name, json!({})).await?;
        Ok(())
    }
}

/// Adds the block node of a disk; `sets` takes the descriptor sets made for it.
///
/// Several extents are a flat VMDK image (VMware's "Virtual Disk Format 5.0"): its text names them, and
/// QEMU needs nothing else to show them as one.
async fn add_node(
    qmp: &mut Qmp,
    slot: u32,
    node: &str,
    disk: &Disk,
    read_only: bool,
    sets: &mut Vec<u32>,
) -> Result<(), VmmError> {
    for file in &disk.files {
        add_file(qmp, slot, sets, file.as_fd()).await?;
    }
    let options = if disk.extents.is_empty() {
        let filename = format!("/dev/fdset/{}", fdset(slot, 0));
        let is_device = disk.files.first().is_some_and(is_block_device);
        json!({
            "driver": if is_device { "host_device" } else { "file" }, "node-name": node, "read-only": read_only, "discard": "unmap",
            "filename": filename, "locking": "off", "cache": {"no-flush": disk.ephemeral},
        })
    } else {
        let number = u32::try_from(disk.files.len()).unwrap_or(SETS);
        let text = memory_file(&flat_image(slot, disk))
            .map_err(VmmError::io(format!("describe the disk of slot {slot}")))?;
        add_file(qmp, slot, sets, text.as_fd()).await?;
        let filename = format!("/dev/fdset/{}", fdset(slot, number));
        json!({
            "driver": "vmdk", "node-name": node, "read-only": read_only,
            "file": {"driver": "file", "filename": filename, "locking": "off"},
        })
    };
    qmp.execute("blockdev-add", options).await?;
    Ok(())
}

fn is_block_device(file: &OwnedFd) -> bool {
    let kind = fstat(file).map(|meta| SFlag::from_bits_truncate(meta.st_mode) & SFlag::S_IFMT);
    kind == Ok(SFlag::S_IFBLK)
}

async fn add_file(
    qmp: &mut Qmp,
    slot: u32,
    sets: &mut Vec<u32>,
    file: BorrowedFd<'_>,
) -> Result<(), VmmError> {
    let number = u32::try_from(sets.len()).unwrap_or(SETS);
    if number >= SETS {
        return Err(VmmError::Slot { slot, reason: "the disk consists of too many files" });
    }
    let set = fdset(slot, number);
    qmp.execute_with("add-fd", json!({"fdset-id": set}), Some(file)).await?;
    sets.push(set);
    Ok(())
}

/// A file without a name, opened read-only: QEMU takes a descriptor only with the access it asks for.
fn memory_file(text: &str) -> std::io::Result<File> {
    let mut file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Descriptor sets of one slot.
const SETS: u32 = 1000;

fn fdset(slot: u32, number: u32) -> u32 {
    SETS * (slot + 1) + number
}

/// The description's text. QEMU reads an extent that comes after an empty line twice: there is none.
fn flat_image(slot: u32, disk: &Disk) -> String {
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                    createType=\"monolithicFlat\"\n# Extents\n"
        .to_owned();
    for extent in &disk.extents {
        let set = fdset(slot, u32::try_from(extent.file).unwrap_or(SETS));
        let (sectors, first) = (extent.length / 512, extent.offset / 512);
        text += &format!("RW {sectors} FLAT \"/dev/fdset/{set}\" {first}\n");
    }
    text + "\nddb.adapterType = \"ide\"\n"
}

/// Waits for the end of a migration, in or out.
async fn migrated(qmp: &mut Qmp) -> Result<(), QmpError> {
    loop {
        let event = qmp.event().await?;
        tracing::debug!(name = event.name, data = %event.data, "QEMU's event");
        match event.data.get("status").and_then(|status| status.as_str()) {
            Some("completed") if event.name == "MIGRATION" => return Ok(()),
            Some("failed") if event.name == "MIGRATION" => {
                let info = qmp.execute("query-migrate", json!({})).await?;
                return Err(QmpError::Refused {
                    command: "migrate".to_owned(),
                    reason: info.get("error-desc").map(ToString::to_string).unwrap_or_default(),
                });
            }
            _ => {}
        }
    }
}

/// Shared memory is not in the state: it is the template's memory file itself.
fn capabilities() -> serde_json::Value {
    json!({"capabilities": [
        {"capability": "events", "state": true},
        {"capability": "x-ignore-shared", "state": true},
    ]})
}

fn check_slot(slot: u32, read_only: bool) -> Result<(), VmmError> {
    if slot >= DISK_SLOTS {
        return Err(VmmError::Slot { slot, reason: "the machine has no such slot" });
    }
    if slot_is_writable(slot) == read_only {
        return Err(VmmError::Slot {
            slot,
            reason: "writable disks go into the last slots, read-only disks into the others",
        });
    }
    Ok(())
}

impl Vm for QemuVm {
    fn pid(&self) -> i32 {
        self.running.pid
    }

    fn take_channel(&self) -> Result<UnixStream, VmmError> {
        let mut channel = self.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        channel.take().ok_or_else(|| VmmError::ChannelTaken(self.id.clone()))
    }

    fn attach_disk<'a>(
        &'a self,
        slot: u32,
        disk: &'a Disk,
        read_only: bool,
    ) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(async move {
            check_slot(slot, read_only)?;
            self.attach(slot, disk).await
        })
    }

    fn detach_disk(&self, slot: u32) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(self.detach(slot))
    }

    fn resize_disk(&self, slot: u32, bytes: u64) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(self.resize(slot, bytes))
    }

    fn limit_disks(&self, limits: DiskLimits) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(self.limit(limits))
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(self.command("stop"))
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(self.command("cont"))
    }

    fn kill(&self) {
        self.running.kill();
    }

    fn exited(&self) -> BoxFuture<'_, String> {
        Box::pin(async {
            let mut ended = self.running.ended.clone();
            let how = match ended.wait_for(Option::is_some).await {
                Ok(how) => how.clone().unwrap_or_default(),
                Err(_) => "unknown".to_owned(),
            };
            match self.stderr.text() {
                words if words.is_empty() => how,
                words => format!("{how}: {words}"),
            }
        })
    }
}

/// When QEMU closed its socket it is ending: its last words say more than the closed socket.
async fn explain(
    id: &str,
    error: QmpError,
    ended: &watch::Receiver<Option<String>>,
    stderr: &spawn::Tail,
) -> VmmError {
    if !matches!(error, QmpError::Closed { .. }) {
        return error.into();
    }
    let mut ended = ended.clone();
    let status = match timeout(Duration::from_secs(2), ended.wait_for(Option::is_some)).await {
        Ok(Ok(how)) => how.clone().unwrap_or_default(),
        _ => return error.into(),
    };
    tokio::task::yield_now().await;
    VmmError::Ended { id: id.to_owned(), status, stderr: stderr.text() }
}

/// The part of a kernel image that QEMU wants to see even when the machine's memory is restored.
pub(crate) fn kernel_stub(kernel: &Path) -> Result<Vec<u8>, VmmError> {
    use std::io::Read;
    let path: PathBuf = kernel.to_owned();
    let mut stub = Vec::new();
    File::open(kernel)
        .and_then(|file| file.take(64 * 1024).read_to_end(&mut stub))
        .map_err(|source| VmmError::Guest { path, source })?;
    Ok(stub)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn pretend(directory: &Path, answer: &str) -> PathBuf {
        let path = directory.join("qemu");
        fs::write(&path, format!("#!/bin/sh\necho '{answer}'\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn versions_are_judged() {
        let directory = tempfile::tempdir().unwrap();
        let ask = |answer| {
            ask_version(&pretend(directory.path(), answer)).map_err(|error| error.to_string())
        };
        assert!(ask("QEMU emulator version 10.0.2 (Debian)").is_ok());
        assert!(ask("QEMU emulator version 8.2.0").is_ok());
        let old = ask("QEMU emulator version 7.2.9 (Debian)").unwrap_err();
        assert!(old.contains("needs 8.2"), "{old}");
        assert!(ask("hello").unwrap_err().contains("did not answer"));
    }

    #[test]
    fn a_missing_qemu_is_named() {
        let run = tempfile::tempdir().unwrap();
        let error = version(Path::new("/nowhere/qemu"), run.path()).unwrap_err();
        assert!(error.to_string().contains("install qemu-system-x86"), "{error}");
    }

    #[test]
    fn slots_are_checked() {
        assert!(check_slot(0, true).is_ok());
        assert!(check_slot(0, false).is_err());
        assert!(check_slot(15, false).is_ok());
        assert!(check_slot(16, true).is_err());
    }
}
