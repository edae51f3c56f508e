//! Which virtio-blk slot serves which container, and what a container's root is made of.
//!
//! The host swaps the back end of a slot under the running guest, so a slot may only be reused when
//! no file system of its former content is mounted, and its cached blocks must be dropped before the
//! next mount reads it. Mounting itself is the container's own process's work, in its own mount
//! namespace: the event loop never waits for a disk. Read-only disks may serve several containers at
//! once.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use joey_protocol::api;
use joey_protocol::ids::VolumeId;
use joey_protocol::limits::DISK_SLOTS;
use serde::{Deserialize, Serialize};

use crate::device_mapper::{self, Verity};
use crate::sys;

/// A file system that a disk may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FileSystem {
    /// A read-only image.
    Erofs,
    /// A disk that may be written.
    Ext4,
}

impl FileSystem {
    /// The kernel's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }
}

/// One disk of a container's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerDisk {
    /// The device node.
    pub(crate) device: PathBuf,
    /// What is on it.
    pub(crate) file_system: FileSystem,
    /// Mounted writable, as the root itself.
    pub(crate) writable: bool,
}

/// What a container's root is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootfsPlan {
    /// Lowest first.
    pub(crate) layers: Vec<LayerDisk>,
    /// Directory of the writable layer on top; none: what is made in the root is not for the container.
    pub(crate) writable: Option<PathBuf>,
    /// Directory of the writable layers at single places of a read-only root.
    pub(crate) scratch: Option<PathBuf>,
    /// Disks that the container's mounts name.
    pub(crate) volumes: Vec<(String, LayerDisk)>,
}

/// Why a container cannot have its root.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// The request contradicts itself or exceeds the machine.
    #[error("root file system: {0}")]
    Invalid(String),
    /// The slot still carries another container's file system.
    #[error(
        "disk slot {slot} ({}) is still mounted; delete the container that uses it first",
        device.display()
    )]
    Busy {
        /// The slot.
        slot: u32,
        /// Its device node.
        device: PathBuf,
    },
    /// The device does not open, or its cache cannot be dropped.
    #[error("disk slot {slot} ({}): {source}", device.display())]
    Device {
        /// The slot.
        slot: u32,
        /// Its device node.
        device: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The pod's writable disk cannot be used.
    #[error("the pod's writable disk: {step}: {source}")]
    PodDisk {
        /// What failed.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The same, as the child that was to open it says.
    #[error("{0}")]
    Opening(String),
}

/// Slots in use, each with the number of containers on it.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    users: HashMap<u32, u32>,
    /// Those that have carried a file system before.
    used: HashSet<u32>,
    /// Those with a device over them. It stays when nobody uses it any more: taking it away costs 50 ms,
    /// and what is cached of it is as good for the next container of the same image.
    mapped: HashMap<u32, Verity>,
}

/// Devices of slots: /dev/vda is slot 0.
pub(crate) fn device(slot: u32) -> Result<PathBuf, StorageError> {
    match u8::try_from(slot) {
        Ok(slot) if u32::from(slot) < DISK_SLOTS => {
            Ok(PathBuf::from(format!("/dev/vd{}", char::from(b'a' + slot))))
        }
        _ => Err(StorageError::Invalid(format!(
            "disk slot {slot} is not one of the machine's {DISK_SLOTS}"
        ))),
    }
}

/// How many disk slots the machine has.
pub(crate) fn count_slots() -> u32 {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return 0;
    };
    let disks = entries.flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(b"vd"));
    u32::try_from(disks.count()).unwrap_or(u32::MAX)
}

