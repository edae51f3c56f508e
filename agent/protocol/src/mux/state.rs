//! All streams of one channel, and what is to be sent next. No input or output happens here.
//!
//! A stream's entry lives until both ends have said that they neither write (FIN) nor read (STOP).
//! It may begin with a frame of the peer: then it waits for [`State::open`].
//!
//! Invariants: every queued byte has been granted by the peer; a stream stores no more than its
//! window; the windows beyond the first share one pool.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;

use super::OpenError;
use super::entry::Stream;
use super::frame::{Frame, HEADER, Header, Kind, PAYLOAD};
use crate::limits::{
    FIRST_WINDOW, MAX_STREAMS, MAX_WINDOW, SEND_QUEUE, STREAM_FIRST_STDIO, WINDOW_POOL,
};

/// Buffers for frames that are kept for the next ones.
const SPARE_BUFFERS: usize = 4;
/// A frame with less room than this is not joined by data that is read in place.
const JOIN: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) streams: HashMap<u32, Stream>,
    /// Streams with something in the queue, the fixed ones and the others.
    pub(super) urgent: VecDeque<u32>,
    pub(super) bulk: VecDeque<u32>,
    /// Streams with a credit, FIN or STOP to send.
    pub(super) control: Vec<u32>,
    pub(super) connecting: bool,
    /// The first frame of the connecting side is still to be sent.
    start: bool,
    /// The peer has sent something.
    pub(super) heard: bool,
    pub(super) in_flight: Option<u32>,
    spare: Vec<Vec<u8>>,
    pub(super) ended: VecDeque<u32>,
    pub(super) pool_used: u32,
    pub(super) driver: Option<Waker>,
    /// Why the channel is lost.
    pub(super) lost: Option<String>,
}

impl State {
    /// The side that connects says so with its first frame.
    pub(super) fn connecting() -> Self {
        Self { connecting: true, start: true, ..Self::default() }
    }

    pub(super) fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    pub(super) fn get(&mut self, id: u32) -> Option<&mut Stream> {
        self.streams.get_mut(&id)
    }

    pub(super) fn open(&mut self, id: u32) -> Result<(), OpenError> {
        if let Some(reason) = &self.lost {
            return Err(OpenError::Lost { stream: id, reason: reason.clone() });
        }
        if let Some(at) = self.ended.iter().position(|ended| *ended == id) {
            self.ended.remove(at);
            // Its entry is still here if the answer to the peer has not been sent.
            let stream = self.streams.entry(id).or_insert_with(|| Stream::ended(id));
            stream.opened = true;
            stream.dropped = false;
            return Ok(());
        }
        if !self.streams.contains_key(&id) && self.streams.len() >= MAX_STREAMS {
            return Err(OpenError::TooMany { stream: id });
        }
        let stream = self.streams.entry(id).or_insert_with(|| Stream::new(id));
        if stream.opened {
            return Err(OpenError::InUse { stream: id });
        }
        stream.opened = true;
        if id >= STREAM_FIRST_STDIO {
            stream.allowance = FIRST_WINDOW;
            stream.grant = FIRST_WINDOW;
            self.control.push(id);
            self.wake_driver();
        }
        Ok(())
    }

    /// The user's end of the stream is gone: what was written still goes out.
    pub(super) fn close(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.dropped = true;
        stream.fin_wanted = true;
        stream.stop_wanted = true;
        stream.grant = 0;
        stream.received = Vec::new();
        stream.reader = None;
        stream.writer = None;
        self.pool_used -= stream.window - FIRST_WINDOW;
        stream.window = FIRST_WINDOW;
        self.control.push(id);
        self.forget_if_over(id);
        self.wake_driver();
    }

    /// No more will be written.
    pub(super) fn finish(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.fin_wanted {
            stream.fin_wanted = true;
            self.control.push(id);
            self.wake_driver();
        }
    }

    pub(super) fn forget_if_over(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(Stream::over) {
            self.streams.remove(&id);
        }
    }

    /// Queues as much of `data` as there is room for: small writes join the frame before them.
    pub(super) fn write(&mut self, id: u32, data: &[u8]) -> usize {
        let Some(stream) = self.streams.get_mut(&id) else {
            return 0;
        };
        let total = data.len().min(stream.room());
        let mut rest = &data[..total];
        let was_empty = stream.queue.is_empty();
        if let Some(last) = stream.queue.back_mut() {
            rest = &rest[last.append(rest)..];
        }
        while !rest.is_empty() {
            // A small frame gets a buffer of its size, a full one a buffer that was used before.
            let size = rest.len().min(PAYLOAD);
            let buffer = if size == PAYLOAD { self.spare.pop() } else { None };
            let mut frame = Frame::new(buffer.unwrap_or_default(), size);
            rest = &rest[frame.append(rest)..];
            stream.queue.push_back(frame);
        }
        self.queued(id, total, was_empty);
        total
    }

