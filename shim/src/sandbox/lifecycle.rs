//! The sandbox's own task (CRI's pause container, without a process) and containerd's Sandbox API.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::bringup::Wanted;
use super::containers::deleted;
use super::state::{self, Exit, Operation, Process};
use super::{CreateTask, Deleted, Handle, KILLED, Pause, Progress, SandboxError, SandboxEvent};
use crate::failpoint;

/// Signals that a pause process ends by: SIGINT, SIGQUIT, SIGKILL, SIGTERM.
const ENDING: [u32; 4] = [2, 3, 9, 15];

/// How long containerd may take to delete the containers of a sandbox that has ended.
const LAST_DELETES: Duration = Duration::from_secs(3);

/// What containerd's Sandbox API tells of a sandbox.
#[derive(Debug, Default)]
pub struct SandboxRequest {
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// Whether the pod asks for the host's network.
    pub host_network: bool,
    /// Whether it asks for the host's IPC.
    pub host_ipc: bool,
    /// Whether it asks for the host's processes.
    pub host_pid: bool,
    /// Host name.
    pub hostname: String,
    /// Directory of the pod in the control groups.
    pub cgroup_parent: String,
    /// Pod-wide sysctls.
    pub sysctls: Vec<(String, String)>,
    /// The pod's annotations.
    pub annotations: std::collections::HashMap<String, String>,
    /// Content of /etc/hosts, /etc/hostname and /etc/resolv.conf, by path.
    pub files: std::collections::BTreeMap<String, Vec<u8>>,
}

/// How a sandbox is doing.
#[derive(Clone, Debug)]
pub struct SandboxStatus {
    /// The VMM; 0 while there is none.
    pub pid: u32,
    /// Whether it can take containers.
    pub ready: bool,
    /// When the shim started.
    pub created_at: SystemTime,
    /// When it ended, if it has.
    pub exited_at: Option<SystemTime>,
}

impl Handle {
    pub(super) fn is_pause(&self, id: &str) -> bool {
        self.table().pause.as_ref().is_some_and(|pause| pause.task.id == id)
    }

    /// The sandbox's own task is the VM: it is created when the guest has its identity.
    pub(super) async fn create_pause(&self, task: CreateTask) -> Result<u32, SandboxError> {
        if task.id != self.0.boot.id {
            return Err(SandboxError::Refused(format!(
                "container {} says it is a sandbox, but this shim serves sandbox {}",
                task.id, self.0.boot.id
            )));
        }
        self.guest().await?;
        let pid = {
            let mut table = self.table();
            if table.pause.is_some() {
                return Err(SandboxError::Exists { what: "sandbox", id: task.id });
            }
            table.pause = Some(Pause { process: Process::new(), task: task.clone() });
            table.vmm_pid
        };
        let id = task.id.clone();
        let created = SandboxEvent::Created { task, pid };
        self.advance(&id, None, Some(created), |process| process.created(pid))?;
        Ok(pid)
    }

    pub(super) async fn start_pause(&self, id: &str) -> Result<u32, SandboxError> {
        self.guest().await?;
        let pid = self.table().vmm_pid;
        self.with_process(id, None, Process::starting)?;
        let started = SandboxEvent::Started { id: id.to_owned(), pid };
        self.advance(id, None, Some(started), |process| process.started(pid))?;
        Ok(pid)
    }

    /// A signal to the sandbox's own task: those that end a process end the VM, others do nothing.
    pub(super) async fn kill_pause(&self, signal: u32) -> Result<(), SandboxError> {
        if ENDING.contains(&signal) {
            self.end("it was stopped", 128 + signal).await;
        }
        Ok(())
    }

    pub(super) async fn delete_pause(&self, id: &str) -> Result<Deleted, SandboxError> {
        let pause = {
            let mut table = self.table();
            let pause = table.pause.as_ref().ok_or_else(|| self.not_found("sandbox", id))?;
            state::check(pause.process.status(), Operation::Delete)
                .map_err(|refusal| SandboxError::State { id: id.to_owned(), refusal })?;
            table.pause.take().ok_or_else(|| self.not_found("sandbox", id))?
        };
        self.end("it was deleted", KILLED).await;
        self.undo(false).await;
        Ok(deleted(&pause.process))
    }

    /// Ends the VM and waits until everything in it has been accounted for.
    async fn end(&self, why: &str, status: u32) {
        let exit = Exit { status, at: SystemTime::now() };
        // Takes the guest out, so that of two who end it one does.
        let before = self.0.progress.send_replace(Progress::Ended(why.into()));
        let guest = match before {
            Progress::Ready(guest) => guest,
            Progress::Starting => return self.end_start(exit).await,
            Progress::Waiting => return,
            // Why it ended first is what counts.
            before => {
                self.0.progress.send_replace(before);
                return;
            }
        };
        self.0.ended.send_replace(Some(exit));
        let run_dir = &self.0.config.run_dir;
        failpoint::reach(run_dir, "stop.kill").await;
        guest.vm.kill();
        let how = guest.vm.exited().await;
        failpoint::reach(run_dir, "stop.killed").await;
        tracing::info!(sandbox = %self.0.boot.id, why, how, "VM ended");
        self.on_loss(why);
    }

