//! The pod's writable disk on the host: a file without a name, sparse and empty.
//!
//! What the guest writes to it is encrypted in the guest. The file is the VMM's alone: it is gone with the
//! VMM's process, however that ends, and so needs no clean-up.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use joey_protocol::api;
use joey_protocol::limits::POD_DISK;

use super::Guest;
use crate::guest::GuestError;
use crate::vmm::{Disk, VmmError};

/// Why the pod has no disk.
#[derive(Debug, thiserror::Error)]
pub enum PodDiskError {
    /// The host's file cannot be made.
    #[error(
        "the pod's writable disk: make a file of {mib} MiB in {directory} (disk_dir): {source}"
    )]
    File {
        /// Where.
        directory: PathBuf,
        /// Its size.
        mib: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The VMM does not take it.
    #[error("the pod's writable disk: {0}")]
    Attach(#[from] VmmError),
    /// The guest does not take it.
    #[error("the pod's writable disk: {0}")]
    Guest(#[from] GuestError),
}

/// The disk that a machine has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PodDisk {
    mib: u64,
}

impl PodDisk {
    /// Gives the guest a disk of this size, empty, in place of `former`.
    pub(crate) async fn open(
        guest: &Guest,
        directory: &Path,
        mib: u64,
        former: Option<Self>,
    ) -> Result<(Self, Vec<api::Phase>), PodDiskError> {
        let bytes = mib << 20;
        if former.is_some() {
            // What there was of it, an empty file system, is noise under the next key.
            guest.vm.resize_disk(POD_DISK, bytes).await?;
        } else {
            let file = nameless(directory, bytes).map_err(|source| {
                let directory = directory.to_owned();
                PodDiskError::File { directory, mib, source }
            })?;
            let disk = Disk { ephemeral: true, ..Disk::from(file) };
            guest.vm.attach_disk(POD_DISK, &disk, false).await?;
        }
        let request = api::OpenDiskRequest { bytes, ..Default::default() };
        let opened = guest.client.open_disk(&request).await?;
        Ok((Self { mib }, opened.phases))
    }

    /// Its size.
    pub(crate) fn mib(self) -> u64 {
        self.mib
    }
}

fn nameless(directory: &Path, bytes: u64) -> io::Result<OwnedFd> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(directory)?;
    file.set_len(bytes)?;
    Ok(file.into())
}
