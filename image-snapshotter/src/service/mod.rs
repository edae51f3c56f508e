//! containerd's side: its Snapshots and Diff services on one Unix socket.

pub mod apply;
pub mod diff;
pub mod snapshots;

use tonic::{Code, Status};

use crate::store::StoreError;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::expect_used, unused_qualifications)]
pub mod api {
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod services {
        pub mod snapshots {
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
        pub mod diff {
            pub mod v1 {
                tonic::include_proto!("containerd.services.diff.v1");
            }
        }
        pub mod content {
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
    }
}

/// Type of the mounts that this snapshotter gives. On the host it shows a folder with the image's
/// passwd and group files; what the root really is, an option names.
pub const MOUNT_TYPE: &str = "bind";
/// Option of a mount for a container: path of its image's `disk.json`.
pub const DISK_OPTION: &str = "joey.disk=";
/// Option of a mount for a layer to be applied: the snapshot's name.
pub const SNAPSHOT_OPTION: &str = "joey.snapshot=";

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NotFound(_) => Code::NotFound,
            StoreError::Exists(_) => Code::AlreadyExists,
            StoreError::Precondition { .. } => Code::FailedPrecondition,
            StoreError::Layer(_) | StoreError::Database(_) | StoreError::Taken(_) => Code::Internal,
        };
        Self::new(code, format!("joey-snapshotter: {error}"))
    }
}

/// Runs what waits for disks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Status::from),
        Err(error) => Err(Status::internal(format!("joey-snapshotter: {error}"))),
    }
}
