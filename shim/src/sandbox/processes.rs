//! What containerd asks of processes: check the state, one call to the guest, note the outcome.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use joey_image::usage::Usage;
use joey_protocol::api;
use joey_protocol::ids::ExecId;
use oci_spec::runtime::LinuxResources;

use super::containers::Exec;
use super::state::{self, Exit, Operation, Process, Status};
use super::{
    ExecTask, Guest, Handle, LAST_WORDS, ProcessState, SandboxError, SandboxEvent, StdioPaths,
    clock,
};
use crate::failpoint;
use crate::guest::GuestError;
use crate::host::cpus;
use crate::host::net::Wire;
use crate::net_limits::NetLimits;
use crate::sizing;
use crate::stdio::{Request, StdinEnd, Stdio};

/// Exit status of a command that cannot be executed, as shells have it.
const NOT_EXECUTED: u32 = 127;
/// How often a guest is asked to thaw what it may have frozen.
const THAWS: u32 = 5;
const THAW_AGAIN: Duration = Duration::from_secs(2);

/// The name of a process in errors.
fn name(id: &str, exec: Option<&str>) -> String {
    exec.map_or_else(|| id.to_owned(), |exec| format!("{id}/{exec}"))
}

fn request(id: &str, exec: Option<&str>) -> api::ProcessRequest {
    api::ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec.unwrap_or_default().to_owned(),
        ..Default::default()
    }
}

impl Handle {
    pub(super) fn with_process<T>(
        &self,
        id: &str,
        exec: Option<&str>,
        act: impl FnOnce(&mut Process) -> Result<T, state::Refusal>,
    ) -> Result<T, SandboxError> {
        let mut table = self.table();
        let process =
            table.process(id, exec).ok_or_else(|| self.not_found("process", &name(id, exec)))?;
        act(process).map_err(|refusal| SandboxError::State { id: name(id, exec), refusal })
    }

    fn check(&self, id: &str, exec: Option<&str>, what: Operation) -> Result<(), SandboxError> {
        self.with_process(id, exec, |process| state::check(process.status(), what))
    }

    fn guest_error(id: &str, exec: Option<&str>) -> impl FnOnce(GuestError) -> SandboxError {
        let id = name(id, exec);
        move |source| SandboxError::Guest { id, source }
    }

    /// Runs a created process.
    ///
    /// If that fails no start is announced. What cannot be executed has then ended with status 127:
    /// State, Wait and Delete tell, but there is no exit event, for nothing ever ran (containerd has
    /// the error; runc's shim announces nothing of such an exec either). After any other failure it
    /// is still a created process, as with runc, whose end is announced when it comes.
    ///
    /// # Errors
    /// It is not in the state for it, its program cannot be executed, or the guest does not answer.
    pub async fn start(&self, id: &str, exec: Option<&str>) -> Result<u32, SandboxError> {
        if exec.is_none() && self.is_pause(id) {
            return self.start_pause(id).await;
        }
        let start = Instant::now();
        let guest = self.guest().await?;
        guest.services.wait().await.map_err(|reason| {
            SandboxError::host(&name(id, exec), "wait for what it is to know", reason)
        })?;
        self.with_process(id, exec, Process::starting)?;
        let (call, done) = match exec {
            None => ("start.call", "start.done"),
            Some(_) => ("exec-start.call", "exec-start.done"),
        };
        failpoint::reach(&self.0.config.run_dir, call).await;
        let reply = match guest.client.start(&request(id, exec)).await {
            Ok(reply) => reply,
            Err(error) => {
                let exit = Exit { status: NOT_EXECUTED, at: SystemTime::now() };
                self.advance(id, exec, None, |process| {
                    if !error.is_not_executed() {
                        return process.not_started();
                    }
                    process.not_executed(exit);
                    None
                })?;
                return Err(Self::guest_error(id, exec)(error));
            }
        };
        self.0.timeline.host("start", &name(id, exec), start);
        self.note_phases(&name(id, exec), &reply.phases);
        failpoint::reach(&self.0.config.run_dir, done).await;
        let container = id.to_owned();
        let started = match exec {
            None => SandboxEvent::Started { id: container, pid: reply.pid },
            Some(exec) => SandboxEvent::ExecStarted {
                id: container,
                exec_id: exec.to_owned(),
                pid: reply.pid,
            },
        };
        self.advance(id, exec, Some(started), |process| process.started(reply.pid))?;
        self.0.timeline.write(&self.directory());
        Ok(reply.pid)
    }

