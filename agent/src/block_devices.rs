//! Disks that a container has as devices (`volumeDevices`), under the numbers that they have in this guest.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use joey_protocol::api;
use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxDeviceType, Spec};

use crate::log::warning;
use crate::storage::{self, StorageError};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";
/// Bytes of a sector as the kernel counts them.
const SECTOR: u64 = 512;

/// Device numbers.
type Numbers = (i64, i64);

/// How many containers have the device of each slot.
#[derive(Debug, Clone, Default)]
pub(crate) struct Users(Arc<Mutex<HashMap<u32, u32>>>);

/// One container's use of its devices, until dropped.
#[derive(Debug)]
pub(crate) struct Use {
    users: Users,
    slots: Vec<u32>,
}

impl Users {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a container's devices. Gives those, too, that others have.
    fn take(&self, devices: &[api::BlockDevice]) -> (Use, Vec<u32>) {
        let mut slots: Vec<u32> = devices.iter().map(|device| device.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        let mut users = self.lock();
        let others = slots.iter().copied().filter(|slot| users.contains_key(slot)).collect();
        slots.iter().for_each(|slot| *users.entry(*slot).or_default() += 1);
        drop(users);
        (Use { users: self.clone(), slots }, others)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut users = self.users.lock();
        for slot in &self.slots {
            if let Some(count) = users.get_mut(slot) {
                *count -= 1;
            }
        }
        users.retain(|_, count| *count > 0);
    }
}

/// Sees to it that the disks have their sizes, and puts their numbers for the host's into the specification.
/// They are the container's for as long as the result is there.
pub(crate) fn name(
    spec: &mut Spec,
    devices: &[api::BlockDevice],
    users: &Users,
) -> Result<Use, StorageError> {
    let (taken, others) = users.take(devices);
    let mut numbers = HashMap::new();
    for device in devices {
        let number = find(device, others.contains(&device.slot))?;
        numbers.insert((device.major, device.minor), number);
    }
    let Some(mut linux) = spec.linux().clone() else { return Ok(taken) };
    let new = |typ: LinuxDeviceType, old: Numbers| {
        numbers.get(&old).copied().filter(|_| typ == LinuxDeviceType::B)
    };
    let mut nodes = linux.devices().clone().unwrap_or_default();
    for node in &mut nodes {
        if let Some((major, minor)) = new(node.typ(), (node.major(), node.minor())) {
            node.set_major(major).set_minor(minor);
        }
    }
    linux.set_devices(Some(nodes));
    if let Some(mut resources) = linux.resources().clone() {
        let mut rules = resources.devices().clone().unwrap_or_default();
        for rule in &mut rules {
            let old = rule.major().zip(rule.minor());
            let typ = rule.typ().unwrap_or_default();
            if let Some((major, minor)) = old.and_then(|old| new(typ, old)) {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
    }
    spec.set_linux(Some(linux));
    Ok(taken)
}

/// The device's numbers in this guest. One that another container has is left as it is: for a new look at its
/// size the driver would have to let go of it, under whoever uses it.
pub(crate) fn find(wanted: &api::BlockDevice, in_use: bool) -> Result<Numbers, StorageError> {
    let slot = wanted.slot;
    let device = storage::device(slot)?;
    let failed = |source| StorageError::Device { slot, device: device.clone(), source };
    let known = Path::new("/sys/block").join(device.file_name().unwrap_or_default());
    let size = || fs::read_to_string(known.join("size"));
    let fits = |text: &str| text.trim().parse() == Ok(wanted.bytes / SECTOR);
    let before = size().map_err(failed)?;
    if !fits(&before) && in_use {
        let (device, before, bytes) = (device.display(), before.trim(), wanted.bytes);
        warning!(
            "{device} has {before} sectors of {SECTOR} bytes in place of {bytes} bytes: it is in use, \
             and grows when no container has it"
        );
    } else if !fits(&before) {
        probe_again(&known).map_err(failed)?;
        let now = size().map_err(failed)?;
        if !fits(&now) {
            let (now, bytes) = (now.trim(), wanted.bytes);
            let what = format!("it has {now} sectors of {SECTOR} bytes in place of {bytes} bytes");
            return Err(failed(io::Error::other(what)));
        }
    }
    let number = fs::metadata(&device).map_err(failed)?.rdev();
    Ok((major(number).cast_signed(), minor(number).cast_signed()))
}

/// Lets the driver look at the device anew: nobody tells a guest that a slot is not empty any more.
fn probe_again(block: &Path) -> io::Result<()> {
    let device = fs::read_link(block.join("device"))?;
    let name = device.file_name().unwrap_or_default().as_encoded_bytes();
    for action in ["unbind", "bind"] {
        fs::write(Path::new(DRIVER).join(action), name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_changes_without_devices_and_no_slot_is_beyond_the_machine() {
        let mut spec = Spec::default();
        let before = spec.clone();
        let users = Users::default();
        name(&mut spec, &[], &users).unwrap();
        assert_eq!(
            spec.linux().as_ref().unwrap().namespaces(),
            before.linux().as_ref().unwrap().namespaces()
        );
        let device = api::BlockDevice { slot: 99, ..Default::default() };
        assert!(name(&mut spec, &[device], &users).is_err());
        assert!(users.lock().is_empty());
    }

    #[test]
    fn a_device_is_in_use_until_its_last_container_is_gone() {
        let users = Users::default();
        let device = |slot| api::BlockDevice { slot, ..Default::default() };
        // One device may have two names in a container.
        let (first, others) = users.take(&[device(4), device(4), device(5)]);
        assert_eq!(others, [0; 0]);
        let (second, others) = users.take(&[device(5), device(6)]);
        assert_eq!(others, [5]);
        drop(first);
        assert_eq!(users.take(&[device(4)]).1, [0; 0]);
        assert_eq!(users.take(&[device(5)]).1, [5]);
        drop(second);
        assert_eq!(users.take(&[device(5)]).1, [0; 0]);
    }
}
