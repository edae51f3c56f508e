//! The side that containerd sees: services, events, error codes.

pub mod convert;
pub mod errors;
pub mod events;
pub mod metrics;
pub mod pod_config;
pub mod publisher;
pub mod sandbox;
pub mod task;

use containerd_shim::protos::ttrpc::{Error, Result};

use crate::sandbox::SandboxError;

/// Does `work` to its end even if containerd's deadline ends the request, or containerd goes: a process or
/// a clean-up that is left half-way would never come to its end.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, SandboxError>> + Send + 'static,
) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.map_err(|error| Error::Others(error.to_string()))?.map_err(errors::to_rpc)
}