/// Checks the request, purely. The writable layer is still to be made.
pub(crate) fn plan(
    rootfs: &api::Rootfs,
    volumes: &[api::DiskVolume],
) -> Result<RootfsPlan, StorageError> {
    let invalid = |problem: String| Err(StorageError::Invalid(problem));
    if rootfs.layers.is_empty() {
        return invalid("it has no disk".to_owned());
    }
    let mut layers = Vec::with_capacity(rootfs.layers.len());
    for disk in &rootfs.layers {
        let layer = layer(disk)?;
        if layer.writable && rootfs.layers.len() > 1 {
            return invalid(format!("slot {} cannot be written: not a single ext4", disk.slot));
        }
        if layers.iter().any(|known: &LayerDisk| known.device == layer.device) {
            return invalid(format!("slot {} is named twice", disk.slot));
        }
        layers.push(layer);
    }
    let named = |volume: &api::DiskVolume| {
        let name = VolumeId::new(&volume.name);
        let name = name.map_err(|error| StorageError::Invalid(error.to_string()))?;
        Ok((name.to_string(), layer(volume.disk.get_or_default())?))
    };
    let volumes = volumes.iter().map(named).collect::<Result<_, _>>()?;
    Ok(RootfsPlan { layers, writable: None, scratch: None, volumes })
}

fn layer(disk: &api::Disk) -> Result<LayerDisk, StorageError> {
    let invalid = |problem: String| Err(StorageError::Invalid(problem));
    let file_system = match disk.file_system.as_str() {
        "erofs" => FileSystem::Erofs,
        "ext4" => FileSystem::Ext4,
        other => return invalid(format!("{other:?} is not a supported file system")),
    };
    if disk.writable && file_system == FileSystem::Erofs {
        return invalid(format!("slot {} cannot be written: not a single ext4", disk.slot));
    }
    let device = device(disk.slot)?;
    let device = match verity(disk)? {
        Some(_) => device_mapper::node(disk.slot),
        None => device,
    };
    Ok(LayerDisk { device, file_system, writable: disk.writable })
}

/// How a disk is checked, if it is.
fn verity(disk: &api::Disk) -> Result<Option<Verity>, StorageError> {
    let Some(verity) = disk.verity.as_ref() else { return Ok(None) };
    let invalid = |problem: String| StorageError::Invalid(format!("slot {}: {problem}", disk.slot));
    if disk.writable {
        return Err(invalid("a disk under dm-verity cannot be written".to_owned()));
    }
    let root_hash =
        verity.root_hash.as_slice().try_into().map_err(|_| {
            invalid(format!("a root hash of {} bytes, not 32", verity.root_hash.len()))
        })?;
    if verity.data_blocks == 0 || verity.data_blocks > u64::from(u32::MAX) {
        return Err(invalid(format!("{} data blocks", verity.data_blocks)));
    }
    Ok(Some(Verity { root_hash, data_blocks: verity.data_blocks }))
}

/// The sandbox's slots.
pub(crate) type SharedSlots = Arc<Mutex<Slots>>;

/// One container's use of its slots, until dropped: when the container's mounts are gone.
#[derive(Debug)]
pub(crate) struct SlotClaim {
    slots: SharedSlots,
    taken: Vec<u32>,
}

impl SlotClaim {
    /// Takes the slots of a container's root and volumes.
    pub(crate) fn take(slots: &SharedSlots, disks: &[&api::Disk]) -> Result<Self, StorageError> {
        slots.lock().unwrap_or_else(PoisonError::into_inner).take(disks)?;
        let taken = disks.iter().map(|disk| disk.slot).collect();
        Ok(Self { slots: Arc::clone(slots), taken })
    }
}

/// Takes back what the rehearsal made of its slots, so that the pod's first disk finds nothing to remove.
pub(crate) fn vacate(slots: &SharedSlots) -> Result<(), StorageError> {
    slots.lock().unwrap_or_else(PoisonError::into_inner).vacate()
}

impl Drop for SlotClaim {
    fn drop(&mut self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).give_back(&self.taken);
    }
}

