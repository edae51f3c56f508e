//! Disks that a container has as devices (`volumeDevices`), under the numbers that they have in this guest.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use joey_protocol::api;
use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxDeviceType, Spec};

use crate::storage::{self, StorageError};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";
/// Bytes of a sector as the kernel counts them.
const SECTOR: u64 = 512;

/// Device numbers.
type Numbers = (i64, i64);

/// Sees to it that the disks have their sizes, and puts their numbers for the host's into the specification.
pub(crate) fn name(spec: &mut Spec, devices: &[api::BlockDevice]) -> Result<(), StorageError> {
    let mut numbers = HashMap::new();
    for device in devices {
        numbers.insert((device.major, device.minor), find(device)?);
    }
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
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
    Ok(())
}

/// The device's numbers in this guest.
fn find(wanted: &api::BlockDevice) -> Result<Numbers, StorageError> {
    let slot = wanted.slot;
    let device = storage::device(slot)?;
    let failed = |source| StorageError::Device { slot, device: device.clone(), source };
    let known = Path::new("/sys/block").join(device.file_name().unwrap_or_default());
    let size = || fs::read_to_string(known.join("size"));
    let fits = |text: &str| text.trim().parse() == Ok(wanted.bytes / SECTOR);
    if !fits(&size().map_err(failed)?) {
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
        name(&mut spec, &[]).unwrap();
        assert_eq!(
            spec.linux().as_ref().unwrap().namespaces(),
            before.linux().as_ref().unwrap().namespaces()
        );
        let device = api::BlockDevice { slot: 99, ..Default::default() };
        assert!(name(&mut spec, &[device]).is_err());
    }
}
