//! File systems on disks, as volumes: mounted once for all containers of the pod that have them.
//!
//! Mounting may replay a journal, giving the files to the pod's group may walk millions of them, and
//! unmounting writes out what there is: each is done by a process of the agent's own, and the event loop
//! goes on.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use joey_protocol::api;
use joey_protocol::ids::VolumeId;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use crate::block_devices;
use crate::fd_io::FdIo;
use crate::sandbox::{Sandbox, SandboxError};
use crate::storage::{self, SlotClaim};

/// Where they are mounted.
pub(crate) const MOUNTS: &str = "/run/joey/mounts";
/// What tells the program that mounts and unmounts from the agent.
pub(crate) const PROGRAM: &str = "volume-disk";
/// Longest word of that program's that is passed on.
const ERROR: u64 = 4096;
/// How long a file system may still be somebody's after it was unmounted here: the last container's mounts
/// go a moment after its last process.
const LET_GO: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Options that are flags to the kernel; all others are the file system's own.
const FLAGS: [(&str, MsFlags); 9] = [
    ("noatime", MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("sync", MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC),
];

/// Why a volume is not mounted, or not unmounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskVolumeError {
    /// This kernel cannot.
    #[error("volume {volume}: file system {file_system:?} is not in this guest's kernel")]
    Unknown {
        /// The volume.
        volume: VolumeId,
        /// What is on the disk.
        file_system: String,
    },
    /// The process that does it failed; its own words.
    #[error("volume {volume}: {reason}")]
    Failed {
        /// The volume.
        volume: VolumeId,
        /// What went wrong.
        reason: String,
    },
}

/// What is mounted, each with its disk. A name without one is being mounted or unmounted.
#[derive(Debug, Default)]
pub(crate) struct DiskVolumes(Mutex<HashMap<String, Option<(u32, SlotClaim)>>>);

/// What the program is to do.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Work {
    Mount(Mount),
    Unmount { device: PathBuf, target: PathBuf },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Mount {
    device: PathBuf,
    target: PathBuf,
    file_system: String,
    writable: bool,
    options: Vec<String>,
    /// The group that the files are given to, and whether only if the root is not that group's.
    group: Option<(u32, bool)>,
}

impl DiskVolumes {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<(u32, SlotClaim)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name, until [`Self::settle`].
    fn reserve(&self, id: &VolumeId) -> Result<(), SandboxError> {
        let mut table = self.lock();
        if table.contains_key(id.as_str()) {
            return Err(SandboxError::Exists { kind: "volume", id: id.to_string() });
        }
        table.insert(id.to_string(), None);
        Ok(())
    }

    fn take(&self, id: &VolumeId) -> Result<(u32, SlotClaim), SandboxError> {
        let unknown = || SandboxError::Unknown { kind: "volume", id: id.to_string() };
        self.lock().get_mut(id.as_str()).and_then(Option::take).ok_or_else(unknown)
    }

    fn settle(&self, id: &VolumeId, mounted: Option<(u32, SlotClaim)>) {
        let mut table = self.lock();
        match mounted {
            Some(mounted) => drop(table.insert(id.to_string(), Some(mounted))),
            None => drop(table.remove(id.as_str())),
        }
    }
}

