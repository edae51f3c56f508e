//! Small conversions to containerd's messages.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim::protos::api::Status as TaskStatus;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;

use crate::sandbox::state::Status;

/// A point in time.
#[must_use]
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    })
}

/// A process's state in containerd's words, which are fewer.
#[must_use]
pub fn status(status: Status) -> TaskStatus {
    match status {
        Status::Creating | Status::Created | Status::Starting => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    }
}
