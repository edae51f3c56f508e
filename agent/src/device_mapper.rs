//! Devices of the kernel's device mapper, by its control device (`linux/dm-ioctl.h`, interface 4).
//!
//! A device `dm-N` is made over disk slot N and is opened where the disk would be. There is no udev:
//! the kernel makes the node itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use crate::sys;

const CONTROL: &str = "/dev/mapper/control";
/// Version of the interface, of which only the first number has to fit.
const VERSION: [u32; 3] = [4, 0, 0];
/// Bytes of `struct dm_ioctl`.
const HEADER: usize = 312;
/// Bytes of `struct dm_target_spec`.
const TARGET: usize = 40;
/// Room for a target's parameters.
const PARAMETERS: usize = 512;

const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;
const TARGET_MESSAGE: u8 = 14;

const READ_ONLY: u32 = 1 << 0;
/// Suspend, where the call without it resumes.
const SUSPEND: u32 = 1 << 1;
/// There is nothing that a suspended device would have to wait for.
const SKIP_FREEZE: u32 = 1 << 10;
/// The kernel forgets its copy of the parameters.
const SECURE_DATA: u32 = 1 << 15;
/// The device's number is the caller's choice.
const PERSISTENT_DEV: u32 = 1 << 3;

/// dm-verity's parameters for a disk whose hash tree comes right after its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verity {
    /// SHA-256 of the tree's root block.
    pub(crate) root_hash: [u8; 32],
    /// Blocks of 4096 bytes before the tree.
    pub(crate) data_blocks: u64,
}

/// The key of dm-crypt's device over a disk: AES-256 in XTS mode.
pub(crate) struct Key(pub(crate) [u8; 64]);

impl Key {
    /// `Documentation/admin-guide/device-mapper/dm-crypt.rst`. The work is done where the request is made:
    /// there are few processors, and no other's cache is warmer.
    fn parameters(&self, disk: &Path) -> String {
        let (disk, key) = (disk.display(), hex(&self.0));
        format!(
            "aes-xts-plain64 {key} 0 {disk} 0 4 allow_discards sector_size:4096 no_read_workqueue \
             no_write_workqueue"
        )
    }

    /// Makes the device over `bytes` of `disk`, which is in `slot`.
    pub(crate) fn create(&self, slot: u32, disk: &Path, bytes: u64) -> io::Result<()> {
        let sectors = bytes / 4096 * 8;
        create(slot, SECURE_DATA, &target("crypt", sectors, &self.parameters(disk)))
    }

    /// Puts this key in the place of the one that the device had, which nobody may have open.
    pub(crate) fn replace(&self, slot: u32) -> io::Result<()> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        // `struct dm_target_msg`: the sector that the target is found by, and the text.
        let mut message = 0_u64.to_ne_bytes().to_vec();
        message.extend_from_slice(format!("key set {}\0", hex(&self.0)).as_bytes());
        call(&control, DEV_SUSPEND, slot, SUSPEND | SKIP_FREEZE, &[])?;
        let set = call(&control, TARGET_MESSAGE, slot, SECURE_DATA, &message);
        call(&control, DEV_SUSPEND, slot, 0, &[]).and(set)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // What the kernel knows is enough; `black_box` keeps this from being optimised away.
        self.0 = [0; 64];
        std::hint::black_box(&self.0);
    }
}

/// The node of the device over this slot.
pub(crate) fn node(slot: u32) -> PathBuf {
    PathBuf::from(format!("/dev/dm-{slot}"))
}

fn name(slot: u32) -> String {
    format!("slot{slot}")
}

/// One call: the header, and for a table the target behind it.
fn call(control: &File, request: u8, slot: u32, flags: u32, target: &[u8]) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(HEADER + target.len());
    for number in VERSION {
        buffer.extend_from_slice(&number.to_ne_bytes());
    }
    let size = u32::try_from(HEADER + target.len()).unwrap_or(u32::MAX);
    let start = u32::try_from(HEADER).unwrap_or(u32::MAX);
    // data_size, data_start, target_count, open_count, flags, event_nr, padding
    for number in [size, start, u32::from(!target.is_empty()), 0, flags, 0, 0] {
        buffer.extend_from_slice(&number.to_ne_bytes());
    }
    let device = if flags & PERSISTENT_DEV == 0 { 0 } else { u64::from(slot) };
    buffer.extend_from_slice(&device.to_ne_bytes());
    buffer.extend_from_slice(name(slot).as_bytes());
    buffer.resize(HEADER, 0);
    buffer.extend_from_slice(target);
    sys::device_mapper(control.as_fd(), request, &mut buffer)
}

/// `struct dm_target_spec` and its parameters, for a device of one target.
fn target(kind: &str, sectors: u64, parameters: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TARGET + PARAMETERS);
    bytes.extend_from_slice(&0_u64.to_ne_bytes());
    bytes.extend_from_slice(&sectors.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(kind.as_bytes());
    bytes.resize(TARGET, 0);
    bytes.extend_from_slice(parameters.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

impl Verity {
    /// `Documentation/admin-guide/device-mapper/verity.rst`: version, data device, hash device, their
    /// block sizes, data blocks, the tree's first block, algorithm, root, no salt.
    fn parameters(&self, disk: &Path) -> String {
        let (disk, blocks) = (disk.display(), self.data_blocks);
        let root = hex(&self.root_hash);
        format!("1 {disk} {disk} 4096 4096 {blocks} {blocks} sha256 {root} -")
    }

    /// Makes the device over `disk`, which is in `slot`.
    pub(crate) fn create(&self, slot: u32, disk: &Path) -> io::Result<()> {
        let sectors = self.data_blocks.saturating_mul(8);
        create(slot, READ_ONLY, &target("verity", sectors, &self.parameters(disk)))
    }
}

/// Makes the device of `slot` with this table.
fn create(slot: u32, flags: u32, table: &[u8]) -> io::Result<()> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    call(&control, DEV_CREATE, slot, PERSISTENT_DEV, &[])?;
    let made = call(&control, TABLE_LOAD, slot, flags, table)
        // Resumes, which puts the table into use.
        .and_then(|()| call(&control, DEV_SUSPEND, slot, flags & READ_ONLY, &[]));
    if made.is_err() {
        let _ = call(&control, DEV_REMOVE, slot, 0, &[]);
    }
    made
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes the device over `slot`, which nobody may have open.
pub(crate) fn remove(slot: u32) -> io::Result<()> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    call(&control, DEV_REMOVE, slot, 0, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_as_the_kernel_reads_them() {
        let verity = Verity { root_hash: [0xab; 32], data_blocks: 128 };
        let text = verity.parameters(Path::new("/dev/vda"));
        let root = "ab".repeat(32);
        assert_eq!(text, format!("1 /dev/vda /dev/vda 4096 4096 128 128 sha256 {root} -"));
        let table = target("verity", 1024, &text);
        assert_eq!(table.len() % 8, 0);
        assert_eq!(table.get(24..31), Some(&b"verity\0"[..]));
        assert_eq!(table.get(TARGET..TARGET + text.len()), Some(text.as_bytes()));
    }
}
