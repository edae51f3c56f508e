//! The shim's log: containerd's `log` FIFO in the bundle, which containerd copies into its own log.
//!
//! A log line must never stop a pod: the FIFO is written without blocking, and what containerd does
//! not read in time is dropped. Holding both ends open keeps the FIFO alive while containerd restarts.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Mutex;

/// Writes and forgets: errors are the reader's loss.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // One write per line: up to PIPE_BUF bytes go in whole or not at all (pipe(7)).
        let _ = self.0.write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what the process warns of to its standard error. Call once.
pub fn init_tool() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .with_writer(io::stderr)
        .init();
}

/// Sends the process's log to the FIFO of `bundle`; without one (a shim started by hand) nothing is
/// logged. Call once.
pub fn init(bundle: &Path, debug: bool) {
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::INFO };
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(bundle.join("log"));
    if let Ok(fifo) = fifo {
        tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_target(false)
            .with_writer(Mutex::new(Lossy(fifo)))
            .init();
    }
}
