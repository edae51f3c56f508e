//! The pod's writable disk: container layers and emptyDirs, encrypted under a key that is born here.
//!
//! ```text
//!   /run/joey/disk   ext4, no journal ── dm-crypt (aes-xts, key in this kernel only) ── disk slot ── a
//!     layers/N       a container's writable layer                       nameless file of the host
//!     volumes/ID     an emptyDir
//! ```
//!
//! The host's file is as long as the pod's limit and empty: it is the pod's alone and dies with it. No file
//! system is made at a start. The guest image brings the blocks of a large empty one, as `mkfs.ext4` has
//! made it. Those that lie within the disk are written through the cipher, and the superblock is told of
//! as many block groups as the disk has: each describes itself, and two gibibytes of them at a time keep
//! their tables together, so that any number of them from the first is a whole file system. Blocks that
//! nobody has written read as noise, which ext4 allows for: it knows which parts of its tables were never
//! used.
//!
//! Nothing has to outlast the machine, so there is no journal, no barrier, and an overlay syncs nothing.
//! What is deleted is given back to the host (`discard`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use joey_protocol::api;
use joey_protocol::limits::{MAX_POD_DISK, POD_DISK};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::sync::Mutex as AsyncMutex;

use crate::apart::apart;
use crate::device_mapper::{self, Key};
use crate::log::warning;
use crate::phases::Phases;
use crate::reap::Reaper;
use crate::storage::{self, StorageError};
use crate::sys;

/// Where it is mounted.
const DISK: &str = "/run/joey/disk";
/// Where emptyDirs lie on it.
pub(crate) const VOLUMES: &str = "/run/joey/disk/volumes";
const LAYERS: &str = "/run/joey/disk/layers";
/// Bytes of an ext4 block, and of what the cipher encrypts at once.
pub(crate) const BLOCK: u64 = 4096;
/// An entry of the blank: the block's number and its bytes.
const ENTRY: usize = 8 + BLOCK as usize;
/// Bytes of a block group, of which disks have whole ones.
const GROUP: u64 = 128 << 20;
/// Where the superblock lies in block 0, and in it the numbers of inodes, of blocks and of a group's inodes
/// (`Documentation/filesystems/ext4/super.rst`).
const SUPERBLOCK: usize = 1024;
const INODES: usize = 0;
const BLOCKS: usize = 4;
const INODES_PER_GROUP: usize = 40;
/// What tells the program that removes a layer from the agent.
pub(crate) const REMOVE: &str = "remove-layer";
/// When a deleted container's layer is removed: most often the machine is gone by then.
const LATER: Duration = Duration::from_secs(5);
/// Project ids of layers and emptyDirs begin after ext4's own, 0.
const FIRST_PROJECT: u32 = 1;
const OPTIONS: &str = "discard,noinit_itable,no_prefetch_block_bitmaps,nobarrier,prjquota";

/// The disk.
#[derive(Debug)]
pub(crate) struct PodDisk {
    /// An empty file system's blocks that are not zero: for each its number (u64, little endian) and bytes.
    blank: Vec<u8>,
    /// Bytes that an open one has room for. Held while one is being opened.
    open: AsyncMutex<Option<u64>>,
    made: AtomicU32,
    /// Projects of the emptyDirs.
    volumes: Mutex<Vec<u32>>,
    reaper: Reaper,
}

/// A container's writable layer; its removal begins when this is dropped.
#[derive(Debug)]
pub(crate) struct Layer {
    path: PathBuf,
    project: u32,
    reaper: Reaper,
}

impl PodDisk {
    /// No disk yet.
    pub(crate) fn new(blank: Vec<u8>, reaper: Reaper) -> Self {
        let made = AtomicU32::new(FIRST_PROJECT);
        Self { blank, open: AsyncMutex::default(), made, volumes: Mutex::default(), reaper }
    }

    /// Puts the cipher over the slot of the pod's disk, which is empty yet, for every clone to set its key.
    pub(crate) fn prepare(&self) -> Result<(), StorageError> {
        let device = storage::device(POD_DISK)?;
        let made = new_key().and_then(|key| key.create(POD_DISK, &device, MAX_POD_DISK));
        made.map_err(failed("encrypting it"))
    }