    /// Changes a process and tells containerd: of the change, then of an end that takes effect with
    /// it. This is the one place that does; under the table's lock, so that events are in the order
    /// of the changes.
    pub(super) fn advance(
        &self,
        id: &str,
        exec: Option<&str>,
        event: Option<SandboxEvent>,
        change: impl FnOnce(&mut Process) -> Option<Exit>,
    ) -> Result<(), SandboxError> {
        self.with_process(id, exec, |process| {
            let ended = change(process);
            let pid = process.pid();
            event.into_iter().for_each(|event| self.emit(event));
            if let Some(exit) = ended {
                let exec_id = exec.map(ToOwned::to_owned);
                self.emit(SandboxEvent::Exited { id: id.to_owned(), exec_id, pid, exit });
            }
            Ok(())
        })
    }

    /// Opens the stdio of a process of container `id`; `what` names the process in an error.
    pub(super) async fn open_stdio(
        &self,
        id: &str,
        what: &str,
        paths: &StdioPaths,
    ) -> Result<Stdio, SandboxError> {
        Stdio::open(Request {
            namespace: &self.0.boot.namespace,
            container: id,
            stdin: &paths.stdin,
            stdout: &paths.stdout,
            stderr: &paths.stderr,
            terminal: paths.terminal,
            stdin_end: StdinEnd::CloseIo,
        })
        .await
        .map_err(|error| SandboxError::Refused(format!("{what}: {error}")))
    }

