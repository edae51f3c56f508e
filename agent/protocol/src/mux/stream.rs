//! One end of one stream, as a reader and writer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use super::Shared;
use crate::limits::FIRST_WINDOW;

/// One end of a stream.
///
/// Shutting it down ends the data that the peer reads. Dropping it ends both directions: what was
/// written still goes out, and the peer's writes fail with [`io::ErrorKind::BrokenPipe`].
///
/// As [`AsyncBufRead`] it hands out what has come without copying.
#[derive(Debug)]
pub struct MuxStream {
    id: u32,
    shared: Shared,
    /// Taken from the shared state as a whole; `used` of it is consumed.
    held: Vec<u8>,
    used: usize,
}

impl MuxStream {
    pub(super) fn new(id: u32, shared: Shared) -> Self {
        Self { id, shared, held: Vec::new(), used: 0 }
    }

    /// The stream's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Waits until something can be written, and gives at most how much; an error if the peer reads
    /// no more.
    pub fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let Some(stream) = state.get(self.id) else {
            return Poll::Ready(Err(broken(self.id)));
        };
        if stream.fin_wanted || stream.stop_received {
            return Poll::Ready(Err(broken(self.id)));
        }
        let room = stream.room();
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        stream.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Waits until something can be written.
    pub async fn writable(&mut self) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_writable(cx)).await
    }

    /// Lets `fill` (a `read`, say) put data straight into the buffer that will be sent. The room it
    /// gets is that of [`MuxStream::writable`], at most one frame. Returns what `fill` returns, or
    /// [`io::ErrorKind::WouldBlock`] if there is no room.
    pub fn write_with(
        &mut self,
        fill: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut state = self.shared.lock();
        let ended = |stream: &super::entry::Stream| stream.fin_wanted || stream.stop_received;
        match state.get(self.id) {
            Some(stream) if !ended(&*stream) => {
                if stream.room() == 0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
            }
            _ => return Err(broken(self.id)),
        }
        state.write_with(self.id, fill)
    }
}

fn broken(id: u32) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, format!("channel stream {id} takes no more data"))
}

impl AsyncBufRead for MuxStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.used == this.held.len() {
            let mut state = this.shared.lock();
            if let Some(stream) = state.get(this.id) {
                this.used = 0;
                this.held.clear();
                if stream.received.is_empty() {
                    if !stream.fin_received {
                        stream.reader = Some(cx.waker().clone());
                        // What a burst needed is not kept while nothing comes.
                        if this.held.capacity() > FIRST_WINDOW as usize {
                            this.held = Vec::new();
                            stream.received = Vec::new();
                        }
                        return Poll::Pending;
                    }
                } else {
                    std::mem::swap(&mut this.held, &mut stream.received);
                    stream.held = this.held.len() as u32;
                }
            }
        }
        Poll::Ready(Ok(&this.held[this.used..]))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let this = self.get_mut();
        let amount = amount.min(this.held.len() - this.used);
        if amount > 0 {
            this.used += amount;
            this.shared.lock().consumed(this.id, amount as u32);
        }
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let data = ready!(self.as_mut().poll_fill_buf(cx))?;
        let count = data.len().min(buffer.remaining());
        buffer.put_slice(&data[..count]);
        self.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let this = self.get_mut();
        ready!(this.poll_writable(cx))?;
        Poll::Ready(Ok(this.shared.lock().write(this.id, data)))
    }

    /// Ready once all that was written has been given to the channel.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        if state.flushed(self.id) {
            return Poll::Ready(Ok(()));
        }
        if let Some(stream) = state.get(self.id) {
            stream.writer = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.lock().finish(self.id);
        Poll::Ready(Ok(()))
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        self.shared.lock().close(self.id);
    }
}