    /// Goes through [`Self::open`] and back, so that clones find what it takes in their memory.
    pub(crate) async fn rehearse(&self, bytes: u64) -> Result<(), StorageError> {
        self.open(bytes).await?;
        Self::close(&mut *self.open.lock().await)
    }

    /// Closes what is open.
    fn close(open: &mut Option<u64>) -> Result<(), StorageError> {
        if open.is_some() {
            umount2(DISK, MntFlags::empty())
                .map_err(|error| failed("closing the former one")(error.into()))?;
            *open = None;
        }
        Ok(())
    }

    /// Makes the disk that is in the slot now the pod's, empty and under a new key, in place of one that was
    /// open before. Nothing may be in use of that one. Its size comes from the host: the kernel may not
    /// have heard yet that the slot is not empty, and as large as one, any more.
    pub(crate) async fn open(&self, bytes: u64) -> Result<Vec<api::Phase>, StorageError> {
        let mut open = self.open.lock().await;
        Self::close(&mut open)?;
        let mut phases = Phases::begin();
        let made = apart(&self.reaper, || self.make(bytes).map_err(|error| error.to_string()));
        let (room, steps) =
            made.await.map_err(failed("opening it in a child"))?.map_err(StorageError::Opening)?;
        *open = Some(room);
        let steps: Vec<_> = steps.iter().map(|(name, took)| (name.as_str(), *took)).collect();
        phases.add(&steps);
        Ok(phases.end())
    }

    /// Makes and mounts it: the bytes that it has room for, and how long the steps took.
    fn make(&self, bytes: u64) -> Result<(u64, Vec<(String, Duration)>), StorageError> {
        let mut phases = Phases::begin();
        new_key().and_then(|key| key.replace(POD_DISK)).map_err(failed("setting its key"))?;
        phases.done("disk-key");
        let mapped = device_mapper::node(POD_DISK);
        self.format(&mapped, bytes / GROUP).map_err(failed("writing an empty file system"))?;
        phases.done("disk-format");
        fs::create_dir_all(DISK).map_err(failed("making the mount point"))?;
        mount(Some(&mapped), DISK, Some("ext4"), MsFlags::MS_NODEV, Some(OPTIONS))
            .map_err(|error| failed("mounting it")(error.into()))?;
        let empty = nix::sys::statvfs::statvfs(DISK)
            .map_err(|error| failed("asking for its size")(error.into()))?;
        for path in [LAYERS, VOLUMES] {
            fs::create_dir(path).map_err(failed("making its directories"))?;
        }
        phases.done("disk-mount");
        let took = |phase: api::Phase| (phase.name, Duration::from_nanos(phase.nanoseconds));
        let room = empty.blocks_free() * empty.fragment_size();
        Ok((room, phases.end().into_iter().map(took).collect()))
    }

    /// Writes an empty file system of so many block groups.
    fn format(&self, disk: &Path, groups: u64) -> io::Result<()> {
        let disk = OpenOptions::new().write(true).open(disk)?;
        for entry in self.blank.chunks_exact(ENTRY) {
            let Some((number, block)) = entry.split_first_chunk() else { continue };
            let at = u64::from_le_bytes(*number) * BLOCK;
            if at == 0 {
                let mut block = block.to_vec();
                resize(&mut block, groups)
                    .ok_or_else(|| io::Error::other("the guest image's blank is not one"))?;
                disk.write_all_at(&block, at)?;
            } else if at < groups * GROUP {
                disk.write_all_at(block, at)?;
            }
        }
        Ok(())
    }

    /// Makes an empty writable layer, which may fill the disk but counts what it uses.
    pub(crate) fn layer(&self) -> Result<Layer, StorageError> {
        let (project, room) = (self.project(), self.room()?);
        let path = Path::new(LAYERS).join(project.to_string());
        let make = || {
            fs::create_dir(&path)?;
            count(&path, project, room)?;
            fs::create_dir(path.join("upper"))?;
            fs::create_dir(path.join("work"))
        };
        let made = make().map_err(failed("making a writable layer"));
        made.map(|()| Layer { path, project, reaper: self.reaper.clone() })
    }

