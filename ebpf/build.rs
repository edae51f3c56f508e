//! Compiles the programs in `bpf/` with clang and hands the crate each object and its digest, and makes
//! a Rust enum of the reasons in `bpf/reasons.h`.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use sha2::{Digest as _, Sha256};

const REASONS: &str = "bpf/reasons.h";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-env-changed=CLANG");
    let directory = std::env::var("OUT_DIR")?;
    let directory = Path::new(&directory);
    for name in ["wire", "policy", "mesh_guest", "services_guest"] {
        compile(name, directory)?;
    }
    // What the policy's maps hold: another version with the same layout goes on with them.
    let mut layout = Sha256::new();
    for header in ["bpf/policy.h", REASONS] {
        println!("cargo:rerun-if-changed={header}");
        for line in std::fs::read_to_string(header)?.lines() {
            let code = line.split_once("//").map_or(line, |(code, _)| code);
            // What a reason is called in words changes nothing.
            let code = code.split_once(", \"").map_or(code, |(code, _)| code).trim();
            layout.update(code);
        }
    }
    println!("cargo:rustc-env=JOEY_POLICY_LAYOUT={}", hex(&layout.finalize())?);
    std::fs::write(directory.join("reasons.rs"), reasons(&std::fs::read_to_string(REASONS)?)?)?;
    Ok(())
}

fn compile(name: &str, directory: &Path) -> Result<(), Box<dyn Error>> {
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let source = format!("bpf/{name}.bpf.c");
    let object = directory.join(format!("{name}.bpf.o"));
    let status = Command::new(&clang)
        // No path of the building machine gets into the object: its digest names the pin.
        .args(["-O2", "-g", "-fdebug-prefix-map=.=", "-fdebug-compilation-dir=/joey"])
        .args(["-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"])
        // Debian keeps the kernel's asm/ headers there, which the bpf target does not search.
        .arg("-I/usr/include/x86_64-linux-gnu")
        .args(["-c", &source, "-o"])
        .arg(&object)
        .status()
        .map_err(|error| {
            format!(
                "running {clang} for {source}: {error}; install clang 14 or later, or set CLANG"
            )
        })?;
    if !status.success() {
        return Err(format!(
            "{clang} could not compile {source} ({status}); it needs clang 14 or later and the \
             kernel's user headers (linux-libc-dev)"
        )
        .into());
    }
    let digest = hex(&Sha256::digest(std::fs::read(&object)?))?;
    let name = name.to_uppercase();
    println!("cargo:rustc-env=JOEY_{name}_OBJECT={}", object.display());
    println!("cargo:rustc-env=JOEY_{name}_DIGEST={digest}");
    Ok(())
}

/// The first bytes of a digest.
fn hex(digest: &[u8]) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    for byte in digest.iter().take(8) {
        write!(text, "{byte:02x}")?;
    }
    Ok(text)
}

/// The enum that `REASON(Name, "words")` lines stand for, numbered from 1 as the C enum is.
fn reasons(header: &str) -> Result<String, Box<dyn Error>> {
    let (mut variants, mut all, mut words) = (String::new(), String::new(), String::new());
    let lines = header.lines().filter(|line| line.starts_with("REASON("));
    for (index, line) in lines.enumerate() {
        let (name, text) = line
            .strip_prefix("REASON(")
            .and_then(|line| line.strip_suffix("\")")?.split_once(", \""))
            .ok_or_else(|| format!("{REASONS}: {line:?} is not REASON(Name, \"words\")"))?;
        writeln!(variants, "    /// Dropped: {text}.\n    {name} = {},", index + 1)?;
        writeln!(all, "        Self::{name},")?;
        writeln!(words, "            Self::{name} => {text:?},")?;
    }
    Ok(format!(
        "/// Why a packet is dropped; the numbers are those of `bpf/reasons.h`.\n\
         #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]\n#[repr(u32)]\n\
         pub enum Reason {{\n{variants}}}\n\n\
         impl Reason {{\n    /// Every reason, in the order of their numbers.\n    \
         pub const ALL: &'static [Self] = &[\n{all}    ];\n\n    /// The reason in words.\n    \
         #[must_use]\n    pub fn words(self) -> &'static str {{\n        match self {{\n{words}        \
         }}\n    }}\n}}\n"
    ))
}