impl Sandbox {
    /// Mounts a disk as a volume.
    pub(crate) async fn mount_volume(
        self: Arc<Self>,
        request: api::MountVolumeRequest,
    ) -> Result<(), SandboxError> {
        self.require_started()?;
        let id = VolumeId::new(&request.volume_id)?;
        self.disk_volumes.reserve(&id)?;
        let mounted = self.mount_disk(&id, &request).await;
        let (claim, result) = match mounted {
            Ok(claim) => (Some((request.disk.slot, claim)), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.disk_volumes.settle(&id, claim);
        result
    }

    async fn mount_disk(
        &self,
        id: &VolumeId,
        request: &api::MountVolumeRequest,
    ) -> Result<SlotClaim, SandboxError> {
        let disk = request.disk.get_or_default();
        let file_system = disk.file_system.clone();
        if !is_known(&file_system) {
            return Err(DiskVolumeError::Unknown { volume: id.clone(), file_system }.into());
        }
        let claim = SlotClaim::take(&self.slots, &[disk])?;
        let (slot, bytes) = (disk.slot, request.bytes);
        block_devices::find(&api::BlockDevice { slot, bytes, ..Default::default() }, false)?;
        let group = request.fs_group.as_ref().map(|group| (group.gid, group.on_root_mismatch));
        let work = Work::Mount(Mount {
            device: storage::device(slot)?,
            target: place(id),
            file_system,
            writable: disk.writable,
            options: request.options.clone(),
            group,
        });
        self.work(id, &work).await?;
        Ok(claim)
    }

    /// Unmounts a volume. Until that succeeds it keeps its disk.
    pub(crate) async fn unmount_volume(
        self: Arc<Self>,
        request: api::UnmountVolumeRequest,
    ) -> Result<(), SandboxError> {
        let id = VolumeId::new(&request.volume_id)?;
        let (slot, claim) = self.disk_volumes.take(&id)?;
        let done = match storage::device(slot) {
            Ok(device) => self.work(&id, &Work::Unmount { device, target: place(&id) }).await,
            Err(error) => Err(error.into()),
        };
        self.disk_volumes.settle(&id, done.is_err().then_some((slot, claim)));
        done
    }

    /// Has the program do something, and gives its words if it fails.
    async fn work(&self, id: &VolumeId, work: &Work) -> Result<(), SandboxError> {
        let failed = |reason: String| DiskVolumeError::Failed { volume: id.clone(), reason };
        let begun = || -> io::Result<_> {
            let mut child = Command::new("/proc/self/exe")
                .arg(PROGRAM)
                .arg(serde_json::to_string(work)?)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            let said = child.stdout.take().ok_or_else(|| io::Error::other("it has no output"))?;
            let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
            Ok((pid, FdIo::new(OwnedFd::from(said))?))
        };
        let (pid, said) = begun().map_err(|error| failed(format!("run {PROGRAM}: {error}")))?;
        let child = self.reaper.adopted(Pid::from_raw(pid));
        let mut reason = String::new();
        // What it cannot say its status tells.
        let _ = said.take(ERROR).read_to_string(&mut reason).await;
        match child.wait().await.status {
            0 => Ok(()),
            status if reason.is_empty() => Err(failed(format!("{PROGRAM} ended with {status}")))?,
            _ => Err(failed(reason))?,
        }
    }
}

/// Where a volume is mounted.
fn place(id: &VolumeId) -> PathBuf {
    Path::new(MOUNTS).join(id.as_str())
}

/// Whether the kernel has a file system that is on disks.
fn is_known(name: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.split('\t').collect::<Vec<_>>() == ["", name])
}

/// The program.
pub(crate) fn main(work: Option<OsString>) -> ExitCode {
    let work = work.as_ref().and_then(|work| work.to_str());
    let Some(work) = work.and_then(|work| serde_json::from_str::<Work>(work).ok()) else {
        return ExitCode::from(2);
    };
    let done = match work {
        Work::Mount(mount) => mount.run(),
        Work::Unmount { device, target } => unmount(&device, &target),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            use std::io::Write as _;
            // Without a reader there is nobody to tell.
            let _ = io::stdout().write_all(reason.as_bytes());
            ExitCode::FAILURE
        }
    }
}

impl Mount {
    fn run(&self) -> Result<(), String> {
        let named = |error: io::Error| format!("{}: {error}", self.target.display());
        fs::create_dir_all(&self.target).map_err(named)?;
        let done = self.mount().and_then(|()| {
            let given =
                self.group.filter(|_| self.writable).map_or(Ok(()), |(group, only_once)| {
                    give(&self.target, group, only_once)
                        .map_err(|error| format!("giving its files to group {group}: {error}"))
                });
            if given.is_err() {
                // The error tells more than what this could add.
                let _ = umount2(&self.target, MntFlags::empty());
            }
            given
        });
        if done.is_err() {
            let _ = fs::remove_dir(&self.target);
        }
        done
    }

