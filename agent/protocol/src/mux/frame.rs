//! The frame: eight bytes of header, then the payload of a data frame.
//!
//! Header, little endian: stream `u32`; then `u32` whose low byte is the kind and whose upper 24 bits
//! are the length. Only data frames have a payload; in a credit frame the length is the credit.

use super::Violation;
use crate::limits::MAX_FRAME;

pub(super) const HEADER: usize = 8;
/// Most that is sent in one frame: with its header 32 KiB, which the guest's kernel takes from one
/// write to the port and hands on as one buffer.
pub(super) const PAYLOAD: usize = 32 * 1024 - HEADER;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Payload of a stream.
    Data,
    /// The sender of this frame takes so many further bytes.
    Credit,
    /// No data follows from the sender of this frame.
    Fin,
    /// The sender of this frame reads no more.
    Stop,
    /// Host to guest, stream 0, first frame of a connection: forget what was before.
    Start,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Credit => 2,
            Self::Fin => 3,
            Self::Stop => 4,
            Self::Start => 5,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) stream: u32,
    pub(super) kind: Kind,
    pub(super) length: u32,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER] {
        let word = (self.length << 8) | u32::from(self.kind.code());
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&self.stream.to_le_bytes());
        bytes[4..].copy_from_slice(&word.to_le_bytes());
        bytes
    }

    /// Everything about a header that can be judged without knowing the stream.
    pub(super) fn decode(bytes: [u8; HEADER]) -> Result<Self, Violation> {
        let [a, b, c, d, kind, e, f, g] = bytes;
        let stream = u32::from_le_bytes([a, b, c, d]);
        let length = u32::from_le_bytes([e, f, g, 0]);
        let kind = match kind {
            1 => Kind::Data,
            2 => Kind::Credit,
            3 => Kind::Fin,
            4 => Kind::Stop,
            5 => Kind::Start,
            kind => return Err(Violation::Kind { stream, kind }),
        };
        let fits = match kind {
            Kind::Data => length > 0 && length as usize <= MAX_FRAME,
            Kind::Credit => length > 0,
            Kind::Fin | Kind::Stop => length == 0,
            Kind::Start => length == 0 && stream == 0,
        };
        if fits {
            Ok(Self { stream, kind, length })
        } else {
            Err(Violation::Length { stream, kind: kind.code(), length })
        }
    }
}

/// A data frame that is being filled or waits to be sent: room for the header is kept in front, so
/// that header and payload leave in one write without another copy.
#[derive(Debug)]
pub(super) struct Frame {
    buffer: Vec<u8>,
    end: usize,
}

impl Frame {
    /// Around a buffer that was used before, or a new one.
    pub(super) fn new(mut buffer: Vec<u8>, payload: usize) -> Self {
        if buffer.len() < HEADER + payload {
            buffer.resize(HEADER + payload, 0);
        }
        Self { buffer, end: HEADER }
    }

    pub(super) fn payload(&self) -> usize {
        self.end - HEADER
    }

    /// Appends as much of `data` as one frame may hold.
    pub(super) fn append(&mut self, data: &[u8]) -> usize {
        let taken = data.len().min(PAYLOAD - self.payload());
        let end = self.end + taken;
        if self.buffer.len() < end {
            // Small writes come in rows: grow by doubling, not each time.
            self.buffer.resize(end.next_power_of_two().min(HEADER + PAYLOAD), 0);
        }
        self.buffer[self.end..end].copy_from_slice(&data[..taken]);
        self.end = end;
        taken
    }

    /// With the room of a full frame.
    pub(super) fn widened(mut self) -> Self {
        if self.buffer.len() < HEADER + PAYLOAD {
            self.buffer.resize(HEADER + PAYLOAD, 0);
        }
        self
    }

    /// The unused part, for filling in place.
    pub(super) fn spare(&mut self, limit: usize) -> &mut [u8] {
        let end = self.buffer.len().min(self.end.saturating_add(limit));
        &mut self.buffer[self.end..end]
    }

    /// Counts bytes that were put into [`Frame::spare`].
    pub(super) fn filled(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }

    /// The finished bytes of the frame and how many of them count.
    pub(super) fn finish(mut self, stream: u32) -> (Vec<u8>, usize) {
        let length = self.payload() as u32;
        let header = Header { stream, kind: Kind::Data, length };
        self.buffer[..HEADER].copy_from_slice(&header.encode());
        (self.buffer, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        for (kind, length) in [
            (Kind::Data, 1),
            (Kind::Data, MAX_FRAME as u32),
            (Kind::Credit, 0x00ff_ffff),
            (Kind::Fin, 0),
            (Kind::Stop, 0),
        ] {
            let header = Header { stream: 0xdead_beef, kind, length };
            assert_eq!(Header::decode(header.encode()).unwrap(), header);
        }
    }

    #[test]
    fn judges_lengths_and_kinds() {
        for (stream, kind, length) in [
            (1, Kind::Data, 0),
            (1, Kind::Data, MAX_FRAME as u32 + 1),
            (1, Kind::Credit, 0),
            (1, Kind::Fin, 1),
            (1, Kind::Stop, 9),
            (1, Kind::Start, 0),
        ] {
            let header = Header { stream, kind, length };
            assert!(Header::decode(header.encode()).is_err(), "{header:?}");
        }
        for kind in (0..=255_u8).filter(|kind| !(1..=5).contains(kind)) {
            let error = Header::decode([7, 0, 0, 0, kind, 0, 0, 0]).unwrap_err();
            assert_eq!(error, Violation::Kind { stream: 7, kind });
        }
    }
}
