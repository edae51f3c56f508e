//! Delivers events to containerd in the order in which they happened.
//!
//! containerd may be restarting: events wait in a bounded queue and the oldest is sent again until
//! it is taken, so no later event overtakes it (`create < start < exit < delete`).

use std::time::Duration;

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::{event::Envelope, events::ForwardRequest};
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc;
use tokio::sync::mpsc;

/// Events that wait while containerd is away; the oldest are kept, for they are what the newer
/// ones mean something by.
const QUEUE: usize = 4096;
/// How long one delivery may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// Pause before a delivery is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// An event ready to be sent.
#[derive(Debug)]
pub struct Outgoing {
    /// containerd's topic, `/tasks/start` for instance.
    pub topic: &'static str,
    /// The event's message.
    pub event: Any,
}

/// The sending half: cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<(Outgoing, std::time::SystemTime)>,
}

impl Publisher {
    /// Starts the task that delivers to containerd's ttrpc socket at `address` in `namespace`. The
    /// handle resolves once every sender is gone and the queue is empty.
    #[must_use]
    pub fn spawn(address: String, namespace: String) -> (Self, tokio::task::JoinHandle<()>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let task = tokio::spawn(deliver_all(address, namespace, receiver));
        (Self { queue }, task)
    }

    /// One whose events go nowhere but into the queue that is returned.
    #[cfg(test)]
    pub(super) fn to_queue() -> (Self, mpsc::Receiver<(Outgoing, std::time::SystemTime)>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue }, receiver)
    }

    /// Queues an event; a full queue drops it and says so.
    pub fn publish(&self, event: Outgoing) {
        let topic = event.topic;
        if self.queue.try_send((event, std::time::SystemTime::now())).is_err() {
            tracing::error!(topic, "event dropped: containerd has taken none of the last {QUEUE}");
        }
    }
}

async fn deliver_all(
    address: String,
    namespace: String,
    mut queue: mpsc::Receiver<(Outgoing, std::time::SystemTime)>,
) {
    let mut client = None;
    while let Some((event, at)) = queue.recv().await {
        let since = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mut envelope = Envelope::new();
        envelope.set_topic(event.topic.to_owned());
        envelope.set_namespace(namespace.clone());
        envelope.set_event(event.event);
        let stamp = envelope.mut_timestamp();
        stamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        stamp.nanos = i32::try_from(since.subsec_nanos()).unwrap_or(0);
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        let mut warned = false;
        while !deliver(&mut client, &address, &request).await {
            if !warned {
                tracing::warn!(%address, "containerd does not take events; trying until it does");
                warned = true;
            }
            // With no sender left the shim is ending: containerd learns the rest from `delete`.
            if queue.is_closed() && warned {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Whether an answer says that containerd could not take the event now, not that it will not have it:
/// a busy one lets the time run out that the call was given.
fn is_passing(code: ttrpc::Code) -> bool {
    use ttrpc::Code as C;
    matches!(
        code,
        C::UNAVAILABLE | C::DEADLINE_EXCEEDED | C::CANCELLED | C::ABORTED | C::RESOURCE_EXHAUSTED
    )
}

async fn deliver(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> bool {
    if client.is_none() {
        let url =
            if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        match Client::connect(&url).await {
            Ok(connected) => *client = Some(EventsClient::new(connected)),
            Err(error) => {
                tracing::debug!(%address, %error, "connect to containerd's event service");
                return false;
            }
        }
    }
    let Some(connected) = client.as_ref() else { return false };
    let context = ttrpc::context::with_duration(DEADLINE);
    match connected.forward(context, request).await {
        Ok(_) => true,
        // containerd looked at it and refused: trying again would block everything behind it.
        Err(ttrpc::Error::RpcStatus(status)) if !is_passing(status.code()) => {
            tracing::warn!(topic = request.envelope().topic(), ?status, "containerd refused event");
            true
        }
        Err(error) => {
            tracing::debug!(%error, "deliver event");
            *client = None;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_dropped_only_where_containerd_will_not_have_it() {
        use ttrpc::Code as C;
        for code in [C::UNAVAILABLE, C::DEADLINE_EXCEEDED, C::CANCELLED, C::RESOURCE_EXHAUSTED] {
            assert!(is_passing(code), "{code:?}");
        }
        for code in [C::INVALID_ARGUMENT, C::NOT_FOUND, C::INTERNAL, C::UNIMPLEMENTED] {
            assert!(!is_passing(code), "{code:?}");
        }
    }
}
