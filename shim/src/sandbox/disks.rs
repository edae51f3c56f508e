//! Which image is in which disk slot of the VM. Containers of a pod with the same image share a slot.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use joey_protocol::limits::POD_DISK;
use tokio::sync::Mutex as AsyncMutex;

use crate::rootfs::Image;
use crate::vmm::qemu::args::slot_is_writable;
use crate::vmm::{Vm, VmmError};

/// Why an image is not attached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// All are in use.
    #[error(
        "all {0} disk slots of the sandbox for {1} are in use: so many different ones a pod can use at once"
    )]
    Full(usize, &'static str),
    /// The VMM refuses.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

#[derive(Debug)]
struct Used {
    key: String,
    users: usize,
    /// What its containers call the image.
    names: Vec<String>,
    /// Whether the operator has been told that it is damaged.
    damaged: bool,
    /// Holds the image's lock for as long as the guest may read it.
    image: Image,
}

/// The slots of one VM, but for that of the pod's own disk.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    used: Mutex<HashMap<u32, Used>>,
    /// One swap at a time, so that two containers do not attach the same image twice.
    swap: AsyncMutex<()>,
}

impl Disks {
    /// Attaches `image`, or counts one more user of the slot that has it. Gives the slot.
    pub(crate) async fn attach(&self, vm: &dyn Vm, image: Image) -> Result<u32, DiskError> {
        let _swap = self.swap.lock().await;
        let slot = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            let same = |slot: &u32| slot_is_writable(*slot) == image.writable;
            let same = used.iter_mut().find(|(slot, used)| same(slot) && used.key == image.key);
            if let Some((slot, used)) = same {
                used.users += 1;
                return Ok(*slot);
            }
            let free =
                |slot: &u32| slot_is_writable(*slot) == image.writable && !used.contains_key(slot);
            (0..POD_DISK).find(free).ok_or_else(|| {
                let what = if image.writable { "volumes on disks" } else { "images" };
                let of_kind = |slot: &u32| slot_is_writable(*slot) == image.writable;
                DiskError::Full((0..POD_DISK).filter(of_kind).count(), what)
            })?
        };
        vm.attach_disk(slot, &image.disk, !image.writable).await?;
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let (key, names) = (image.key.clone(), Vec::new());
        used.insert(slot, Used { key, users: 1, names, damaged: false, image });
        Ok(slot)
    }

    /// Notes what a container calls the image in a slot.
    pub(crate) fn name(&self, slot: u32, name: &str) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let names = used.get_mut(&slot).map(|used| &mut used.names);
        if let Some(names) = names.filter(|names| !names.iter().any(|known| known == name)) {
            names.push(name.to_owned());
        }
    }

    /// Notes that the disk in a slot is damaged. Gives the description of its image and the image's names the first
    /// time.
    pub(crate) fn damaged(&self, slot: u32) -> Option<(PathBuf, String)> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let used = used.get_mut(&slot)?;
        if std::mem::replace(&mut used.damaged, true) {
            return None;
        }
        Some((used.image.description.clone()?, used.names.join(", ")))
    }

    /// Whether the disk in a slot is known to be damaged.
    pub(crate) fn is_damaged(&self, slot: u32) -> bool {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.get(&slot).is_some_and(|used| used.damaged)
    }

    /// Gives a user's claim back; the last one detaches the image.
    pub(crate) async fn release(&self, vm: &dyn Vm, slot: u32) {
        let _swap = self.swap.lock().await;
        {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(entry) = used.get_mut(&slot) else { return };
            entry.users -= 1;
            if entry.users > 0 {
                return;
            }
        }
        // The slot stays taken if QEMU does not let go: it must not show another image's bytes.
        match vm.detach_disk(slot).await {
            Ok(()) => {
                self.used.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
            }
            Err(error) => tracing::warn!(slot, %error, "disk not detached"),
        }
    }
}
