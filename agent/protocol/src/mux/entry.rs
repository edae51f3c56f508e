//! What one end knows of one stream.

use std::collections::VecDeque;
use std::task::Waker;

use super::frame::Frame;
use crate::limits::{FIRST_WINDOW, SEND_QUEUE, STREAM_FIRST_STDIO};

#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) opened: bool,
    pub(super) dropped: bool,
    /// Received and not yet handed to the reader.
    pub(super) received: Vec<u8>,
    /// Handed to the reader and not yet consumed.
    pub(super) held: u32,
    pub(super) window: u32,
    /// What the peer may still send.
    pub(super) allowance: u32,
    pub(super) grant: u32,
    pub(super) fin_received: bool,
    pub(super) stop_wanted: bool,
    pub(super) stop_sent: bool,
    pub(super) reader: Option<Waker>,
    /// What this side may still put into its queue.
    pub(super) credit: u32,
    pub(super) queue: VecDeque<Frame>,
    pub(super) queued: usize,
    pub(super) fin_wanted: bool,
    pub(super) fin_sent: bool,
    pub(super) stop_received: bool,
    pub(super) writer: Option<Waker>,
}

impl Stream {
    pub(super) fn new(id: u32) -> Self {
        // The fixed streams need no grant first, so that the first call needs no extra round trip.
        let first = if id < STREAM_FIRST_STDIO { FIRST_WINDOW } else { 0 };
        Self { window: FIRST_WINDOW, allowance: first, credit: first, ..Self::default() }
    }

    pub(super) fn ended(id: u32) -> Self {
        Self {
            fin_received: true,
            stop_received: true,
            fin_sent: true,
            stop_sent: true,
            ..Self::new(id)
        }
    }

    /// How much may be written now.
    pub(super) fn room(&self) -> usize {
        (self.credit as usize).min(SEND_QUEUE.saturating_sub(self.queued))
    }

    pub(super) fn over(&self) -> bool {
        self.fin_sent && self.stop_sent && self.fin_received && self.stop_received && self.dropped
    }

    pub(super) fn wake_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }

    pub(super) fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}
