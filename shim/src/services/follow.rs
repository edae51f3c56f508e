//! A pod's services into its guest: all of them before its first container starts, then each change.
//!
//! The log is watched, not asked for: while nothing changes nothing is done, and nobody else has to live.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use joey_protocol::api;
use joey_protocol::services::{MAX_PARTS, parts};
use nix::sys::inotify::AddWatchFlags;
use tokio::sync::watch;

use super::log::{self, Reader, SHARED};
use crate::guest::{Client, GuestError};
use crate::volumes::watch::Watches;

/// How often a log is looked at of which there are no notices.
const LOOK: Duration = Duration::from_secs(1);
/// How long a guest that refuses is left alone at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);

/// Why a guest does not have its services.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    /// Nobody has told this node of any.
    #[error(
        "its services are unknown: {0} is not there. `joey network serve` puts it there once services were told \
         (`joey services apply`, or a feeder), after each boot too"
    )]
    Unknown(PathBuf),
    /// The log cannot be read.
    #[error("its services in {path}: {cause}")]
    Read {
        /// The log.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The guest does not take them.
    #[error("its services: {0}")]
    Guest(#[from] GuestError),
}

/// The log that a pod's services come from.
#[derive(Debug)]
pub(crate) struct Source {
    directory: PathBuf,
    own: PathBuf,
    shared: PathBuf,
    /// As far as the guest has it.
    reader: Option<Reader>,
}

impl Source {
    /// The one of this tenant, if there is one.
    pub(crate) fn find(run_dir: &Path, tenant: &str) -> Result<Self, FollowError> {
        let directory = log::directory(run_dir);
        let (own, shared) = (directory.join(log::name(tenant)), directory.join(SHARED));
        let mut source = Self { directory, own, shared, reader: None };
        source.turn()?;
        Ok(source)
    }

    /// The tenant's own log, where it has one.
    fn path(&self) -> &Path {
        if self.own.exists() { &self.own } else { &self.shared }
    }

    /// Turns to the log that counts now, from its beginning if it is another than before.
    fn turn(&mut self) -> Result<&mut Reader, FollowError> {
        let path = self.path().to_owned();
        let is_there = |reader: &Reader| reader.is_at(&path).unwrap_or(false);
        let reader = match self.reader.take().filter(is_there) {
            Some(reader) => reader,
            None => Reader::open(&path).map_err(|cause| match cause.kind() {
                io::ErrorKind::NotFound => FollowError::Unknown(path),
                _ => FollowError::Read { path, cause },
            })?,
        };
        Ok(self.reader.insert(reader))
    }

    /// Brings what is new into the guest.
    pub(crate) async fn carry(&mut self, client: &Client) -> Result<(), FollowError> {
        let outcome = self.send(client).await;
        if outcome.is_err() {
            // What the guest has of it is not known: it gets a table anew.
            self.reader = None;
        }
        outcome
    }

    async fn send(&mut self, client: &Client) -> Result<(), FollowError> {
        let path = self.path().to_owned();
        let reader = self.turn()?;
        let mut message = api::UpdateServicesRequest::new();
        let mut any = false;
        while let Some(record) =
            reader.take().map_err(|cause| FollowError::Read { path: path.clone(), cause })?
        {
            any = true;
            message.generation = record.generation;
            if record.is_base() {
                (message.fronts, message.backends) = (record.fronts, record.backends);
            }
            for part in parts(&record.parts) {
                let (_, bytes) = part.map_err(|error| {
                    let cause = io::Error::new(io::ErrorKind::InvalidData, error);
                    FollowError::Read { path: path.clone(), cause }
                })?;
                if message.parts.len() + bytes.len() > MAX_PARTS {
                    client.update_services(&message).await?;
                    message.parts.clear();
                    (message.fronts, message.backends) = (0, 0);
                }
                message.parts.extend_from_slice(bytes);
            }
        }
        if any {
            message.last = true;
            client.update_services(&message).await?;
        }
        Ok(())
    }
}

/// Carries changes into the guest until it is gone.
pub(crate) async fn follow(mut source: Source, client: Client, watches: Arc<Watches>) {
    let mut pause = AGAIN;
    loop {
        let moved = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        let directory = watches.notices(&source.directory, moved);
        let file = watches.notices(source.path(), AddWatchFlags::IN_MODIFY);
        match source.carry(&client).await {
            Ok(()) => pause = AGAIN,
            Err(FollowError::Guest(error @ GuestError::Lost { .. })) => {
                tracing::debug!(%error, "services not followed: the guest is gone");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "a change of services is not in the guest: tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_AT_MOST);
                continue;
            }
        }
        match (directory, file) {
            (Ok(mut directory), Ok(mut file)) => tokio::select! {
                () = noticed(&mut directory) => {}
                () = noticed(&mut file) => {}
            },
            (Err(error), _) | (_, Err(error)) => {
                tracing::debug!(%error, "no notices of changes of services: they are looked at");
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

/// A change, or the end of notices: then what was watched is gone, which is one.
async fn noticed(notices: &mut watch::Receiver<()>) {
    let _ = notices.changed().await;
}
