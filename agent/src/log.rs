//! The agent's log: one line a message on the guest's console, preceded by the time since boot.
//!
//! Deliberately tiny: every line costs exits of the virtual machine's serial port, so the agent
//! speaks when something begins, ends or fails, never on a container's normal path.

use std::fmt::Arguments;
use std::io::Write;

/// Writes one line to the console; a console that is gone is no reason to fail.
pub(crate) fn line(level: &str, message: Arguments<'_>) {
    let now = crate::sys::monotonic();
    let text =
        format!("joey-agent {}.{:06} {level} {message}\n", now.as_secs(), now.subsec_micros());
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Logs what an operator may want to see when reading the console.
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::line("info", format_args!($($arg)*)) };
}

/// Logs a failure that the agent survives.
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::line("warning", format_args!($($arg)*)) };
}

pub(crate) use {info, warning};

/// Says that a test did not run, past the harness, which keeps for itself what a passing test prints.
#[cfg(test)]
pub(crate) fn skipped(name: &str, why: &str) {
    let _ = std::io::stdout().write_all(format!("\nSKIPPED {name}: {why}\n").as_bytes());
}
