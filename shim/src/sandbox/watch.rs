//! What the guest tells, and its end.
//!
//! An exit takes effect when the process's output has been read (or stays silent although something
//! keeps it open), so that nothing a process printed is lost to a quick Delete. When the channel or
//! the VM is lost, every process that was left has been killed.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use joey_protocol::api;
use tokio::time::{Instant, timeout};

use super::plan::WriteBack;
use super::record::Damage;
use super::state::Exit;
use super::{Guest, Handle, KILLED, LAST_WORDS, Progress, SandboxEvent, clock};
use crate::guest::{self, Event, Events, Lost};
use crate::rootfs::described::{self, Place};
use crate::stdio::DRAIN;

/// A container's memory kills that follow one within this time are not told: one is enough for its
/// status, and more of them would only load containerd.
const OOM_PAUSE: Duration = Duration::from_secs(10);
/// Most damaged blocks that a sandbox tells of: its guest might invent more.
const MAX_DAMAGED: usize = 8;

impl Handle {
    /// Starts the tasks that listen to the guest.
    pub(super) fn watch(&self, guest: Guest, mut events: Events, mut lost: Lost) {
        self.treat_vmm(&guest);
        clock::follow(&guest, lost.clone());
        let handle = self.clone();
        let listening = guest.clone();
        let listener = tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Oom { container } => handle.on_oom(container.to_string()),
                    Event::Exit(exit) => handle.on_exit(&listening, exit),
                    Event::Connections { connections, lost } => {
                        handle.connections().note(connections, lost);
                    }
                    Event::Damage { slot, block } => handle.on_damage(&listening, slot, block),
                }
            }
        });
        let handle = self.clone();
        tokio::spawn(async move {
            let reason: Arc<str> = tokio::select! {
                reason = lost.wait() => match timeout(LAST_WORDS, guest.vm.exited()).await {
                    Ok(how) => format!("the VMM ended: {how}").into(),
                    Err(_) => format!("the channel to the guest was lost: {reason}").into(),
                },
                how = guest.vm.exited() => format!("the VMM ended: {how}").into(),
            };
            guest.vm.kill();
            // Exits that the guest reported before it went are true; then comes the rest.
            let _ = listener.await;
            handle.on_loss(&reason);
        });
    }

    /// Passes a memory kill on: of a container of this sandbox alone, and at most once in
    /// [`OOM_PAUSE`]. containerd takes any container's name, and a guest may say what it likes.
    fn on_oom(&self, id: String) {
        {
            let mut table = self.table();
            let Some(container) = table.containers.get_mut(&id) else { return };
            let now = Instant::now();
            if container.oom_told.is_some_and(|told| now.duration_since(told) < OOM_PAUSE) {
                return;
            }
            container.oom_told = Some(now);
        }
        tracing::warn!(container = %id, "killed for want of memory in the guest");
        self.emit(SandboxEvent::Oom { id });
    }

    fn on_exit(&self, guest: &Guest, exit: guest::Exit) {
        let id = exit.container.to_string();
        let exec = exit.exec.as_ref().map(ToString::to_string);
        let (drained, write_back) = {
            let mut table = self.table();
            let Some(container) = table.containers.get_mut(&id) else { return };
            let (process, copies) = match &exec {
                None => (&mut container.process, container.copies.as_ref()),
                Some(exec) => match container.execs.get_mut(exec) {
                    Some(exec) => (&mut exec.process, exec.copies.as_ref()),
                    None => return,
                },
            };
            // A process ends once, whatever a guest says: what is done for an end is bounded by that.
            if !process.hears_end() {
                return;
            }
            let write_back = match exec {
                None => container.acquired.write_back.clone(),
                Some(_) => Vec::new(),
            };
            // What an exec leaves running may print on, until containerd, which waits for it, deletes the exec.
            copies.filter(|_| exec.is_none()).inspect(|copies| copies.process_ended());
            (copies.map(|copies| copies.drained(DRAIN)), write_back)
        };
        let handle = self.clone();
        let guest = guest.clone();
        tokio::spawn(async move {
            if let Some(drained) = drained
                && !drained.await
            {
                tracing::info!(container = %id, "output is still open after the exit");
            }
            for file in write_back {
                handle.write_back(&guest, &id, &file).await;
            }
            let ended = Exit { status: exit.status.into(), at: exit.exited_at };
            handle.ended(&id, exec.as_deref(), ended);
        });
    }

    /// Tells the operator what is damaged. It is the guest's word, which costs nobody but its own pod anything.
    fn on_damage(&self, guest: &Guest, slot: u32, block: u64) {
        let Some((description, image)) = guest.disks.damaged(slot) else { return };
        let Place { file, block, layer } = described::find(&description, block).unwrap_or_default();
        let damage = Damage { image, layer, file, block };
        let known = {
            let record = self.0.record.lock().unwrap_or_else(PoisonError::into_inner);
            record.damaged.contains(&damage) || record.damaged.len() >= MAX_DAMAGED
        };
        if known {
            return;
        }
        tracing::error!(
            sandbox = %self.0.boot.id, image = damage.image, layer = damage.layer,
            file = %damage.file.display(), block = damage.block,
            "an image is damaged on this node: remove all images with this layer and pull them again"
        );
        if let Err(error) = self.record(|record| record.damaged.push(damage)) {
            tracing::warn!(%error, "the damage is not in the sandbox's record");
        }
    }

    /// Notes an end, unless the process has been deleted meanwhile.
    pub(super) fn ended(&self, id: &str, exec: Option<&str>, exit: Exit) {
        let _ = self.advance(id, exec, None, |process| process.exited(exit));
    }

    /// Brings a file that the container wrote (its termination message) back to the host.
    async fn write_back(&self, guest: &Guest, id: &str, file: &WriteBack) {
        let request = api::ReadFileRequest {
            volume_id: file.volume.clone(),
            path: String::new(),
            limit: file.limit,
            ..Default::default()
        };
        let outcome = match guest.client.read_file(&request).await {
            Ok(data) => std::fs::write(&file.host, data).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = outcome {
            let path = file.host.display();
            tracing::warn!(container = id, %path, %error, "file not brought back from the guest");
        }
    }

    /// The guest is gone: everything in it has ended, and the sandbox too, its own task last.
    pub(super) fn on_loss(&self, reason: &str) {
        let exit = Exit { status: KILLED, at: SystemTime::now() };
        let mut expected = false;
        self.0.progress.send_if_modified(|progress| {
            expected = matches!(progress, Progress::Ended(_));
            if !expected {
                *progress = Progress::Ended(reason.into());
            }
            !expected
        });
        if !expected {
            tracing::error!(sandbox = %self.0.boot.id, reason, "sandbox lost; its containers ended");
        }
        let mut left: Vec<(String, Option<String>)> = Vec::new();
        for (id, container) in &self.table().containers {
            left.extend(container.execs.keys().map(|exec| (id.clone(), Some(exec.clone()))));
            left.push((id.clone(), None));
        }
        for (id, exec) in left {
            self.ended(&id, exec.as_deref(), exit);
        }
        let mut sandbox = exit;
        self.0.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            // Whoever ended it on purpose has said how.
            sandbox = *ended.get_or_insert(exit);
            first
        });
        if self.is_pause(&self.0.boot.id) {
            self.ended(&self.0.boot.id, None, sandbox);
        }
    }
}
