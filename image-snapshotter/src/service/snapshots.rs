//! containerd's Snapshots service over the [`Store`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use joey_image::usage::Usage;
use tonic::{Request, Response, Status, async_trait};

use super::api::services::snapshots::v1::snapshots_server::Snapshots;
use super::api::services::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info, Kind as ApiKind, ListSnapshotsRequest,
    ListSnapshotsResponse, MountsRequest, MountsResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
    UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use super::api::types::{Empty, Mount, Timestamp};
use super::{DISK_OPTION, MOUNT_TYPE, SNAPSHOT_OPTION, blocking};
use crate::filter::Filters;
use crate::store::{Kind, Snapshot, Store, StoreError};

/// Names of snapshots that containerd makes to put a layer into: `extract-…` after its own prefix of
/// namespace and number.
const EXTRACT: &str = "extract-";
/// Label of such snapshots (containerd's unpacker).
const EXTRACT_LABEL: &str = "containerd.io/snapshot.ref";
/// Snapshots in one message of a list.
const PAGE: usize = 100;

/// The service.
#[derive(Debug)]
pub struct Service {
    /// What it serves.
    pub store: Arc<Store>,
    /// Where shims write down what containers have written.
    pub run_dir: PathBuf,
}

/// A snapshot's name without what containerd puts before it: `k8s.io/12/NAME`.
fn own_name(key: &str) -> &str {
    key.splitn(3, '/').last().unwrap_or(key)
}

fn is_extract(key: &str, snapshot: &Snapshot) -> bool {
    snapshot.labels.contains_key(EXTRACT_LABEL) || own_name(key).starts_with(EXTRACT)
}

/// How a snapshot is mounted: on the host hardly at all, in a sandbox by its options.
fn mounts(store: &Store, key: &str) -> Result<Vec<Mount>, StoreError> {
    let snapshot = store.get(key)?;
    let mount = |source: &Path, option: String| {
        let options = ["rbind".to_owned(), "ro".to_owned(), option].to_vec();
        vec![Mount {
            r#type: MOUNT_TYPE.to_owned(),
            source: source.display().to_string(),
            options,
            ..Mount::default()
        }]
    };
    if snapshot.kind == Kind::Active && is_extract(key, &snapshot) {
        return Ok(mount(&store.root().join("unpack"), format!("{SNAPSHOT_OPTION}{key}")));
    }
    let image = match snapshot.kind {
        Kind::Committed => key,
        _ => &snapshot.parent,
    };
    let folder = store.disk(image)?;
    let description = folder.join("disk.json");
    Ok(mount(&folder.join("users"), format!("{DISK_OPTION}{}", description.display())))
}

fn timestamp((seconds, nanos): (u64, u32)) -> Option<Timestamp> {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    Some(Timestamp { seconds, nanos: nanos.cast_signed() })
}

fn info(name: String, snapshot: Snapshot) -> Info {
    Info {
        name,
        parent: snapshot.parent,
        kind: match snapshot.kind {
            Kind::View => ApiKind::View,
            Kind::Active => ApiKind::Active,
            Kind::Committed => ApiKind::Committed,
        }
        .into(),
        created_at: timestamp(snapshot.created),
        updated_at: timestamp(snapshot.updated),
        labels: snapshot.labels.into_iter().collect(),
    }
}

impl Service {
    async fn begin(
        &self,
        key: String,
        parent: String,
        kind: Kind,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let store = Arc::clone(&self.store);
        if key.is_empty() {
            return Err(Status::invalid_argument("key: empty"));
        }
        blocking(move || {
            store.prepare(&key, &parent, kind, labels.into_iter().collect())?;
            mounts(&store, &key).inspect_err(|_| {
                // Nobody knows of it if there is nothing to mount.
                let _ = store.remove(&key);
            })
        })
        .await
    }
}

#[async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.begin(key, parent, Kind::Active, labels).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.begin(key, parent, Kind::View, labels).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<MountsRequest>,
    ) -> Result<Response<MountsResponse>, Status> {
        let (store, key) = (Arc::clone(&self.store), request.into_inner().key);
        let mounts = blocking(move || mounts(&store, &key)).await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<CommitSnapshotRequest>,
    ) -> Result<Response<Empty>, Status> {
        let CommitSnapshotRequest { name, key, labels, .. } = request.into_inner();
        let store = Arc::clone(&self.store);
        blocking(move || store.commit(&key, &name, labels.into_iter().collect())).await?;
        Ok(Response::new(Empty {}))
    }

    async fn remove(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<Empty>, Status> {
        let (store, key) = (Arc::clone(&self.store), request.into_inner().key);
        blocking(move || {
            // A container's own snapshot holds no blobs, so most removals need no search for them.
            let snapshot = store.get(&key)?;
            store.remove(&key)?;
            if snapshot.layer.is_some() { store.collect() } else { Ok(()) }
        })
        .await?;
        Ok(Response::new(Empty {}))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let (store, key) = (Arc::clone(&self.store), request.into_inner().key);
        let info = blocking(move || Ok(info(key.clone(), store.get(&key)?))).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info: given, update_mask, .. } = request.into_inner();
        let given = given.ok_or_else(|| Status::invalid_argument("info: missing"))?;
        let mut only = None;
        for path in update_mask.map(|mask| mask.paths).unwrap_or_default() {
            let labels: &mut Vec<String> = match path.as_str() {
                "labels" => {
                    only = None;
                    break;
                }
                _ => only.get_or_insert_default(),
            };
            let label = path.strip_prefix("labels.").ok_or_else(|| {
                Status::invalid_argument(format!("update_mask: {path:?} cannot be changed"))
            })?;
            labels.push(label.to_owned());
        }
        let store = Arc::clone(&self.store);
        let info = blocking(move || {
            let labels = given.labels.into_iter().collect();
            Ok(info(given.name.clone(), store.label(&given.name, labels, only)?))
        })
        .await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info) }))
    }

    type ListStream =
        Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send + 'static>>;

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters)
            .map_err(|problem| Status::invalid_argument(format!("filters: {problem}")))?;
        let store = Arc::clone(&self.store);
        let all = blocking(move || store.all()).await?;
        let wanted = all.into_iter().filter(|(name, snapshot)| filters.take(name, snapshot));
        let infos: Vec<Info> = wanted.map(|(name, snapshot)| info(name, snapshot)).collect();
        let pages: Vec<_> = infos
            .chunks(PAGE)
            .map(|page| Ok(ListSnapshotsResponse { info: page.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pages))))
    }

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        let (store, key) = (Arc::clone(&self.store), request.into_inner().key);
        let run_dir = self.run_dir.clone();
        let (bytes, inodes) = blocking(move || {
            let (bytes, inodes) = store.usage(&key)?;
            let written = match store.get(&key)?.kind {
                Kind::Active => Usage::find(&run_dir, own_name(&key)),
                _ => Usage::default(),
            };
            Ok((bytes.saturating_add(written.bytes), inodes.saturating_add(written.inodes)))
        })
        .await?;
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: number(bytes), inodes: number(inodes) }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<Empty>, Status> {
        let store = Arc::clone(&self.store);
        blocking(move || store.collect()).await?;
        Ok(Response::new(Empty {}))
    }
}
