//! The host's end of the channel to one guest.
//!
//! ```text
//!   UnixStream ── mux ─┬─ stream 0 ── Client: calls with deadlines, replies checked
//!                      ├─ stream 1 ── Events: checked, bounded queue
//!                      └─ stream 16… ─ Streams: one per stdin, stdout, stderr
//! ```
//!
//! Everything that comes from the guest is untrusted. What breaks the rules ends the channel, and
//! [`Lost`] says why: there is one reason, whoever found it. The channel also ends when the last
//! [`Client`] and [`Streams`] are dropped.

mod checks;
mod client;
mod events;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use joey_protocol::agent_ttrpc::AgentClient;
use joey_protocol::limits::{STREAM_EVENTS, STREAM_FIRST_STDIO, STREAM_RPC};
use joey_protocol::mux::{Driver, Mux, MuxStream, OpenError};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use ttrpc::asynchronous::transport::Socket;

pub use self::client::{Client, GuestError};
pub use self::events::{Event, EventError, Exit};

/// Events that wait for the sandbox's task; the guest waits when there are more.
const EVENT_QUEUE: usize = 64;

/// Checked events in the guest's order; `None` after the channel is lost and all were taken.
pub type Events = mpsc::Receiver<Event>;

/// All that a connected channel offers.
#[derive(Debug)]
pub struct GuestChannel {
    /// Calls.
    pub client: Client,
    /// What the guest tells.
    pub events: Events,
    /// Streams for stdio.
    pub streams: Streams,
    /// The end of the channel.
    pub lost: Lost,
}

impl GuestChannel {
    /// Takes the channel into use. Sends nothing but the start frame: the first call finds out
    /// whether a guest answers. Must run inside a runtime.
    pub fn connect(io: UnixStream) -> Result<Self, OpenError> {
        let (mux, driver) = Mux::connect(io);
        let calls = mux.open(STREAM_RPC)?;
        let events = mux.open(STREAM_EVENTS)?;
        let (lost_sender, lost) = watch::channel(None);
        let (event_sender, event_receiver) = mpsc::channel(EVENT_QUEUE);
        let (keep, unused) = oneshot::channel();
        let alive = Arc::new(Alive(keep));
        let silent = Arc::new(Notify::new());
        let guest = Guest { driver, events, silent: silent.clone() };
        tokio::spawn(run(guest, event_sender, unused, lost_sender));
        let lost = Lost(lost);
        let agent = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(calls)));
        let streams = Streams {
            mux,
            next: Arc::new(AtomicU32::new(STREAM_FIRST_STDIO)),
            _alive: alive.clone(),
        };
        let client = Client::new(agent, lost.clone(), silent, alive);
        Ok(Self { client, events: event_receiver, streams, lost })
    }
}

/// Dropped with the last handle, which ends the channel.
#[derive(Debug)]
struct Alive(#[allow(dead_code, reason = "its drop is what counts")] oneshot::Sender<()>);

/// What the channel's task looks after.
struct Guest {
    driver: Driver<UnixStream>,
    events: MuxStream,
    /// Told by a [`Client`] that the guest answers no more.
    silent: Arc<Notify>,
}

async fn run(
    guest: Guest,
    sender: mpsc::Sender<Event>,
    unused: oneshot::Receiver<()>,
    lost: watch::Sender<Option<Arc<str>>>,
) {
    let mut reading = std::pin::pin!(events::read(guest.events, sender));
    let reason = tokio::select! {
        biased;
        end = guest.driver => match end {
            Ok(()) => "the channel ended".to_owned(),
            Err(error) => error.to_string(),
        },
        error = &mut reading => {
            lost.send_replace(Some(error.to_string().into()));
            return;
        }
        () = guest.silent.notified() => {
            lost.send_replace(Some("the guest does not answer any more".into()));
            return;
        }
        _ = unused => {
            lost.send_replace(Some("this side closed the channel".into()));
            return;
        }
    };
    lost.send_replace(Some(reason.into()));
    // What the guest told before it went still counts.
    reading.await;
}

/// Resolves when the channel is lost.
#[derive(Debug, Clone)]
pub struct Lost(watch::Receiver<Option<Arc<str>>>);

impl Lost {
    /// The reason, if it is lost already.
    pub fn reason(&self) -> Option<Arc<str>> {
        self.0.borrow().clone()
    }

    /// Waits for the end; the reason.
    pub async fn wait(&mut self) -> Arc<str> {
        match self.0.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(|| "no reason".into()),
            Err(_) => "the channel's task ended".into(),
        }
    }
}

/// Opens streams for stdio under numbers that were not used before.
#[derive(Debug, Clone)]
pub struct Streams {
    mux: Mux,
    next: Arc<AtomicU32>,
    _alive: Arc<Alive>,
}

impl Streams {
    /// The next stream; its number goes into the request that makes the guest open its end.
    pub fn open(&self) -> Result<MuxStream, OpenError> {
        self.mux.open(self.next.fetch_add(1, Ordering::Relaxed))
    }
}
