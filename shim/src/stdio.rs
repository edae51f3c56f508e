//! The host's end of a process's stdin, stdout and stderr, as containerd names them.
//!
//! | name | meaning |
//! | --- | --- |
//! | empty | none |
//! | a path, `fifo://path` | FIFO, kept open at both ends: a reader may go away and come back |
//! | `file://path` | appended to; stdout and stderr may be one file |
//! | `binary://path?args` | a logger with fds 3 and 4 to read, 5 to close when ready |
//!
//! ```text
//!   Stdio::open ── files opened, logger started
//!      └─ attach ── one channel stream each, copy tasks run ──> Copies
//!                      close_stdin (CloseIO) · drained (before Exit and Delete) · drop: all end
//! ```
//!
//! A reader that stalls stops the process in the guest that writes, and nothing else.

mod copy;
mod logger;
mod sys;
#[cfg(test)]
mod tests;
mod uri;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;

use joey_protocol::api;
use joey_protocol::mux::{MuxStream, OpenError};
use tokio::net::unix::pipe;

use self::copy::Sink;
pub use self::copy::{Copies, DRAIN};
use self::logger::Logger;
use self::uri::Target;

/// Why stdio is refused or does not open.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the messages say")]
pub enum StdioError {
    /// A scheme that there is not.
    #[error(
        "{name} {uri:?} is not supported: it must be a FIFO's path, fifo://, file:// or binary://"
    )]
    Scheme { name: &'static str, uri: String },
    /// A path that cannot be one.
    #[error("{name} {uri:?} does not name an absolute path")]
    Path { name: &'static str, uri: String },
    /// stdin can only be a FIFO.
    #[error("stdin {uri:?} is not supported: it must be a FIFO")]
    Stdin { uri: String },
    /// Opening failed.
    #[error("opening {name} {path:?}: {source}")]
    Open { name: &'static str, path: PathBuf, source: io::Error },
    /// The logger does not start.
    #[error("starting the logger {program:?}: {source}")]
    Logger { program: PathBuf, source: io::Error },
    /// The logger is not ready in time.
    #[error("the logger {program:?} did not close fd 5 (\"ready\") within {seconds} s")]
    LoggerNotReady { program: PathBuf, seconds: u64 },
    /// No stream.
    #[error(transparent)]
    Stream(#[from] OpenError),
}

/// What ends the data of a stdin FIFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StdinEnd {
    /// CloseIO only: the last writer may be followed by another (task service 3).
    CloseIo,
    /// CloseIO, or the last writer's close.
    LastWriter,
}

/// A process's stdio, as containerd gives it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// containerd's namespace, told to a logger.
    pub namespace: &'a str,
    /// The container, told to a logger.
    pub container: &'a str,
    /// Standard input.
    pub stdin: &'a str,
    /// Standard output.
    pub stdout: &'a str,
    /// Standard error; none with a terminal.
    pub stderr: &'a str,
    /// The process has a terminal.
    pub terminal: bool,
    /// What ends stdin.
    pub stdin_end: StdinEnd,
}

/// Opened, not yet joined to a process.
#[derive(Debug)]
pub struct Stdio {
    terminal: bool,
    stdin: Option<pipe::Receiver>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Stdio {
    /// Opens everything; waits for nothing but a logger to be ready.
    pub async fn open(request: Request<'_>) -> Result<Self, StdioError> {
        let stdin = match uri::parse("stdin", request.stdin)? {
            Target::None => None,
            Target::Fifo(path) => Some(open_stdin(path, request.stdin_end)?),
            _ => {
                return Err(StdioError::Stdin { uri: request.stdin.to_owned() });
            }
        };
        let stdout = uri::parse("stdout", request.stdout)?;
        let stderr = if request.terminal { "" } else { request.stderr };
        let stderr = uri::parse("stderr", stderr)?;
        let mut stdio =
            Self { terminal: request.terminal, stdin, stdout: None, stderr: None, logger: None };
        // One logger serves both, as with containerd's own shim.
        let (stdout, stderr) = match (stdout, stderr) {
            (Target::Binary { program, args }, stderr) => {
                let (logger, out, err) =
                    logger::start(program, &args, request.container, request.namespace).await?;
                stdio.logger = Some(logger);
                let both = matches!(stderr, Target::Binary { .. });
                stdio.stdout = Some(Sink::Pipe(out));
                stdio.stderr = both.then_some(Sink::Pipe(err));
                (Target::None, if both { Target::None } else { stderr })
            }
            (stdout, stderr) => (stdout, stderr),
        };
        if let Some(sink) = open_output("stdout", stdout)? {
            stdio.stdout = Some(sink);
        }
        if let Some(sink) = open_output("stderr", stderr)? {
            stdio.stderr = Some(sink);
        }
        Ok(stdio)
    }

    /// Opens the channel streams and starts copying. The message goes into the request that creates
    /// the process; its size of the terminal is left zero.
    pub fn attach(
        self,
        mut open: impl FnMut() -> Result<MuxStream, OpenError>,
    ) -> Result<(api::Stdio, Copies), StdioError> {
        let mut message = api::Stdio::new();
        message.terminal = self.terminal;
        let mut copies = Copies::new(self.logger);
        if let Some(fifo) = self.stdin {
            let stream = open()?;
            message.stdin = stream.id();
            copies.add_input(fifo, stream);
        }
        if let Some(sink) = self.stdout {
            let stream = open()?;
            message.stdout = stream.id();
            copies.add_output(stream, sink);
        }
        if let Some(sink) = self.stderr {
            let stream = open()?;
            message.stderr = stream.id();
            copies.add_output(stream, sink);
        }
        Ok((message, copies))
    }
}

fn open_stdin(path: PathBuf, end: StdinEnd) -> Result<pipe::Receiver, StdioError> {
    // With a writer of our own, the end of the last other one is no end of file.
    let keep = end == StdinEnd::CloseIo;
    let opened = pipe::OpenOptions::new().read_write(keep).open_receiver(&path);
    opened.map_err(|source| StdioError::Open { name: "stdin", path, source })
}

fn open_output(name: &'static str, target: Target) -> Result<Option<Sink>, StdioError> {
    let opened = match &target {
        Target::None => return Ok(None),
        // With a reader of our own there is no broken pipe while containerd restarts.
        Target::Fifo(path) => {
            pipe::OpenOptions::new().read_write(true).open_sender(path).map(Sink::Pipe)
        }
        Target::File(path) => append(path).map(Sink::File),
        Target::Binary { .. } => Err(io::Error::other("a logger must be given as stdout, too")),
    };
    opened.map(Some).map_err(|source| StdioError::Open { name, path: target.into_path(), source })
}

/// As containerd's own shim does: with the folders that lead there.
fn append(path: &PathBuf) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    OpenOptions::new().append(true).create(true).open(path)
}
