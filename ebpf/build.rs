//! Compiles the programs in `bpf/` with clang and hands the crate the object and its digest.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use sha2::{Digest as _, Sha256};

const SOURCE: &str = "bpf/wire.bpf.c";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let directory = std::env::var("OUT_DIR")?;
    let object = Path::new(&directory).join("wire.bpf.o");
    let status = Command::new(&clang)
        // No path of the building machine gets into the object: its digest names the pin.
        .args(["-O2", "-g", "-fdebug-prefix-map=.=", "-fdebug-compilation-dir=/joey"])
        .args(["-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"])
        // Debian keeps the kernel's asm/ headers there, which the bpf target does not search.
        .arg("-I/usr/include/x86_64-linux-gnu")
        .args(["-c", SOURCE, "-o"])
        .arg(&object)
        .status()
        .map_err(|error| {
            format!(
                "running {clang} for {SOURCE}: {error}; install clang 14 or later, or set CLANG"
            )
        })?;
    if !status.success() {
        return Err(format!(
            "{clang} could not compile {SOURCE} ({status}); it needs clang 14 or later and the \
             kernel's user headers (linux-libc-dev)"
        )
        .into());
    }
    let mut digest = String::new();
    for byte in Sha256::digest(std::fs::read(&object)?).iter().take(8) {
        write!(digest, "{byte:02x}")?;
    }
    println!("cargo:rustc-env=JOEY_WIRE_OBJECT={}", object.display());
    println!("cargo:rustc-env=JOEY_WIRE_DIGEST={digest}");
    Ok(())
}
