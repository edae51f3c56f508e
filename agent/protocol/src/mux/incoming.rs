//! What frames of the peer do to the state. Nothing is taken on trust.

use super::Violation;
use super::entry::Stream;
use super::frame::{Header, Kind};
use super::state::State;
use crate::limits::{MAX_STREAMS, STREAM_FIRST_STDIO};

/// Streams that the peer ended before this side opened them, remembered so that opening one late
/// gives an ended stream and not one that waits for ever.
const ENDED_BEFORE_OPEN: usize = 256;
const MAX_CREDIT: u32 = 0x00ff_ffff;

impl State {
    /// Takes the header of a frame from the peer.
    pub(super) fn header(&mut self, header: Header) -> Result<(), Violation> {
        let Header { stream: id, kind, length } = header;
        let first = !std::mem::replace(&mut self.heard, true);
        if kind == Kind::Start {
            return if first && !self.connecting { Ok(()) } else { self.restart() };
        }
        if !self.streams.contains_key(&id) && self.streams.len() >= MAX_STREAMS {
            return Err(Violation::TooManyStreams { stream: id });
        }
        let stream = self.streams.entry(id).or_insert_with(|| Stream::new(id));
        match kind {
            Kind::Data => {
                if stream.fin_received {
                    return Err(Violation::AfterEnd { stream: id, what: "data" });
                }
                if length > stream.allowance {
                    let window = stream.allowance;
                    return Err(Violation::Window { stream: id, length, window });
                }
                stream.allowance -= length;
            }
            Kind::Credit => {
                if stream.stop_received {
                    return Err(Violation::AfterEnd { stream: id, what: "credit" });
                }
                if stream.credit + length > MAX_CREDIT {
                    return Err(Violation::Credit { stream: id, credit: stream.credit, length });
                }
                stream.credit += length;
                stream.wake_writer();
            }
            Kind::Fin => {
                if std::mem::replace(&mut stream.fin_received, true) {
                    return Err(Violation::AfterEnd { stream: id, what: "end of data" });
                }
                stream.wake_reader();
                self.ended_by_peer(id);
            }
            Kind::Stop => {
                if std::mem::replace(&mut stream.stop_received, true) {
                    return Err(Violation::AfterEnd { stream: id, what: "end of reading" });
                }
                stream.queue.clear();
                stream.queued = 0;
                stream.fin_wanted = true;
                stream.wake_writer();
                self.control.push(id);
                self.wake_driver();
                self.ended_by_peer(id);
            }
            Kind::Start => {}
        }
        Ok(())
    }

    /// The peer is done with a stream. If this side never opened it, nobody will answer but here.
    fn ended_by_peer(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let done = stream.fin_received && stream.stop_received;
        if done && !stream.opened && stream.received.is_empty() {
            if self.ended.len() == ENDED_BEFORE_OPEN {
                self.ended.pop_front();
            }
            self.ended.push_back(id);
            self.close(id);
        }
        self.forget_if_over(id);
    }

    /// Takes payload that [`State::header`] has allowed.
    pub(super) fn payload(&mut self, id: u32, data: &[u8]) {
        // A stream closed here has said so; what was under way then is dropped.
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.stop_wanted
        {
            stream.received.extend_from_slice(data);
            stream.wake_reader();
        }
    }

    /// A new host on the same guest: a clone of a template. Nothing may be under way; the fixed
    /// streams begin anew, all others end.
    fn restart(&mut self) -> Result<(), Violation> {
        if self.connecting || self.in_flight.is_some() {
            return Err(Violation::Restart);
        }
        self.control.clear();
        self.urgent.clear();
        self.bulk.clear();
        self.ended.clear();
        self.pool_used = 0;
        self.streams.retain(|_, stream| stream.opened && !stream.dropped);
        for (id, stream) in &mut self.streams {
            stream.wake_reader();
            stream.wake_writer();
            let fixed = *id < STREAM_FIRST_STDIO;
            let anew = if fixed { Stream::new(*id) } else { Stream::ended(*id) };
            *stream = Stream { opened: true, held: stream.held, ..anew };
        }
        Ok(())
    }
}
