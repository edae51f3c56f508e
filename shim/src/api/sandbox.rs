//! containerd's Sandbox service (2.x with `sandboxer = "shim"`): the sandbox without a pause image.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use ttrpc::Result as TtrpcResult;
use ttrpc::r#async::{Service, TtrpcContext};

use super::convert::timestamp;
use super::errors::{invalid, to_rpc};
use super::{metrics, pod_config};
use crate::sandbox::Handle;

/// The Sandbox service of one sandbox.
struct SandboxService(Handle);

/// The service to register.
#[must_use]
pub fn services(sandbox: &Handle) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService(sandbox.clone())))
}

impl SandboxService {
    fn check(&self, id: &str) -> TtrpcResult<()> {
        if id == self.0.id() {
            return Ok(());
        }
        Err(invalid(format!("sandbox_id: {id:?}, but this shim serves {:?}", self.0.id())))
    }
}

/// The pod's configuration, which containerd passes as options.
fn decode(options: Option<&Any>) -> TtrpcResult<pod_config::PodConfig> {
    options.map_or_else(
        || Ok(pod_config::PodConfig::default()),
        |any| pod_config::decode(&any.value).map_err(|error| invalid(format!("options: {error}"))),
    )
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> TtrpcResult<CreateSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let pod = decode(request.options.as_ref())?;
        let mut wanted = pod.into_request();
        wanted.netns = (!request.netns_path.is_empty()).then(|| PathBuf::from(request.netns_path));
        wanted.annotations.extend(request.annotations);
        self.0.create_sandbox(wanted).await.map_err(to_rpc)?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> TtrpcResult<StartSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let (pid, created_at) = self.0.start_sandbox().await.map_err(to_rpc)?;
        Ok(StartSandboxResponse { pid, created_at: timestamp(created_at), ..Default::default() })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> TtrpcResult<PlatformResponse> {
        self.check(&request.sandbox_id)?;
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> TtrpcResult<StopSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let sandbox = self.0.clone();
        super::to_the_end(async move { sandbox.stop_sandbox().await }).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> TtrpcResult<WaitSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let exit = self.0.wait_sandbox().await.map_err(to_rpc)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> TtrpcResult<SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let status = self.0.sandbox_status();
        let mut response = SandboxStatusResponse::new();
        response.sandbox_id = request.sandbox_id;
        response.pid = status.pid;
        // containerd's CRI compares with these names of the CRI states.
        response.state = if status.ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.to_owned();
        response.created_at = timestamp(status.created_at);
        if let Some(at) = status.exited_at {
            response.exited_at = timestamp(at);
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> TtrpcResult<PingResponse> {
        self.check(&request.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> TtrpcResult<ShutdownSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let sandbox = self.0.clone();
        super::to_the_end(async move { sandbox.shutdown_sandbox().await }).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> TtrpcResult<SandboxMetricsResponse> {
        self.check(&request.sandbox_id)?;
        let stats = self.0.sandbox_stats().await.map_err(to_rpc)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = request.sandbox_id;
        metric.timestamp = timestamp(SystemTime::now());
        metric.data = MessageField::some(metrics::pack(&stats)?);
        Ok(response)
    }
}
