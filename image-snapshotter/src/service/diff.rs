//! containerd's Diff service: layers into the store. What is not ours is left to the next differ.

use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, async_trait};

use super::api::services::diff::v1::diff_server::Diff;
use super::api::services::diff::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use super::api::types::{Descriptor, Mount};
use super::apply::Applier;
use super::{DISK_OPTION, MOUNT_TYPE, SNAPSHOT_OPTION};

/// Media type of an uncompressed layer (OCI image specification).
const UNCOMPRESSED: &str = "application/vnd.oci.image.layer.v1.tar";

/// The service.
#[derive(Debug)]
pub struct Differ {
    /// Does the work.
    pub applier: Applier,
}

#[async_trait]
impl Diff for Differ {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let namespace = request.metadata().get("containerd-namespace").cloned();
        let namespace = namespace.unwrap_or_else(|| MetadataValue::from_static("default"));
        let request = request.into_inner();
        if let Some(disk) = option(&request.mounts, DISK_OPTION) {
            return Err(Status::failed_precondition(format!(
                "joey-snapshotter: mount {DISK_OPTION}{disk}: a layer goes into a snapshot that was made \
                 for one (extract-…), not into a container's"
            )));
        }
        let ours = option(&request.mounts, SNAPSHOT_OPTION);
        // By this answer containerd asks the next differ of its list.
        let Some(key) = ours else {
            return Err(Status::unimplemented("not a mount of joey-snapshotter's"));
        };
        let diff = request.diff.ok_or_else(|| Status::invalid_argument("diff: missing"))?;
        if diff.media_type.contains("encrypted") {
            let text = format!("layer {}: {} is not supported", diff.digest, diff.media_type);
            return Err(Status::invalid_argument(text));
        }
        let (digest, bytes) = self.applier.apply(namespace, diff.digest, key.to_owned()).await?;
        let applied = Descriptor {
            media_type: UNCOMPRESSED.to_owned(),
            digest,
            size: i64::try_from(bytes).unwrap_or(i64::MAX),
            ..Descriptor::default()
        };
        Ok(Response::new(ApplyResponse { applied: Some(applied) }))
    }

    /// A container's writes are in its VM, and the host has nothing to compare. Of our own mounts that
    /// is said at once: the next differ would walk them on the host, find nothing, and make an image
    /// without the container's writes. Those of another snapshotter are left to it.
    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let request = request.into_inner();
        for mounts in [&request.left, &request.right] {
            for name in [DISK_OPTION, SNAPSHOT_OPTION] {
                if let Some(value) = option(mounts, name) {
                    return Err(Status::failed_precondition(format!(
                        "joey-snapshotter: mount {name}{value}: a container's changes are inside its \
                         sandbox and cannot be compared on the host"
                    )));
                }
            }
        }
        Err(Status::unimplemented("not a mount of joey-snapshotter's"))
    }
}

/// The value of such an option, which only mounts of ours have.
fn option<'a>(mounts: &'a [Mount], name: &str) -> Option<&'a str> {
    match mounts {
        [mount] if mount.r#type == MOUNT_TYPE => {
            mount.options.iter().find_map(|option| option.strip_prefix(name))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn our_mounts_are_not_compared_by_anybody_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        let applier = Applier::new(store, "/nowhere".into(), 1).unwrap();
        let differ = Differ { applier };
        let mount = |option: &str| {
            vec![Mount {
                r#type: MOUNT_TYPE.to_owned(),
                options: vec!["ro".to_owned(), option.to_owned()],
                ..Mount::default()
            }]
        };
        let cases = [
            ("joey.disk=/d/disk.json", "rbind", tonic::Code::FailedPrecondition),
            ("rbind", "joey.disk=/d/disk.json", tonic::Code::FailedPrecondition),
            ("rbind", "joey.snapshot=k", tonic::Code::FailedPrecondition),
            ("rbind", "rbind", tonic::Code::Unimplemented),
        ];
        for (left, right, code) in cases {
            let request =
                DiffRequest { left: mount(left), right: mount(right), ..DiffRequest::default() };
            let status = differ.diff(Request::new(request)).await.unwrap_err();
            assert_eq!(status.code(), code, "{left}, {right}: {}", status.message());
        }
        for (option, _, code) in [cases[0], cases[3]] {
            let request = ApplyRequest { mounts: mount(option), ..ApplyRequest::default() };
            let status = differ.apply(Request::new(request)).await.unwrap_err();
            assert_eq!(status.code(), code, "{option}: {}", status.message());
        }
    }
}
