//! The program that a rehearsal's container runs: this binary, from an image of its own.
//!
//! A machine that waits for a sandbox runs one container before it is anybody's, so that a pod's first
//! container finds everything on its way translated, loaded and cached (see
//! [`joey_protocol::ids::REHEARSAL`]). What the program does is what most programs do first.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

/// What tells this program from the guest's init process.
pub(crate) const ARGUMENT: &str = "rehearse";

/// Says that it runs, and waits for the end of its input.
pub(crate) fn main() -> ExitCode {
    let mut output = std::io::stdout();
    let said = output.write_all(b"ready\n").and_then(|()| output.flush());
    let listened = std::io::stdin().read_to_end(&mut Vec::new());
    if said.is_ok() && listened.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
