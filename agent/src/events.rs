//! What the agent tells the host unasked: one stream of the channel, in order.

use joey_protocol::api;
use protobuf::Message;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::log::warning;

/// Batches of connections that wait; whoever has more waits too.
const CONNECTIONS: usize = 2;

/// Queues events. Bounded by what causes them: each process ends once.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    all: mpsc::UnboundedSender<api::Event>,
    connections: mpsc::Sender<api::ConnectionsEvent>,
}

/// What waits to be sent.
#[derive(Debug)]
pub(crate) struct Queues {
    all: mpsc::UnboundedReceiver<api::Event>,
    connections: mpsc::Receiver<api::ConnectionsEvent>,
}

impl Queues {
    /// The next event; connections when there is nothing else.
    async fn next(&mut self) -> Option<api::Event> {
        tokio::select! {
            biased;
            event = self.all.recv() => event,
            Some(batch) = self.connections.recv() => {
                let event = Some(api::event::Event::Connections(batch));
                Some(api::Event { event, ..Default::default() })
            }
        }
    }
}

impl Events {
    /// Queues and what is to be sent from them.
    pub(crate) fn new() -> (Self, Queues) {
        let (all, all_queue) = mpsc::unbounded_channel();
        let (connections, connections_queue) = mpsc::channel(CONNECTIONS);
        let queues = Queues { all: all_queue, connections: connections_queue };
        (Self { all, connections }, queues)
    }

    /// Where batches of connections go.
    pub(crate) fn connections(&self) -> mpsc::Sender<api::ConnectionsEvent> {
        self.connections.clone()
    }

    /// Queues the end of a process.
    pub(crate) fn exit(&self, exit: api::ExitEvent) {
        self.send(api::event::Event::Exit(exit));
    }

    /// Queues a memory kill in a container.
    pub(crate) fn oom(&self, container_id: &str) {
        self.send(api::event::Event::Oom(api::OomEvent {
            container_id: container_id.to_owned(),
            ..Default::default()
        }));
    }

    /// Queues the find of a damaged block.
    pub(crate) fn damage(&self, slot: u32, block: u64) {
        self.send(api::event::Event::Damage(api::DamageEvent {
            slot,
            block,
            ..Default::default()
        }));
    }

    fn send(&self, event: api::event::Event) {
        // Without a receiver the channel is gone, and the machine is about to end.
        let _ = self.all.send(api::Event { event: Some(event), ..Default::default() });
    }
}

/// Sends queued events, each behind its length, for as long as the channel lives.
pub(crate) async fn run(mut queues: Queues, mut stream: impl AsyncWrite + Unpin) {
    while let Some(event) = queues.next().await {
        let mut frame = vec![0; 4];
        if let Err(error) = event.write_to_vec(&mut frame) {
            warning!("encoding an event: {error}");
            continue;
        }
        let length = u32::try_from(frame.len() - 4).unwrap_or(u32::MAX);
        frame[..4].copy_from_slice(&length.to_le_bytes());
        if stream.write_all(&frame).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn events_arrive_framed_and_in_order() {
        let (events, queue) = Events::new();
        let (near, mut far) = tokio::io::duplex(1024);
        events.oom("c1");
        events.exit(api::ExitEvent { status: 137, ..Default::default() });
        drop(events);
        run(queue, near).await;
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).await.unwrap();
        let first = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
        let event = api::Event::parse_from_bytes(&bytes[4..4 + first]).unwrap();
        assert_eq!(event.oom().container_id, "c1");
        let event = api::Event::parse_from_bytes(&bytes[4 + first + 4..]).unwrap();
        assert_eq!(event.exit().status, 137);
    }
}
