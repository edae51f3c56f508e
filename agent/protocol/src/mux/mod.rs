//! Many byte streams over one byte channel: the virtio-serial port between host and guest.
//!
//! ```text
//!   stream 0 (calls) ──┐  control frames first,            ┌── stream 0
//!   stream 1 (events) ─┼─ then streams below 16,   ═════>  ┼── stream 1
//!   stream 16… (stdio) ┘  then the others in turn          └── stream 16…
//! ```
//!
//! A stream is a number; each end opens it on its own, there is nothing to accept. An end that opens
//! a stream grants the peer a window, and the peer sends no more than was granted: a reader that
//! stalls stops its writer and nobody else. The fixed streams (below
//! [`STREAM_FIRST_STDIO`](crate::limits::STREAM_FIRST_STDIO)) start with a window without a grant.
//!
//! The host [connects](Mux::connect): its first frame makes the guest's end forget an earlier host,
//! because a guest that was cloned from a template has talked to the builder of the template. Both
//! must be idle then.
//!
//! The peer is not trusted: what it can make this side store is bounded for each stream and in all,
//! and a frame that breaks the rules ends the channel with a [`Violation`] that names it.
//!
//! Runs on any runtime, in one thread or several; nothing here polls or sleeps.

mod driver;
mod entry;
mod frame;
mod incoming;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};

pub use self::driver::Driver;
use self::state::State;
pub use self::stream::MuxStream;

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum MuxError {
    /// The peer closed the channel between two frames.
    #[error("the peer closed the channel")]
    Closed,
    /// The peer closed the channel inside a frame.
    #[error("the peer closed the channel in the middle of a frame")]
    Truncated,
    /// Reading failed.
    #[error("reading from the channel: {0}")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("writing to the channel: {0}")]
    Write(#[source] io::Error),
    /// The peer broke the rules.
    #[error("the peer broke the channel's rules: {0}")]
    Violation(#[from] Violation),
}

/// A frame that the peer should not have sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the messages say")]
pub enum Violation {
    /// There is no such kind of frame.
    #[error("frame of unknown kind {kind} on stream {stream}")]
    Kind { stream: u32, kind: u8 },
    /// The length does not fit the kind.
    #[error("frame of kind {kind} on stream {stream} with length {length}")]
    Length { stream: u32, kind: u8, length: u32 },
    /// More data than was granted.
    #[error("{length} bytes on stream {stream}, of which {window} were granted")]
    Window { stream: u32, length: u32, window: u32 },
    /// More credit than can be counted.
    #[error("credit of {length} on stream {stream}, which has {credit}, is more than can be")]
    Credit { stream: u32, credit: u32, length: u32 },
    /// A frame after the one that said there would be none.
    #[error("{what} on stream {stream} after its end")]
    AfterEnd { stream: u32, what: &'static str },
    /// More streams than the limit.
    #[error("stream {stream} would be one more than {}", crate::limits::MAX_STREAMS)]
    TooManyStreams { stream: u32 },
    /// A start frame where none may be.
    #[error("start frame to the connecting side, or while data was under way")]
    Restart,
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the messages say")]
pub enum OpenError {
    /// The number is taken.
    #[error("channel stream {stream} is in use")]
    InUse { stream: u32 },
    /// There are too many.
    #[error("channel stream {stream} would be one more than {}", crate::limits::MAX_STREAMS)]
    TooMany { stream: u32 },
    /// The channel is gone.
    #[error("channel stream {stream} cannot be opened, the channel is lost: {reason}")]
    Lost { stream: u32, reason: String },
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        Self::other(error)
    }
}

#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state has no half-made changes that a panic could leave: no foreign code runs in it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One end of a channel. Clones are the same end.
#[derive(Debug, Clone)]
pub struct Mux {
    shared: Shared,
}

impl Mux {
    /// The guest's end. The driver must be run: it ends when the channel does, with the reason.
    ///
    /// `io` must not buffer what is written to it.
    pub fn new<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> (Self, Driver<T>) {
        Self::with(io, State::default())
    }

    /// The host's end: like [`Mux::new`], and tells the guest that a new host is there.
    pub fn connect<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> (Self, Driver<T>) {
        Self::with(io, State::connecting())
    }

    fn with<T: AsyncRead + AsyncWrite + Unpin>(io: T, state: State) -> (Self, Driver<T>) {
        let shared = Shared(Arc::new(Mutex::new(state)));
        (Self { shared: shared.clone() }, Driver::new(io, shared))
    }

    /// Opens this end of a stream. A number is used once in a channel's life.
    pub fn open(&self, id: u32) -> Result<MuxStream, OpenError> {
        self.shared.lock().open(id)?;
        Ok(MuxStream::new(id, self.shared.clone()))
    }
}
