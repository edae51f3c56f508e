//! The guest's end of a process's stdio: pipes and terminals joined to streams of the channel.
//!
//! Each direction is one task that copies until the end, so a slow reader on the host fills the
//! channel's window, then the pipe, and at last stops the process: back-pressure without a buffer
//! that grows. Output runs on after the process ended until its last byte is sent; the host learns
//! of the exit at once and waits for the stream's end. Input stops with the process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use joey_protocol::api;
use joey_protocol::limits::STREAM_FIRST_STDIO;
use joey_protocol::mux::{Mux, MuxStream, OpenError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::container::{AgentEnds, ProcessIo};
use crate::fd_io::FdIo;
use crate::sys;

/// Most bytes dropped at once, when nobody listens.
const DROP_BYTES: usize = 64 << 10;

/// Why a process's stdio could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// A stream's number is one of the channel's own.
    #[error("stdio stream {0}: numbers below {STREAM_FIRST_STDIO} are not for stdio")]
    Reserved(u32),
    /// The stream does not open.
    #[error("stdio: {0}")]
    Stream(#[from] OpenError),
    /// A pipe, terminal or /dev/null could not be opened.
    #[error("making a process's stdio: {0}")]
    File(#[from] io::Error),
    /// The request contradicts itself.
    #[error("a process with a terminal has one output stream, not a separate stderr")]
    StderrOfTerminal,
}

/// The agent's half of a process's stdio, before the process exists.
pub(crate) struct Ends {
    stdin: Option<MuxStream>,
    stdout: Option<MuxStream>,
    stderr: Option<MuxStream>,
}

/// A running process's stdio.
#[derive(Debug, Default)]
pub(crate) struct Pumps {
    input: Option<JoinHandle<()>>,
    terminal: Option<OwnedFd>,
}

/// Opens the streams and says what the process is to have as its standard three.
pub(crate) fn prepare(mux: &Mux, stdio: &api::Stdio) -> Result<(Ends, ProcessIo), StdioError> {
    if stdio.terminal && stdio.stderr != 0 {
        return Err(StdioError::StderrOfTerminal);
    }
    let stdin = open(mux, stdio.stdin)?;
    let stdout = open(mux, stdio.stdout)?;
    let stderr = open(mux, stdio.stderr)?;
    let io = match stdio.terminal {
        true => ProcessIo::Terminal { width: clamp(stdio.width), height: clamp(stdio.height) },
        false => ProcessIo::Pipes([stdin.is_some(), stdout.is_some(), stderr.is_some()]),
    };
    Ok((Ends { stdin, stdout, stderr }, io))
}

fn open(mux: &Mux, number: u32) -> Result<Option<MuxStream>, StdioError> {
    if number == 0 {
        return Ok(None);
    }
    if number < STREAM_FIRST_STDIO {
        return Err(StdioError::Reserved(number));
    }
    Ok(Some(mux.open(number)?))
}

fn clamp(cells: u32) -> u16 {
    u16::try_from(cells).unwrap_or(u16::MAX)
}

impl Ends {
    /// Starts copying from and to the agent's ends.
    pub(crate) fn run(self, ends: AgentEnds) -> Result<Pumps, StdioError> {
        let mut pumps = Pumps::default();
        let [mut stdin, mut stdout, stderr] = ends.pipes;
        if let Some(terminal) = ends.terminal {
            if self.stdin.is_some() {
                stdin = Some(terminal.try_clone()?);
            }
            // Read even when nobody listens, or the process would stop at a full terminal.
            stdout = Some(terminal.try_clone()?);
            pumps.terminal = Some(terminal);
        }
        if let (Some(stream), Some(pipe)) = (self.stdin, stdin) {
            pumps.input = Some(tokio::spawn(pump_in(stream, FdIo::new(pipe)?)));
        }
        for (stream, pipe) in [(self.stdout, stdout), (self.stderr, stderr)] {
            if let Some(pipe) = pipe {
                tokio::spawn(pump_out(FdIo::new(pipe)?, stream));
            }
        }
        Ok(pumps)
    }
}

impl Pumps {
    /// The process has ended: nobody reads its input any more. Output goes on to its end.
    pub(crate) fn stop_input(&mut self) {
        if let Some(task) = self.input.take() {
            task.abort();
        }
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, width: u32, height: u32) -> io::Result<()> {
        let Some(terminal) = &self.terminal else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it has no terminal"));
        };
        sys::set_window_size(terminal.as_fd(), clamp(width), clamp(height))
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.stop_input();
    }
}

/// From the host to the process. The process closing its end drops the stream, which tells the host.
async fn pump_in(mut stream: MuxStream, mut pipe: FdIo) {
    let _ = tokio::io::copy_buf(&mut stream, &mut pipe).await;
}

/// From the process to the host. A host that stops listening must not stop the process, nor kill it
/// with SIGPIPE: what comes then is read and dropped.
async fn pump_out(pipe: FdIo, stream: Option<MuxStream>) {
    if let Some(mut stream) = stream
        && send_all(&pipe, &mut stream).await.is_ok()
    {
        let _ = stream.shutdown().await;
        return;
    }
    let mut dropped = Vec::with_capacity(DROP_BYTES);
    let mut pipe = pipe;
    while matches!(pipe.read_buf(&mut dropped).await, Ok(count) if count > 0) {
        dropped.clear();
    }
}

/// Reads straight into the channel's own buffer until the process's end. An error means that the
/// host listens no more.
async fn send_all(pipe: &FdIo, stream: &mut MuxStream) -> io::Result<()> {
    loop {
        stream.writable().await?;
        let read = pipe.read_with(|fd| {
            let mut asked = false;
            let result = stream.write_with(|room| {
                asked = true;
                sys::read(fd, room)
            });
            match result {
                // Without room the pipe was not asked, and must not count as empty.
                Err(error) if !asked && error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                result => result.map(Some),
            }
        });
        if read.await? == Some(0) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Pipes;

    /// Both ends of a channel, running.
    fn channel() -> (Mux, Mux) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (guest, guest_driver) = Mux::new(near);
        let (host, host_driver) = Mux::connect(far);
        tokio::spawn(guest_driver);
        tokio::spawn(host_driver);
        (guest, host)
    }

    fn stdio(stdin: u32, stdout: u32) -> api::Stdio {
        api::Stdio { stdin, stdout, ..Default::default() }
    }

    /// The process's ends, and the pumps at work on the agent's.
    fn run(ends: Ends, io: ProcessIo) -> ([OwnedFd; 3], Pumps) {
        let Pipes { theirs, ours } = Pipes::new(io.pipes()).unwrap();
        (theirs, ends.run(AgentEnds { pipes: ours, terminal: None }).unwrap())
    }

    #[tokio::test]
    async fn output_arrives_whole_after_the_writer_has_gone() {
        let (guest, host) = channel();
        let mut stream = host.open(17).unwrap();
        let (ends, io) = prepare(&guest, &stdio(0, 17)).unwrap();
        let ([_, stdout, _], _pumps) = run(ends, io);
        let expected: Vec<u8> = (0..8_000_000_u32).map(|n| (n / 7) as u8).collect();
        let sent = expected.clone();
        let writer = std::thread::spawn(move || {
            io::Write::write_all(&mut std::fs::File::from(stdout), &sent).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).await.unwrap();
        assert!(received == expected);
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn a_host_that_stops_listening_does_not_stop_the_process() {
        let (guest, host) = channel();
        drop(host.open(17).unwrap());
        let (ends, io) = prepare(&guest, &stdio(0, 17)).unwrap();
        let ([_, stdout, _], _pumps) = run(ends, io);
        let mut stdout = FdIo::new(stdout).unwrap();
        stdout.write_all(&vec![1; 8 << 20]).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_input_closes_the_pipe() {
        let (guest, host) = channel();
        let mut stream = host.open(16).unwrap();
        let (ends, io) = prepare(&guest, &stdio(16, 0)).unwrap();
        let ([stdin, ..], _pumps) = run(ends, io);
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut received = Vec::new();
        FdIo::new(stdin).unwrap().read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"hello");
    }

    #[tokio::test]
    async fn a_terminal_has_no_stderr_and_numbers_are_used_once() {
        let (guest, _host) = channel();
        let mut request = stdio(0, 17);
        request.terminal = true;
        request.stderr = 18;
        assert!(matches!(prepare(&guest, &request), Err(StdioError::StderrOfTerminal)));
        let _first = prepare(&guest, &stdio(0, 20)).unwrap();
        assert!(matches!(prepare(&guest, &stdio(0, 20)), Err(StdioError::Stream(_))));
        assert!(matches!(prepare(&guest, &stdio(0, 1)), Err(StdioError::Reserved(1))));
    }
}