    /// Ends a sandbox that is still starting: without its task nothing more is acquired, and what was
    /// goes by the record.
    async fn end_start(&self, exit: Exit) {
        let starting =
            self.0.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(starting) = starting {
            starting.abort();
            let _ = starting.await;
        }
        self.0.ended.send_replace(Some(exit));
        self.undo(false).await;
    }

    /// Shutdown of the Task service: ends the shim if nothing is left in it.
    ///
    /// # Errors
    /// None; an early call is ignored, as containerd's own shims do.
    pub async fn shutdown(&self, now: bool) -> Result<(), SandboxError> {
        if !now && !self.table().is_empty() {
            // containerd asks once, after it deleted the sandbox: whoever is deleted last leaves. A
            // container that it has forgotten, having crashed, is never deleted.
            self.table().leaving = true;
            if matches!(*self.0.progress.borrow(), Progress::Ended(_) | Progress::Failed(_)) {
                let handle = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(LAST_DELETES).await;
                    handle.leave().await;
                });
            }
            return Ok(());
        }
        self.leave().await;
        Ok(())
    }

    pub(super) async fn leave(&self) {
        self.end("the shim was shut down", KILLED).await;
        self.undo(true).await;
        self.0.leave.send_replace(true);
    }

    /// Sandbox API: starts the VM.
    ///
    /// # Errors
    /// None here: [`Handle::start_sandbox`] waits for the outcome.
    pub async fn create_sandbox(&self, request: SandboxRequest) -> Result<(), SandboxError> {
        *self.0.pod_files.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = request.files;
        let parent = request.cgroup_parent.trim_end_matches('/');
        let id = &self.0.boot.id;
        let cgroups_path = match parent {
            "" => None,
            slice if slice.ends_with(".slice") => {
                let name = slice.rsplit('/').next().unwrap_or(slice);
                Some(format!("{name}:cri-containerd:{id}"))
            }
            parent => Some(format!("{parent}/{id}")),
        };
        self.bring_up(Wanted {
            netns: request.netns,
            host_network: request.host_network,
            host_ipc: request.host_ipc,
            host_pid: request.host_pid,
            hostname: request.hostname,
            cgroups_path,
            sysctls: request.sysctls,
            annotations: request.annotations,
        });
        Ok(())
    }

    /// Sandbox API: waits until the sandbox can take containers; the VMM's number.
    ///
    /// # Errors
    /// The start failed.
    pub async fn start_sandbox(&self) -> Result<(u32, SystemTime), SandboxError> {
        self.guest().await?;
        Ok((self.table().vmm_pid, self.0.created_at))
    }

    /// Sandbox API: ends the VM.
    ///
    /// # Errors
    /// None.
    pub async fn stop_sandbox(&self) -> Result<(), SandboxError> {
        self.end("it was stopped", KILLED).await;
        Ok(())
    }

    /// Sandbox API: waits for the VM's end.
    ///
    /// # Errors
    /// It did not start, or the shim ends meanwhile.
    pub async fn wait_sandbox(&self) -> Result<Exit, SandboxError> {
        let id = self.0.boot.id.clone();
        let mut ended = self.0.ended.subscribe();
        let mut progress = self.0.progress.subscribe();
        let exit = tokio::select! {
            biased;
            exit = ended.wait_for(Option::is_some) => exit.ok().and_then(|exit| *exit),
            // What never ran has no end to wait for.
            failed = progress.wait_for(|now| matches!(now, Progress::Failed(_))) => {
                match failed.as_deref() {
                    Ok(Progress::Failed(reason)) => {
                        return Err(SandboxError::NotStarted { id, reason: reason.clone() });
                    }
                    _ => None,
                }
            }
        };
        exit.ok_or_else(|| SandboxError::Ended { id, reason: "the shim is ending".into() })
    }

    /// Sandbox API: ends the VM and the shim.
    ///
    /// # Errors
    /// None.
    pub async fn shutdown_sandbox(&self) -> Result<(), SandboxError> {
        self.leave().await;
        Ok(())
    }

    /// Sandbox API: how it is doing.
    #[must_use]
    pub fn sandbox_status(&self) -> SandboxStatus {
        SandboxStatus {
            pid: self.table().vmm_pid,
            ready: matches!(*self.0.progress.borrow(), Progress::Ready(_)),
            created_at: self.0.created_at,
            exited_at: self.0.ended.borrow().map(|exit| exit.at),
        }
    }

    /// The sandbox's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.boot.id
    }
}