    /// Makes an emptyDir that is still empty count what it uses, and hold no more than its limit; 0: the disk's.
    pub(crate) fn volume(&self, directory: &Path, limit: u64) -> Result<(), StorageError> {
        let (project, room) = (self.project(), self.room()?);
        let most = if limit == 0 { room } else { limit.min(room) };
        count(directory, project, most).map_err(failed("limiting an emptyDir"))?;
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).push(project);
        Ok(())
    }

    /// Bytes and inodes that all emptyDirs use.
    pub(crate) fn volumes_usage(&self) -> (u64, u64) {
        let projects = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let all = projects.iter().map(|&project| usage(project));
        all.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    fn project(&self) -> u32 {
        self.made.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes that the open disk has room for.
    fn room(&self) -> Result<u64, StorageError> {
        let room = self.open.try_lock().ok().and_then(|open| *open);
        room.ok_or_else(|| StorageError::Invalid("the pod's disk is not open".to_owned()))
    }
}

/// Makes a directory of the disk, and what will be in it, a project that may use so much.
fn count(directory: &Path, project: u32, bytes: u64) -> io::Result<()> {
    sys::set_project(File::open(directory)?.as_fd(), project)?;
    sys::limit_project(&device_mapper::node(POD_DISK), project, bytes)
}

/// Bytes and inodes that a project uses; nothing once the disk is gone.
fn usage(project: u32) -> (u64, u64) {
    sys::project_usage(&device_mapper::node(POD_DISK), project).unwrap_or_default()
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> StorageError {
    move |source| StorageError::PodDisk { step, source }
}

fn new_key() -> io::Result<Key> {
    let mut key = Key([0; 64]);
    File::open("/dev/urandom")?.read_exact(&mut key.0)?;
    Ok(key)
}

/// Makes the superblock in block 0 that of a file system of so many block groups.
fn resize(block: &mut [u8], groups: u64) -> Option<()> {
    let superblock = block.get_mut(SUPERBLOCK..)?;
    let field = |at: usize| at..at + 4;
    let per_group = superblock.get(field(INODES_PER_GROUP))?.try_into().ok()?;
    let inodes = groups.checked_mul(u32::from_le_bytes(per_group).into())?;
    for (at, value) in [(INODES, inodes), (BLOCKS, groups.checked_mul(GROUP / BLOCK)?)] {
        let value = u32::try_from(value).ok()?;
        superblock.get_mut(field(at))?.copy_from_slice(&value.to_le_bytes());
    }
    Some(())
}

impl Layer {
    /// Its directory, with `upper` and `work` in it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes and inodes that it uses.
    pub(crate) fn usage(&self) -> (u64, u64) {
        usage(self.project)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        let (path, reaper) = (std::mem::take(&mut self.path), self.reaper.clone());
        tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            // A layer may have millions of files: another process walks them.
            let removal =
                std::process::Command::new("/proc/self/exe").arg(REMOVE).arg(&path).spawn();
            match removal.map(|child| i32::try_from(child.id())) {
                Ok(Ok(pid)) => {
                    reaper.adopted(nix::unistd::Pid::from_raw(pid)).wait().await;
                }
                Ok(Err(_)) => {}
                Err(error) => warning!("removing {}: {error}", path.display()),
            }
        });
    }
}

/// The program that removes a layer.
pub(crate) fn remove(path: Option<std::ffi::OsString>) -> std::process::ExitCode {
    let Some(path) = path.map(PathBuf::from).filter(|path| path.starts_with(LAYERS)) else {
        return std::process::ExitCode::from(2);
    };
    match fs::remove_dir_all(&path) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        // The rehearsal's went with its disk.
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::process::ExitCode::SUCCESS,
        Err(error) => {
            warning!("removing {}: {error}", path.display());
            std::process::ExitCode::FAILURE
        }
    }
}