impl Slots {
    /// Takes slots for one container.
    fn take(&mut self, disks: &[&api::Disk]) -> Result<(), StorageError> {
        let taken = disks.iter().map(|disk| disk.slot);
        for (index, disk) in disks.iter().enumerate() {
            if let Err(error) = self.take_one(disk) {
                self.give_back(&taken.take(index).collect::<Vec<_>>());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes a slot; its first user drops what is cached of a former disk and maps the new one.
    fn take_one(&mut self, disk: &api::Disk) -> Result<(), StorageError> {
        let slot = disk.slot;
        let device = device(slot)?;
        match self.users.get_mut(&slot) {
            Some(_) if disk.writable => return Err(StorageError::Busy { slot, device }),
            Some(users) => {
                *users += 1;
                return Ok(());
            }
            None => {}
        }
        let verity = verity(disk)?;
        if verity.is_none() || self.mapped.get(&slot) != verity.as_ref() {
            self.change(slot, device, verity)?;
        }
        self.users.insert(slot, 1);
        self.used.insert(slot);
        Ok(())
    }

    /// Makes a slot serve another disk than before.
    fn change(
        &mut self,
        slot: u32,
        device: PathBuf,
        verity: Option<Verity>,
    ) -> Result<(), StorageError> {
        if self.mapped.contains_key(&slot) {
            device_mapper::remove(slot).map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => StorageError::Busy { slot, device: device.clone() },
                _ => StorageError::Device { slot, device: device.clone(), source },
            })?;
            self.mapped.remove(&slot);
        }
        if self.used.contains(&slot) {
            refresh(slot, &device)?;
        }
        if let Some(verity) = verity {
            let made = verity.create(slot, &device);
            made.map_err(|source| StorageError::Device { slot, device, source })?;
            self.mapped.insert(slot, verity);
        }
        Ok(())
    }

    /// Takes the devices away from slots that nobody uses, and what is cached of their disks: as if they had
    /// never been used.
    fn vacate(&mut self) -> Result<(), StorageError> {
        let unused = self.used.iter().copied().filter(|slot| !self.users.contains_key(slot));
        for slot in unused.collect::<Vec<_>>() {
            self.change(slot, device(slot)?, None)?;
            self.used.remove(&slot);
        }
        Ok(())
    }

    /// Gives them back, when the container's mounts are gone.
    fn give_back(&mut self, slots: &[u32]) {
        for slot in slots {
            if let Some(users) = self.users.get_mut(slot) {
                *users -= 1;
                if *users == 0 {
                    self.users.remove(slot);
                }
            }
        }
    }
}

/// Drops cached blocks of a slot's former back end. The exclusive open fails while a file system is
/// mounted from it, which would otherwise silently serve the old content.
fn refresh(slot: u32, path: &Path) -> Result<(), StorageError> {
    let device = || path.to_owned();
    let disk: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => StorageError::Busy { slot, device: device() },
            _ => StorageError::Device { slot, device: device(), source },
        })?;
    sys::flush_block_device(disk.as_fd()).map_err(|source| StorageError::Device {
        slot,
        device: device(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rootfs(disks: &[(u32, &str, bool)]) -> api::Rootfs {
        let layers = disks.iter().map(|(slot, kind, writable)| api::Disk {
            slot: *slot,
            file_system: (*kind).to_owned(),
            writable: *writable,
            ..Default::default()
        });
        api::Rootfs { layers: layers.collect(), ..Default::default() }
    }

    #[test]
    fn plans_layers_in_order() {
        let plan = plan(&rootfs(&[(0, "erofs", false), (3, "erofs", false)]), &[]).unwrap();
        let devices: Vec<_> = plan.layers.iter().map(|layer| layer.device.as_path()).collect();
        assert_eq!(devices, [Path::new("/dev/vda"), Path::new("/dev/vdd")]);
    }

    #[test]
    fn refuses_what_no_machine_has() {
        for disks in [
            &[][..],
            &[(DISK_SLOTS, "erofs", false)],
            &[(u32::MAX, "erofs", false)],
            &[(0, "xfs", false)],
            &[(0, "erofs", true)],
            &[(0, "ext4", true), (1, "erofs", false)],
            &[(0, "erofs", false), (0, "erofs", false)],
        ] {
            assert!(plan(&rootfs(disks), &[]).is_err(), "{disks:?}");
        }
    }

    #[test]
    fn slots_are_counted() {
        let mut slots = Slots::default();
        slots.users.insert(0, 2);
        slots.give_back(&[0]);
        assert_eq!(slots.users.get(&0), Some(&1));
        slots.give_back(&[0, 5]);
        assert!(slots.users.is_empty());
    }
}
