//! containerd's Task service: decode, check, forward, encode.
//!
//! Versions 2 and 3 differ by the service's name only, so one implementation is registered twice.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim_async::{Task, create_task};
use containerd_shim::protos::ttrpc::Result as TtrpcResult;
use containerd_shim::protos::ttrpc::r#async::{Service, TtrpcContext};

use super::convert::{status, timestamp};
use super::errors::{invalid, to_rpc, unimplemented};
use super::{metrics, to_the_end};
use crate::sandbox::{CreateTask, ExecTask, Handle, StdioPaths};

const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";
/// How containerd's type registry names an OCI process (Exec).
const PROCESS: &str = "opencontainers/runtime-spec/1/Process";
/// How it names OCI Linux resources (Update).
const RESOURCES: &str = "opencontainers/runtime-spec/1/LinuxResources";

/// The Task service of one sandbox.
pub struct TaskService {
    sandbox: Handle,
    version: &'static str,
}

/// The services to register: the same Task service under both of its names.
#[must_use]
pub fn services(sandbox: &Handle) -> HashMap<String, Service> {
    let make = |version| -> HashMap<String, Service> {
        create_task(Arc::new(TaskService { sandbox: sandbox.clone(), version }))
    };
    let mut services = make("3");
    if let Some(service) = make("2").remove(V3) {
        services.insert(V2.to_owned(), service);
    }
    services
}

/// Checks that `any` carries the JSON message `name` and gives its bytes.
fn json<'a>(field: &'static str, any: &'a MessageField<Any>, name: &str) -> TtrpcResult<&'a [u8]> {
    match any.as_ref() {
        Some(any) if any.type_url.ends_with(name) => Ok(&any.value),
        Some(any) => Err(invalid(format!("{field}: type {:?}, expected …/{name}", any.type_url))),
        None => Err(invalid(format!("{field}: missing"))),
    }
}

/// `None` for the empty string: the container's first process.
fn exec(id: &str) -> Option<&str> {
    (!id.is_empty()).then_some(id)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> TtrpcResult<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(unimplemented(format!(
                "container {}: restoring a checkpoint ({:?}) is not supported",
                request.id, request.checkpoint
            )));
        }
        let task = CreateTask {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs,
            stdio: StdioPaths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
        };
        let sandbox = self.sandbox.clone();
        let create = async move { sandbox.with_reason(sandbox.create(task).await).await };
        let pid = to_the_end(create).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        let sandbox = self.sandbox.clone();
        let start = async move {
            let started = sandbox.start(&request.id, exec(&request.exec_id)).await;
            sandbox.with_reason(started).await
        };
        let pid = to_the_end(start).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> TtrpcResult<Empty> {
        let process = json("spec", &request.spec, PROCESS)?.to_vec();
        let task = ExecTask {
            id: request.id,
            exec_id: request.exec_id,
            process,
            stdio: StdioPaths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
        };
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.with_reason(sandbox.exec(task).await).await }).await?;
        Ok(Empty::default())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> TtrpcResult<StateResponse> {
        let state =
            self.sandbox.state(&request.id, exec(&request.exec_id)).await.map_err(to_rpc)?;
        let mut response = StateResponse::new();
        response.id = request.id;
        response.exec_id = request.exec_id;
        response.bundle = state.bundle.to_string_lossy().into_owned();
        response.pid = state.pid;
        response.status = status(state.status).into();
        response.stdin = state.stdio.stdin;
        response.stdout = state.stdio.stdout;
        response.stderr = state.stdio.stderr;
        response.terminal = state.stdio.terminal;
        if let Some(exit) = state.exit {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exit = self.sandbox.wait(&request.id, exec(&request.exec_id)).await.map_err(to_rpc)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        let kill = async move {
            let (id, exec) = (&request.id, exec(&request.exec_id));
            sandbox.kill(id, exec, request.signal, request.all).await
        };
        to_the_end(kill).await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let pids = self.sandbox.pids(&request.id).await.map_err(to_rpc)?;
        let processes =
            pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        self.sandbox
            .resize_pty(&request.id, exec(&request.exec_id), request.width, request.height)
            .await
            .map_err(to_rpc)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> TtrpcResult<Empty> {
        if request.stdin {
            self.sandbox.close_io(&request.id, exec(&request.exec_id)).await.map_err(to_rpc)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> TtrpcResult<Empty> {
        // `joey limit` has none.
        let resources = match request.resources.is_some() {
            true => Some(json("resources", &request.resources, RESOURCES)?.to_vec()),
            false => None,
        };
        let sandbox = self.sandbox.clone();
        let update =
            async move { sandbox.update(&request.id, resources, &request.annotations).await };
        to_the_end(update).await?;
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.pause(&request.id).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.resume(&request.id).await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> TtrpcResult<Empty> {
        Err(unimplemented(format!(
            "container {}: checkpoint is not supported: the container's memory is its VM's",
            request.id
        )))
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let stats = self.sandbox.stats(&request.id).await.map_err(to_rpc)?;
        let packed = MessageField::some(metrics::pack(&stats)?);
        Ok(StatsResponse { stats: packed, ..Default::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> TtrpcResult<ConnectResponse> {
        let task_pid = self.sandbox.connect(&request.id).await.map_err(to_rpc)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: self.version.to_owned(),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> TtrpcResult<DeleteResponse> {
        let sandbox = self.sandbox.clone();
        let delete = async move { sandbox.delete(&request.id, exec(&request.exec_id)).await };
        let deleted = to_the_end(delete).await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.status,
            exited_at: timestamp(deleted.exited_at),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> TtrpcResult<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.shutdown(request.now).await }).await?;
        Ok(Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_another_type_is_refused_by_name() {
        let any = Any { type_url: "types.example/Other".to_owned(), ..Default::default() };
        let error = json("spec", &MessageField::some(any), PROCESS).unwrap_err().to_string();
        assert!(error.contains("types.example/Other"), "{error}");
        let error = json("spec", &MessageField::none(), PROCESS).unwrap_err().to_string();
        assert!(error.contains("spec: missing"), "{error}");
    }
}