    /// Adds a process to a running container.
    ///
    /// # Errors
    /// The container does not run, the id is taken, or the guest refuses.
    pub async fn exec(&self, task: ExecTask) -> Result<(), SandboxError> {
        ExecId::new(&task.exec_id)?;
        let (id, exec_id) = (task.id.as_str(), task.exec_id.as_str());
        self.check(id, None, Operation::Exec)?;
        let stdio = self.open_stdio(id, &format!("exec {id}/{exec_id}"), &task.stdio).await?;
        let guest = self.guest().await?;
        let (message, copies) = stdio
            .attach(|| guest.streams.open())
            .map_err(|error| SandboxError::host(id, "open stdio streams", error))?;
        {
            let mut table = self.table();
            let container =
                table.containers.get_mut(id).ok_or_else(|| self.not_found("container", id))?;
            if container.execs.contains_key(exec_id) {
                return Err(SandboxError::Exists { what: "exec", id: name(id, Some(exec_id)) });
            }
            let exec =
                Exec { process: Process::new(), stdio: task.stdio.clone(), copies: Some(copies) };
            container.execs.insert(exec_id.to_owned(), exec);
        }
        let create = api::CreateExecRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: task.process,
            stdio: Some(message).into(),
            ..Default::default()
        };
        failpoint::reach(&self.0.config.run_dir, "exec.call").await;
        if let Err(source) = guest.client.create_exec(&create).await {
            if let Some(container) = self.table().containers.get_mut(id) {
                container.execs.remove(exec_id);
            }
            return Err(Self::guest_error(id, Some(exec_id))(source));
        }
        let added = SandboxEvent::ExecAdded { id: task.id.clone(), exec_id: task.exec_id.clone() };
        self.advance(id, Some(exec_id), Some(added), |process| process.created(0))
    }

    /// State of a process.
    ///
    /// # Errors
    /// There is none.
    pub async fn state(&self, id: &str, exec: Option<&str>) -> Result<ProcessState, SandboxError> {
        let table = self.table();
        let missing = || self.not_found("process", &name(id, exec));
        let (process, bundle, stdio) = match &table.pause {
            Some(pause) if pause.task.id == id && exec.is_none() => {
                (&pause.process, &pause.task.bundle, &pause.task.stdio)
            }
            _ => {
                let container = table.containers.get(id).ok_or_else(missing)?;
                match exec {
                    None => (&container.process, &container.bundle, &container.stdio),
                    Some(exec) => {
                        let exec = container.execs.get(exec).ok_or_else(missing)?;
                        (&exec.process, &container.bundle, &exec.stdio)
                    }
                }
            }
        };
        Ok(ProcessState {
            bundle: bundle.clone(),
            pid: process.pid(),
            status: process.status(),
            stdio: stdio.clone(),
            exit: process.exit(),
        })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// There is no such process, or it was deleted meanwhile.
    pub async fn wait(&self, id: &str, exec: Option<&str>) -> Result<Exit, SandboxError> {
        let mut ended = self.with_process(id, exec, |process| Ok(process.ended()))?;
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.ok_or_else(|| self.not_found("process", &name(id, exec)))
    }

    /// Sends a signal to a process, or with `all` to every process of the container.
    ///
    /// # Errors
    /// It has ended already, or never was.
    pub async fn kill(
        &self,
        id: &str,
        exec: Option<&str>,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        if all && exec.is_none() && self.has_ended(id) {
            return self.kill_the_rest(id, signal).await;
        }
        self.check(id, exec, Operation::Kill)?;
        if exec.is_none() && self.is_pause(id) {
            return self.kill_pause(signal).await;
        }
        let guest = self.guest().await?;
        let signal = api::SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            signal,
            all,
            ..Default::default()
        };
        failpoint::reach(&self.0.config.run_dir, "kill.call").await;
        match guest.client.signal(&signal).await {
            Ok(()) => Ok(()),
            // That its guest went meanwhile is an end, too, and so what the caller wants.
            Err(error) if !error.is_refusal() && self.ends_soon(id, exec).await => {
                Err(SandboxError::State { id: name(id, exec), refusal: state::Refusal::Finished })
            }
            Err(error) => Err(Self::guest_error(id, exec)(error)),
        }
    }

    /// Whether a process has ended, or does as its guest is found to be lost.
    async fn ends_soon(&self, id: &str, exec: Option<&str>) -> bool {
        let ended = self.with_process(id, exec, |process| Ok(process.ended()));
        let Ok(mut ended) = ended else { return true };
        tokio::time::timeout(LAST_WORDS * 2, ended.wait_for(Option::is_some)).await.is_ok()
    }

    /// Whether the first process of a container has ended.
    fn has_ended(&self, id: &str) -> bool {
        !self.is_pause(id)
            && self
                .with_process(id, None, |process| Ok(process.status() == Status::Stopped))
                .unwrap_or(false)
    }

    /// Signals what may be left of a container whose first process has ended. That nothing is left,
    /// or no guest, is what the caller wants: containerd stops a container so before it deletes it.
    async fn kill_the_rest(&self, id: &str, signal: u32) -> Result<(), SandboxError> {
        let Ok(guest) = self.guest().await else { return Ok(()) };
        let signal = api::SignalRequest {
            container_id: id.to_owned(),
            signal,
            all: true,
            ..Default::default()
        };
        match guest.client.signal(&signal).await {
            Err(error) if !error.is_not_found() => {
                tracing::warn!(container = id, %error, "what is left of a container not signalled");
            }
            _ => {}
        }
        Ok(())
    }

    /// Numbers of a container's processes; never empty while the task is not deleted, for containerd
    /// takes a task without processes for dead after its own restart.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>, SandboxError> {
        let (pid, status) = self.with_process(id, None, |p| Ok((p.pid(), p.status())))?;
        if self.is_pause(id) || status == Status::Stopped {
            return Ok(vec![pid]);
        }
        let guest = self.guest().await?;
        let request = api::ContainerRequest { container_id: id.to_owned(), ..Default::default() };
        let reply = guest.client.processes(&request).await.map_err(Self::guest_error(id, None))?;
        let mut pids: Vec<u32> = reply.processes.iter().map(|process| process.pid).collect();
        if pids.is_empty() {
            pids.push(pid);
        }
        Ok(pids)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has ended, or has no terminal.
    pub async fn resize_pty(
        &self,
        id: &str,
        exec: Option<&str>,
        width: u32,
        height: u32,
    ) -> Result<(), SandboxError> {
        self.check(id, exec, Operation::Resize)?;
        let guest = self.guest().await?;
        let resize = api::ResizePtyRequest {
            container_id: id.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            width,
            height,
            ..Default::default()
        };
        guest.client.resize_pty(&resize).await.map_err(Self::guest_error(id, exec))
    }

    /// Ends a process's standard input after what was written to it.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn close_io(&self, id: &str, exec: Option<&str>) -> Result<(), SandboxError> {
        self.with_process(id, exec, |_| Ok(()))?;
        let table = self.table();
        let copies = table.containers.get(id).and_then(|container| match exec {
            None => container.copies.as_ref(),
            Some(exec) => container.execs.get(exec).and_then(|exec| exec.copies.as_ref()),
        });
        if let Some(copies) = copies {
            copies.close_stdin();
        }
        Ok(())
    }

    /// Changes the limits of a container; of the sandbox's own task there are none to change.
    ///
    /// # Errors
    /// The container is gone or the guest refuses the limits.
    pub async fn update(
        &self,
        id: &str,
        resources: Option<Vec<u8>>,
        annotations: &HashMap<String, String>,
    ) -> Result<(), SandboxError> {
        self.check(id, None, Operation::Update)?;
        let guest = self.guest().await?;
        self.limit_disks(&guest, annotations).await?;
        let before = *self.0.net_limits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let limits = before.annotated(annotations).map_err(|error| {
            SandboxError::Refused(format!("sandbox {}: {error}", self.0.boot.id))
        })?;
        if limits != before {
            self.limit_network(limits)?;
        }
        let Some(resources) = resources.filter(|_| !self.is_pause(id)) else { return Ok(()) };
        let refuse = |reason| SandboxError::Refused(format!("container {id}: {reason}"));
        let mut limits: LinuxResources = serde_json::from_slice(&resources)
            .map_err(|error| refuse(format!("resources: {error}")))?;
        let cpus = cpus::take(&mut limits).map_err(refuse)?;
        let resources =
            serde_json::to_vec(&limits).map_err(|error| refuse(format!("resources: {error}")))?;
        let update =
            api::UpdateRequest { container_id: id.to_owned(), resources, ..Default::default() };
        guest.client.update(&update).await.map_err(Self::guest_error(id, None))?;
        if let Some(container) = self.table().containers.get_mut(id).filter(|_| cpus.is_some()) {
            container.cpus = cpus;
        }
        self.treat_vmm(&guest);
        Ok(())
    }

    /// Sets the limits of the pod's disks that annotations name.
    pub(super) async fn limit_disks(
        &self,
        guest: &Guest,
        annotations: &HashMap<String, String>,
    ) -> Result<(), SandboxError> {
        let id = &self.0.boot.id;
        let mut limits = self.0.disk_limits.lock().await;
        let wanted = sizing::disk_limits(annotations, *limits)
            .map_err(|error| SandboxError::Refused(format!("sandbox {id}: {error}")))?;
        if wanted != *limits {
            let limited = guest.vm.limit_disks(wanted).await;
            limited.map_err(|error| SandboxError::host(id, "limit the pod's disks", error))?;
            *limits = wanted;
        }
        Ok(())
    }

    /// Sets the limits of the pod's network.
    pub(super) fn limit_network(&self, limits: NetLimits) -> Result<(), SandboxError> {
        let id = &self.0.boot.id;
        // Held until it is done: one change after the other.
        let mut now = self.0.net_limits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (netns, place) = {
            let record = self.0.record.lock();
            let record = record.unwrap_or_else(std::sync::PoisonError::into_inner);
            (record.netns.clone(), record.network.clone())
        };
        let Some(netns) = netns else {
            let reason = "it has no network whose use could be limited";
            return Err(SandboxError::Refused(format!("sandbox {id}: {reason}")));
        };
        Wire::limit(&netns, place.as_ref(), &limits)
            .map_err(|error| SandboxError::host(id, "limit the pod's network", error))?;
        *now = limits;
        Ok(())
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, id: &str) -> Result<(), SandboxError> {
        self.freeze(id, true).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// It is not frozen.
    pub async fn resume(&self, id: &str) -> Result<(), SandboxError> {
        self.freeze(id, false).await
    }

    async fn freeze(&self, id: &str, frozen: bool) -> Result<(), SandboxError> {
        let what = if frozen { Operation::Pause } else { Operation::Resume };
        self.check(id, None, what)?;
        if self.is_pause(id) {
            return Err(SandboxError::Refused(format!(
                "container {id} is the sandbox itself: pause its containers instead"
            )));
        }
        let guest = self.guest().await?;
        let request = api::ContainerRequest { container_id: id.to_owned(), ..Default::default() };
        let answer = if frozen {
            guest.client.pause(&request).await
        } else {
            guest.client.resume(&request).await
        };
        if let Err(error) = answer {
            if frozen && !matches!(error, GuestError::Refused { .. }) {
                self.thaw(&guest, request);
            }
            return Err(Self::guest_error(id, None)(error));
        }
        if !frozen {
            clock::look(&guest);
        }
        self.with_process(id, None, |process| {
            process.freeze(frozen);
            Ok(())
        })?;
        let id = id.to_owned();
        self.emit(if frozen { SandboxEvent::Paused { id } } else { SandboxEvent::Resumed { id } });
        Ok(())
    }

    /// Takes back a pause of which the guest has not said how it went, and which for containerd never was.
    fn thaw(&self, guest: &Guest, request: api::ContainerRequest) {
        let (handle, client) = (self.clone(), guest.client.clone());
        tokio::spawn(async move {
            let id = &request.container_id;
            for _ in 0..THAWS {
                // Gone, or paused by a later call.
                if handle.check(id, None, Operation::Pause).is_err() {
                    return;
                }
                match client.resume(&request).await {
                    Ok(()) | Err(GuestError::Lost { .. }) => return,
                    Err(error) => {
                        tracing::warn!(container = id, %error, "pause not taken back yet");
                        tokio::time::sleep(THAW_AGAIN).await;
                    }
                }
            }
        });
    }

    /// Counters of a container. The sandbox's own task has no cgroup in the guest: zeroes.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn stats(&self, id: &str) -> Result<api::StatsResponse, SandboxError> {
        let status = self.with_process(id, None, |process| Ok(process.status()))?;
        if self.is_pause(id) || status == Status::Stopped {
            return Ok(api::StatsResponse::new());
        }
        let guest = self.guest().await?;
        let request = api::ContainerRequest { container_id: id.to_owned(), ..Default::default() };
        let stats = guest.client.stats(&request).await.map_err(Self::guest_error(id, None))?;
        self.write_usage(id, &stats);
        Ok(stats)
    }

    /// Writes down what a container has written, for joey-snapshotter to tell. The pod's emptyDirs are no container's;
    /// but where it is the pod's only one, they count to nobody else's limit of `ephemeral-storage`.
    fn write_usage(&self, id: &str, stats: &api::StatsResponse) {
        let alone = {
            let table = self.table();
            let mut others = table.containers.iter().filter(|(other, _)| *other != id);
            others.all(|(_, other)| other.process.status() == Status::Stopped)
        };
        let mut usage = Usage { bytes: stats.layer_bytes, inodes: stats.layer_inodes };
        if alone {
            usage.bytes = usage.bytes.saturating_add(stats.volumes_bytes);
            usage.inodes = usage.inodes.saturating_add(stats.volumes_inodes);
        }
        if let Err(error) = usage.write(&self.directory(), id) {
            tracing::warn!(container = id, %error, "what it uses of the disk was not written down");
        }
    }

    /// Counters of all that the sandbox's containers use and used.
    ///
    /// # Errors
    /// The sandbox is not up, or the guest does not tell.
    pub async fn sandbox_stats(&self) -> Result<api::StatsResponse, SandboxError> {
        let guest = self.guest().await?;
        let all = api::ContainerRequest::new();
        guest.client.stats(&all).await.map_err(Self::guest_error(self.id(), None))
    }

    /// Number of a container's first process; of the VMM for a sandbox without a task of its own (Sandbox
    /// API): containerd asks for it when it was restarted, and has what is not there deleted.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn connect(&self, id: &str) -> Result<u32, SandboxError> {
        match self.with_process(id, None, |process| Ok(process.pid())) {
            Err(_) if id == self.0.boot.id => Ok(self.table().vmm_pid),
            known => known,
        }
    }
}