    /// Lets `fill` put at most one frame's worth straight into the buffer that will be sent.
    pub(super) fn write_with<E>(
        &mut self,
        id: u32,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(0);
        };
        let limit = stream.room();
        let was_empty = stream.queue.is_empty();
        // Small pieces join the frame before them, or each would hold a whole frame's memory.
        let last = stream.queue.pop_back();
        let (mut frame, full) = match last {
            Some(last) if last.payload() <= PAYLOAD - JOIN => (last.widened(), None),
            full => (Frame::new(self.spare.pop().unwrap_or_default(), PAYLOAD), full),
        };
        stream.queue.extend(full);
        let before = frame.payload();
        let filled = fill(frame.spare(limit)).inspect(|count| frame.filled(*count));
        let count = frame.payload() - before;
        if frame.payload() > 0 {
            stream.queue.push_back(frame);
        } else {
            self.recycle(frame.finish(id).0);
        }
        self.queued(id, count, was_empty);
        filled
    }

    fn queued(&mut self, id: u32, count: usize, was_empty: bool) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.credit -= count as u32;
        stream.queued += count;
        if was_empty && count > 0 {
            if id < STREAM_FIRST_STDIO {
                self.urgent.push_back(id);
            } else {
                self.bulk.push_back(id);
            }
            self.wake_driver();
        }
    }

    /// All that was written has left this process.
    pub(super) fn flushed(&self, id: u32) -> bool {
        self.in_flight != Some(id)
            && self.streams.get(&id).is_none_or(|stream| stream.queue.is_empty())
    }

    /// The reader has used up so many bytes: grants the peer more once half the window is free.
    pub(super) fn consumed(&mut self, id: u32, count: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.held = stream.held.saturating_sub(count);
        if stream.fin_received || stream.stop_wanted {
            return;
        }
        let stored = stream.held + stream.received.len() as u32;
        let free = stream.window.saturating_sub(stream.allowance + stored);
        if free < stream.window / 2 {
            return;
        }
        // A reader that keeps up gets a larger window, as long as the pool lasts.
        let mut window = stream.window;
        if stored == 0 && window < MAX_WINDOW && self.pool_used + window <= WINDOW_POOL {
            self.pool_used += window;
            window *= 2;
        }
        stream.window = window;
        let grant = window - stream.allowance - stored;
        stream.allowance += grant;
        if stream.grant == 0 {
            self.control.push(id);
        }
        stream.grant += grant;
        self.wake_driver();
    }

    /// Next bytes to send, and how many of the buffer count: control frames, then the fixed
    /// streams, then the others in turn. `done` is the buffer sent before.
    pub(super) fn next_output(&mut self, done: Vec<u8>) -> Option<(Vec<u8>, usize)> {
        self.recycle(done);
        self.sent();
        if self.start || !self.control.is_empty() {
            let frames = self.control_frames();
            if !frames.is_empty() {
                let length = frames.len();
                return Some((frames, length));
            }
        }
        loop {
            let (id, urgent) = match self.urgent.pop_front() {
                Some(id) => (id, true),
                None => (self.bulk.pop_front()?, false),
            };
            let Some(stream) = self.streams.get_mut(&id) else {
                continue;
            };
            let Some(frame) = stream.queue.pop_front() else {
                continue;
            };
            stream.queued -= frame.payload();
            if !stream.queue.is_empty() {
                if urgent { self.urgent.push_back(id) } else { self.bulk.push_back(id) }
            } else if stream.fin_wanted {
                self.control.push(id);
            }
            if stream.queued <= SEND_QUEUE / 2 && stream.credit > 0 {
                stream.wake_writer();
            }
            self.in_flight = Some(id);
            return Some(frame.finish(id));
        }
    }

    fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.len() == HEADER + PAYLOAD && self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }

    fn sent(&mut self) {
        if let Some(stream) = self.in_flight.take().and_then(|id| self.streams.get_mut(&id))
            && stream.queue.is_empty()
        {
            stream.wake_writer();
        }
    }

    fn control_frames(&mut self) -> Vec<u8> {
        let mut frames = Vec::new();
        let mut push = |stream, kind, length| {
            frames.extend_from_slice(&Header { stream, kind, length }.encode());
        };
        if std::mem::take(&mut self.start) {
            push(0, Kind::Start, 0);
        }
        for id in std::mem::take(&mut self.control) {
            let Some(stream) = self.streams.get_mut(&id) else {
                continue;
            };
            if stream.grant > 0 {
                push(id, Kind::Credit, std::mem::take(&mut stream.grant));
            }
            if stream.stop_wanted && !stream.stop_sent {
                stream.stop_sent = true;
                push(id, Kind::Stop, 0);
            }
            if stream.fin_wanted && !stream.fin_sent && stream.queue.is_empty() {
                stream.fin_sent = true;
                push(id, Kind::Fin, 0);
            }
            self.forget_if_over(id);
        }
        frames
    }

    /// The channel is gone: readers get what has come and then the end, writers an error.
    pub(super) fn lose(&mut self, reason: String) {
        if self.lost.is_some() {
            return;
        }
        self.lost = Some(reason);
        self.in_flight = None;
        for stream in self.streams.values_mut() {
            stream.fin_received = true;
            stream.stop_received = true;
            stream.queue.clear();
            stream.queued = 0;
            stream.wake_reader();
            stream.wake_writer();
        }
    }
}
