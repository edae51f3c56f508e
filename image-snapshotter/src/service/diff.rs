//! containerd's Diff service: layers into the store. What is not ours is left to the next differ.

use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, async_trait};

use super::api::services::diff::v1::diff_server::Diff;
use super::api::services::diff::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use super::api::types::Descriptor;
use super::apply::Applier;
use super::{MOUNT_TYPE, SNAPSHOT_OPTION};

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
        let ours = match request.mounts.as_slice() {
            [mount] if mount.r#type == MOUNT_TYPE => {
                mount.options.iter().find_map(|option| option.strip_prefix(SNAPSHOT_OPTION))
            }
            _ => None,
        };
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

    /// An image is made of a container by another differ or not at all: a container's writes are in
    /// its VM, and the host has nothing to compare.
    async fn diff(&self, _: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        Err(Status::unimplemented(
            "joey-snapshotter: a container's changes are inside its sandbox and cannot be compared",
        ))
    }
}
