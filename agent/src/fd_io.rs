//! Pipes, ports and terminals as asynchronous byte streams, without threads and without polling.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys;

/// A non-blocking descriptor in the event loop.
///
/// Reading a terminal whose last user has gone fails with `EIO`; that is its end of file.
#[derive(Debug)]
pub(crate) struct FdIo(AsyncFd<OwnedFd>);

impl FdIo {
    /// Makes the descriptor non-blocking and registers it with the event loop.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        sys::set_nonblocking(fd.as_fd())?;
        sys::register(fd, Interest::READABLE | Interest::WRITABLE).map(Self)
    }
}

impl FdIo {
    /// Waits until there is something to read and lets `read` read it; nothing (`Some(0)`) is the
    /// end, as with any descriptor. `read` must ask the descriptor before it says that it would block.
    pub(crate) async fn read_with(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<Option<usize>>,
    ) -> io::Result<Option<usize>> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|fd| read(fd.get_ref().as_fd())) {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(Some(0)),
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}

impl AsFd for FdIo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for FdIo {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            match guard.try_io(|fd| sys::read_buf(fd.get_ref().as_fd(), buffer)) {
                Ok(Ok(_)) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for FdIo {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let written =
                guard.try_io(|fd| nix::unistd::write(fd.get_ref(), data).map_err(io::Error::from));
            match written {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Dropping the descriptor closes it; there is nothing to do before.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn carries_more_than_a_pipe_holds() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (mut read, mut write) = (FdIo::new(read).unwrap(), FdIo::new(write).unwrap());
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move { write.write_all(&sent).await });
        let mut received = Vec::new();
        read.read_to_end(&mut received).await.unwrap();
        writer.await.unwrap().unwrap();
        assert!(received == expected);
    }

    #[tokio::test]
    async fn a_terminal_left_by_its_user_ends() {
        let pty = nix::pty::openpty(None, None).unwrap();
        nix::unistd::write(&pty.slave, b"bye").unwrap();
        drop(pty.slave);
        let mut received = Vec::new();
        FdIo::new(pty.master).unwrap().read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"bye");
    }
}
