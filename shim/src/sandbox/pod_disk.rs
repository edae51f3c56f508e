//! The pod's writable disk on the host: a file without a name, sparse and empty.
//!
//! What the guest writes to it is encrypted in the guest. The file is the VMM's alone: it is gone with the
//! VMM's process, however that ends, and so needs no clean-up.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, ready};
use joey_protocol::api;
use joey_protocol::limits::POD_DISK;

use super::Guest;
use crate::guest::{Client, GuestError};
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
    /// Puts a disk of this size into its slot, empty, in place of `former`. The guest is still to open it.
    pub(crate) async fn attach(
        guest: &Guest,
        directory: &Path,
        mib: u64,
        former: Option<Self>,
    ) -> Result<Self, PodDiskError> {
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
        Ok(Self { mib })
    }

    /// Has the guest put its cipher and an empty file system on it. Says what took how long.
    pub(crate) async fn open(self, client: &Client) -> Result<Vec<api::Phase>, PodDiskError> {
        let request = api::OpenDiskRequest { bytes: self.mib << 20, ..Default::default() };
        Ok(client.open_disk(&request).await?.phases)
    }

    /// Has the guest do that and close the disk again, before the machine is multiplied.
    pub(crate) async fn rehearse(self, client: &Client) -> Result<(), PodDiskError> {
        let request = api::OpenDiskRequest { bytes: self.mib << 20, ..Default::default() };
        Ok(client.rehearse_disk(&request).await?)
    }

    /// Its size.
    pub(crate) fn mib(self) -> u64 {
        self.mib
    }
}

/// What the guest is given beside the sandbox's start, since only containers need it: its disk, its services.
#[derive(Clone)]
pub(crate) struct Opening(Shared<BoxFuture<'static, Result<(), Arc<str>>>>);

impl Opening {
    /// What is there.
    pub(crate) fn done() -> Self {
        Self(ready(Ok(())).boxed().shared())
    }

    /// What goes on even if nobody waits for it.
    pub(crate) fn beside<E: ToString + Send + 'static>(
        opening: impl Future<Output = Result<(), E>> + Send + 'static,
    ) -> Self {
        let opening = tokio::spawn(opening);
        let end = async {
            match opening.await {
                Ok(opened) => opened.map_err(|error| error.to_string().into()),
                Err(error) => Err(error.to_string().into()),
            }
        };
        Self(end.boxed().shared())
    }

    /// Waits until it is there.
    ///
    /// # Errors
    /// Why it is not, each time.
    pub(crate) async fn wait(&self) -> Result<(), Arc<str>> {
        self.0.clone().await
    }
}

/// Makes the file behind a disk, and the directory if it is not there.
///
/// # Errors
/// It cannot be made there.
pub fn nameless(directory: &Path, bytes: u64) -> io::Result<OwnedFd> {
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
