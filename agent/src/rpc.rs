//! The calls of `agent.proto`: decode, check, forward, and turn errors into codes.
//!
//! Nothing here decides anything. Codes: INVALID_ARGUMENT for a request that can never work,
//! FAILED_PRECONDITION for one that comes at the wrong time, NOT_FOUND and ALREADY_EXISTS for names,
//! INTERNAL for what failed in the guest.

use std::sync::Arc;

use async_trait::async_trait;
use joey_protocol::{api, limits};
use ttrpc::r#async::TtrpcContext;
use ttrpc::get_status;

use crate::sandbox::{Sandbox, SandboxError};

/// The service; the host is its only client.
pub(crate) struct Service(pub(crate) Arc<Sandbox>);

impl From<SandboxError> for ttrpc::Error {
    fn from(error: SandboxError) -> Self {
        let mut text = error.to_string();
        if text.len() > limits::MAX_ERROR_TEXT {
            let end = (0..=limits::MAX_ERROR_TEXT).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(end.unwrap_or_default());
        }
        ttrpc::Error::RpcStatus(get_status(error.code(), text))
    }
}

fn reply<T>(result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    result.map_err(ttrpc::Error::from)
}

fn done(result: Result<(), SandboxError>) -> ttrpc::Result<api::Empty> {
    reply(result.map(|()| api::Empty::new()))
}

#[async_trait]
impl api::Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: api::HelloRequest,
    ) -> ttrpc::Result<api::HelloResponse> {
        reply(self.0.hello(&request))
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        reply(self.0.start(request))
    }

    async fn rehearse_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        reply(self.0.rehearse(&request))
    }

    async fn open_disk(
        &self,
        _: &TtrpcContext,
        request: api::OpenDiskRequest,
    ) -> ttrpc::Result<api::OpenDiskResponse> {
        let sandbox = Arc::clone(&self.0);
        reply(self.0.to_the_end(async move { sandbox.open_disk(&request).await }).await)
    }

    async fn rehearse_disk(
        &self,
        _: &TtrpcContext,
        request: api::OpenDiskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(async move { sandbox.rehearse_disk(&request).await }).await)
    }

    async fn copy_in(
        &self,
        _: &TtrpcContext,
        request: api::CopyInRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.copy_in(&request))
    }

    async fn update_services(
        &self,
        _: &TtrpcContext,
        request: api::UpdateServicesRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.update_services(&request))
    }

    async fn share_files(
        &self,
        _: &TtrpcContext,
        request: api::ShareFilesRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.share_files(&request))
    }

    async fn mount_volume(
        &self,
        _: &TtrpcContext,
        request: api::MountVolumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.mount_volume(request)).await)
    }

    async fn unmount_volume(
        &self,
        _: &TtrpcContext,
        request: api::UnmountVolumeRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.unmount_volume(request)).await)
    }

    async fn read_file(
        &self,
        _: &TtrpcContext,
        request: api::ReadFileRequest,
    ) -> ttrpc::Result<api::ReadFileResponse> {
        let data = reply(self.0.read_file(&request))?;
        Ok(api::ReadFileResponse { data, ..Default::default() })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let sandbox = Arc::clone(&self.0);
        reply(self.0.to_the_end(sandbox.create_container(request)).await)
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: api::CreateExecRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.create_exec(request)).await)
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let sandbox = Arc::clone(&self.0);
        reply(self.0.to_the_end(sandbox.start_process(request)).await)
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: api::SignalRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.signal(&request).await)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.resize(&request))
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.delete(request)).await)
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.update(request)).await)
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.freeze(request, true)).await)
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let sandbox = Arc::clone(&self.0);
        done(self.0.to_the_end(sandbox.freeze(request, false)).await)
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        reply(self.0.stats(&request).await)
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ProcessesResponse> {
        reply(self.0.processes(&request).await)
    }

    async fn forward(
        &self,
        _: &TtrpcContext,
        request: api::ForwardRequest,
    ) -> ttrpc::Result<api::Empty> {
        done(self.0.forward(&request).await)
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: api::AdjustClockRequest,
    ) -> ttrpc::Result<api::AdjustClockResponse> {
        let wall_clock_ns = reply(self.0.adjust_clock(request.adjust_ns))?;
        Ok(api::AdjustClockResponse { wall_clock_ns, ..Default::default() })
    }
}
