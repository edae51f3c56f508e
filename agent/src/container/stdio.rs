//! What a process reads and writes: pipes to the agent, or a terminal.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};

use super::{Error, sys};

/// Room in an output pipe: a process that prints much is scheduled away less often.
const PIPE_BYTES: i32 = 1 << 20;

/// What a process is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProcessIo {
    /// Pipes as standard input, output and error, for those that are wanted; `/dev/null` for others.
    Pipes([bool; 3]),
    /// A new pseudo terminal of the container's own devpts.
    Terminal {
        /// Columns; 0 leaves the size alone.
        width: u16,
        /// Rows.
        height: u16,
    },
}

impl ProcessIo {
    /// Which pipes it has.
    pub(crate) fn pipes(self) -> [bool; 3] {
        match self {
            Self::Pipes(wanted) => wanted,
            Self::Terminal { .. } => [false; 3],
        }
    }

    /// Columns and rows of its terminal.
    pub(crate) fn terminal(self) -> Option<(u16, u16)> {
        match self {
            Self::Pipes(_) => None,
            Self::Terminal { width, height } => Some((width, height)),
        }
    }
}

/// The agent's ends.
#[derive(Debug, Default)]
pub(crate) struct AgentEnds {
    /// Of standard input, output and error.
    pub(crate) pipes: [Option<OwnedFd>; 3],
    /// The end of the terminal to read and write.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Both ends of a process's standard three.
#[derive(Debug)]
pub(crate) struct Pipes {
    pub(crate) theirs: [OwnedFd; 3],
    pub(crate) ours: [Option<OwnedFd>; 3],
}

impl Pipes {
    /// Makes those that are wanted; the others lead to `/dev/null`.
    pub(crate) fn new(wanted: [bool; 3]) -> Result<Pipes, Error> {
        let make = || -> io::Result<Pipes> {
            let [stdin, stdout, stderr] = wanted;
            let (stdin, to_stdin) = if stdin { input()? } else { (null()?, None) };
            let (stdout, from_stdout) = if stdout { output()? } else { (null()?, None) };
            let (stderr, from_stderr) = if stderr { output()? } else { (null()?, None) };
            Ok(Pipes {
                theirs: [stdin, stdout, stderr],
                ours: [to_stdin, from_stdout, from_stderr],
            })
        };
        make().map_err(|error| Error::failed(format!("making a process's pipes: {error}")))
    }
}

fn input() -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let (read, write) = pipe()?;
    Ok((read, Some(write)))
}

fn output() -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let (read, write) = pipe()?;
    Ok((write, Some(read)))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    // Where the kernel allows less, less serves too.
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    Ok((read, write))
}

fn null() -> io::Result<OwnedFd> {
    OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from)
}

/// In a process that was given all pipes: puts `/dev/null` in place of those that are not wanted.
pub(crate) fn keep(wanted: [bool; 3]) -> io::Result<()> {
    if wanted == [true; 3] {
        return Ok(());
    }
    let null = null()?;
    for (target, _) in (0..).zip(wanted).filter(|(_, wanted)| !wanted) {
        sys::duplicate_to(null.as_raw_fd(), target)?;
    }
    Ok(())
}
