//! The sandbox's events as containerd's messages, in the order in which they happened.

use containerd_shim::protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{MessageField, MessageFull};
use containerd_shim::protos::topics;
use tokio::sync::{mpsc, oneshot};

use super::convert::timestamp;
use super::publisher::{Outgoing, Publisher};
use crate::sandbox::{CreateTask, Deleted, SandboxEvent};

/// Forwards events until `closed` resolves, by a message or without its sender, and closes the queue:
/// what is in it by then still goes.
pub async fn forward(
    mut events: mpsc::UnboundedReceiver<SandboxEvent>,
    publisher: Publisher,
    mut closed: oneshot::Receiver<()>,
) {
    loop {
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            _ = &mut closed, if !events.is_closed() => {
                events.close();
                continue;
            }
        };
        let Some(event) = event else { return };
        if let Some(outgoing) = encode(event) {
            publisher.publish(outgoing);
        }
    }
}

/// Packs a message as containerd's type registry does: by its bare name.
fn pack<M: MessageFull>(topic: &'static str, message: &M) -> Option<Outgoing> {
    let type_url = M::descriptor().full_name().to_owned();
    match message.write_to_bytes() {
        Ok(value) => Some(Outgoing { topic, event: Any { type_url, value, ..Default::default() } }),
        Err(error) => {
            tracing::error!(topic, %error, "event cannot be encoded");
            None
        }
    }
}

fn encode(event: SandboxEvent) -> Option<Outgoing> {
    use SandboxEvent as E;
    match event {
        E::Created { task, pid } => pack(topics::TASK_CREATE_EVENT_TOPIC, &created(task, pid)),
        E::Started { id, pid } => pack(
            topics::TASK_START_EVENT_TOPIC,
            &TaskStart { container_id: id, pid, ..Default::default() },
        ),
        E::ExecAdded { id, exec_id } => pack(
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            &TaskExecAdded { container_id: id, exec_id, ..Default::default() },
        ),
        E::ExecStarted { id, exec_id, pid } => pack(
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            &TaskExecStarted { container_id: id, exec_id, pid, ..Default::default() },
        ),
        E::Oom { id } => {
            pack(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM { container_id: id, ..Default::default() })
        }
        E::Exited { id, exec_id, pid, exit } => pack(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                // An init process is named by its container.
                id: exec_id.unwrap_or_else(|| id.clone()),
                container_id: id,
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        ),
        E::Deleted { id, deleted } => pack(topics::TASK_DELETE_EVENT_TOPIC, &removed(id, deleted)),
        E::Paused { id } => pack(
            topics::TASK_PAUSED_EVENT_TOPIC,
            &TaskPaused { container_id: id, ..Default::default() },
        ),
        E::Resumed { id } => pack(
            topics::TASK_RESUMED_EVENT_TOPIC,
            &TaskResumed { container_id: id, ..Default::default() },
        ),
    }
}

fn created(task: CreateTask, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: task.id,
        bundle: task.bundle.to_string_lossy().into_owned(),
        rootfs: task.rootfs,
        io: MessageField::some(TaskIO {
            stdin: task.stdio.stdin,
            stdout: task.stdio.stdout,
            stderr: task.stdio.stderr,
            terminal: task.stdio.terminal,
            ..Default::default()
        }),
        pid,
        ..Default::default()
    }
}

fn removed(id: String, deleted: Deleted) -> TaskDelete {
    TaskDelete {
        container_id: id,
        pid: deleted.pid,
        exit_status: deleted.status,
        exited_at: timestamp(deleted.exited_at),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_queued_before_the_close_is_forwarded() {
        let (publisher, mut published) = Publisher::to_queue();
        let (events, outgoing) = mpsc::unbounded_channel();
        let (close, closed) = oneshot::channel();
        for id in ["a", "b"] {
            events.send(SandboxEvent::Oom { id: id.to_owned() }).unwrap();
        }
        drop(close);
        forward(outgoing, publisher, closed).await;
        assert!(events.is_closed());
        for _ in 0..2 {
            let (event, _) = published.recv().await.unwrap();
            assert_eq!(event.topic, topics::TASK_OOM_EVENT_TOPIC);
        }
        assert!(published.recv().await.is_none());
    }
}