    fn mount(&self) -> Result<(), String> {
        // Devices of a guest are its containers' only as their specifications say.
        let mut flags = MsFlags::MS_NODEV;
        if !self.writable {
            flags |= MsFlags::MS_RDONLY;
        }
        let mut own = Vec::new();
        for option in &self.options {
            match FLAGS.iter().find(|(name, _)| name == option) {
                Some((_, flag)) => flags |= *flag,
                None => own.push(option.as_str()),
            }
        }
        let (kind, own) = (self.file_system.as_str(), own.join(","));
        mount(Some(&self.device), &self.target, Some(kind), flags, Some(own.as_str())).map_err(
            |error| format!("mount {kind} with options {:?}: {error}", self.options.join(",")),
        )
    }
}

/// Unmounts, and sees to it that the file system is nobody's any more: then all is on the disk.
fn unmount(device: &Path, target: &Path) -> Result<(), String> {
    match umount2(target, MntFlags::empty()) {
        // A former attempt came that far.
        Ok(()) | Err(nix::Error::EINVAL) => {}
        Err(error) => return Err(format!("unmount: {error}")),
    }
    let begun = std::time::Instant::now();
    let disk: File = loop {
        let flags = libc::O_EXCL | libc::O_NONBLOCK;
        match OpenOptions::new().read(true).custom_flags(flags).open(device) {
            Ok(disk) => break disk,
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) || begun.elapsed() > LET_GO => {
                return Err(format!("{} after it was unmounted: {error}", device.display()));
            }
            Err(_) => std::thread::sleep(LOOK_AGAIN),
        }
    };
    disk.sync_all().map_err(|error| format!("write out {}: {error}", device.display()))?;
    fs::remove_dir(target).map_err(|error| format!("{}: {error}", target.display()))
}

/// Gives all files to a group that may read and write them, as the kubelet does for `fsGroup`.
fn give(root: &Path, group: u32, only_once: bool) -> io::Result<()> {
    let meta = fs::symlink_metadata(root)?;
    let wanted = access(&meta);
    if only_once && meta.gid() == group && meta.mode() & wanted == wanted {
        return Ok(());
    }
    give_all(root, group)
}

/// A directory after what is in it: with the root given, all is.
fn give_all(path: &Path, group: u32) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            give_all(&entry?.path(), group)?;
        }
    }
    lchown(path, None, Some(group))?;
    if meta.is_symlink() {
        return Ok(());
    }
    let mode = (meta.mode() | access(&meta)) & 0o7777;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// What a group needs of a file or directory.
fn access(meta: &fs::Metadata) -> u32 {
    if meta.is_dir() { 0o2770 } else { 0o660 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn files_are_given_to_the_group_once_or_always() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let group = nix::unistd::getgid().as_raw();
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "").unwrap();
        std::os::unix::fs::symlink("/nowhere", root.join("link")).unwrap();
        set(&root.join("d/f"), 0o4700);
        set(root, 0o755);
        give(root, group, true).unwrap();
        assert_eq!(mode(root), 0o2775);
        assert_eq!(mode(&root.join("d/f")), 0o4760);
        set(&root.join("d/f"), 0o600);
        give(root, group, true).unwrap();
        assert_eq!(mode(&root.join("d/f")), 0o600, "the root is the group's");
        give(root, group, false).unwrap();
        assert_eq!(mode(&root.join("d/f")), 0o660);
    }

    #[test]
    fn a_mount_that_fails_leaves_nothing_and_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let mount = Mount {
            device: "/nowhere".into(),
            target: directory.path().join("v"),
            file_system: "ext4".to_owned(),
            writable: false,
            options: vec!["noatime".to_owned(), "discard".to_owned()],
            group: None,
        };
        let error = mount.run().unwrap_err();
        assert!(error.contains("ext4") && error.contains("noatime,discard"), "{error}");
        assert!(!mount.target.exists());
        assert!(is_known("ext4") || !is_known("nodev"), "a name, not a mark");
    }

    #[test]
    fn a_volume_is_mounted_once() {
        let volumes = DiskVolumes::default();
        let id = VolumeId::new("v").unwrap();
        volumes.reserve(&id).unwrap();
        assert!(matches!(volumes.reserve(&id), Err(SandboxError::Exists { .. })));
        assert!(volumes.take(&id).is_err(), "it is being mounted");
        volumes.settle(&id, None);
        assert!(volumes.take(&id).is_err());
        volumes.reserve(&id).unwrap();
    }
}
