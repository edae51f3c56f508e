//! Moves bytes between the channel and the state.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{HEADER, Header, Kind};
use super::{MuxError, Shared};

/// Largest read from the channel.
const READ: usize = 64 * 1024;
/// Reads and writes after which other tasks get their turn.
const TURN: u32 = 64;

/// Carries a channel's frames; a future that ends with the channel, never with `Ok` alone: the peer's
/// orderly end is [`MuxError::Closed`].
#[derive(Debug)]
#[must_use = "nothing moves unless the driver is run"]
pub struct Driver<T> {
    io: T,
    shared: Shared,
    output: Vec<u8>,
    output_end: usize,
    written: usize,
    input: Box<[u8]>,
    parser: Parser,
}

/// Where in a frame the input is.
#[derive(Debug, Default)]
struct Parser {
    header: [u8; HEADER],
    header_length: usize,
    stream: u32,
    payload: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    pub(super) fn new(io: T, shared: Shared) -> Self {
        Self {
            io,
            shared,
            output: Vec::new(),
            output_end: 0,
            written: 0,
            input: vec![0; READ].into_boxed_slice(),
            parser: Parser::default(),
        }
    }

    /// Writes one piece; ready with false if there is nothing to write.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, MuxError>> {
        if self.written == self.output_end {
            let done = std::mem::take(&mut self.output);
            self.written = 0;
            self.output_end = 0;
            let Some((output, end)) = self.shared.lock().next_output(done) else {
                return Poll::Ready(Ok(false));
            };
            self.output = output;
            self.output_end = end;
        }
        let rest = &self.output[self.written..self.output_end];
        let count = match ready!(Pin::new(&mut self.io).poll_write(cx, rest)) {
            Ok(count) => count,
            // What the peer sent before it went is still to be read; reading then finds the end.
            Err(error) if gone(&error) => rest.len(),
            Err(error) => return Poll::Ready(Err(MuxError::Write(error))),
        };
        if count == 0 {
            return Poll::Ready(Err(MuxError::Write(io::ErrorKind::WriteZero.into())));
        }
        self.written += count;
        Poll::Ready(Ok(true))
    }

    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        let mut buffer = ReadBuf::new(&mut self.input);
        match ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer)) {
            Ok(()) => {}
            // A peer that went without reading everything: for us no other end than a close.
            Err(error) if gone(&error) => {}
            Err(error) => return Poll::Ready(Err(MuxError::Read(error))),
        }
        let data = buffer.filled();
        if data.is_empty() {
            let inside = self.parser.header_length > 0 || self.parser.payload > 0;
            return Poll::Ready(Err(if inside { MuxError::Truncated } else { MuxError::Closed }));
        }
        self.parser.take(data, &self.shared)?;
        Poll::Ready(Ok(()))
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        {
            let mut state = self.shared.lock();
            state.driver = Some(cx.waker().clone());
        }
        for _ in 0..TURN {
            let wrote = matches!(self.poll_output(cx)?, Poll::Ready(true));
            let read = self.poll_input(cx)?.is_ready();
            if !wrote && !read {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl Parser {
    fn take(&mut self, mut data: &[u8], shared: &Shared) -> Result<(), MuxError> {
        let mut state = shared.lock();
        while !data.is_empty() {
            if self.payload > 0 {
                let (piece, rest) = data.split_at(data.len().min(self.payload));
                state.payload(self.stream, piece);
                self.payload -= piece.len();
                data = rest;
                continue;
            }
            let (piece, rest) = data.split_at(data.len().min(HEADER - self.header_length));
            self.header[self.header_length..][..piece.len()].copy_from_slice(piece);
            self.header_length += piece.len();
            data = rest;
            if self.header_length == HEADER {
                self.header_length = 0;
                let header = Header::decode(self.header)?;
                state.header(header)?;
                if header.kind == Kind::Data {
                    self.stream = header.stream;
                    self.payload = header.length as usize;
                }
            }
        }
        Ok(())
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Driver<T> {
    type Output = Result<(), MuxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let result = ready!(this.poll_turn(cx));
        if let Err(error) = &result {
            this.shared.lock().lose(error.to_string());
        }
        Poll::Ready(result)
    }
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        self.shared.lock().lose("this side stopped serving it".to_owned());
    }
}
