//! `joey-snapshotter`: will keep images and volumes as block data inside the sandbox boundary.
//!
//! This version of Joey has no snapshotter of its own: pods run from whatever snapshotter the node's
//! containerd uses, and the shim makes EROFS images of it. The program says so and stops, so that
//! nobody configures it by mistake.

use std::process::ExitCode;

fn main() -> ExitCode {
    use std::io::Write as _;
    // Nothing can be done about a closed standard error.
    let _ = writeln!(
        std::io::stderr(),
        "joey-snapshotter: this version of Joey has no snapshotter yet. Leave containerd's \
         `snapshotter` setting as it is (overlayfs): the shim converts images by itself."
    );
    ExitCode::FAILURE
}
