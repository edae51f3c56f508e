//! Where the harness finds what was built and installed.

use std::path::{Path, PathBuf};

/// The repository's root folder.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Folder that `cargo xtask deps` fills.
pub fn deps() -> PathBuf {
    std::env::var_os("JOEY_DEPS").map_or_else(|| repository().join("target/deps"), PathBuf::from)
}

/// Folder of the binaries under test (`containerd-shim-joey-v2`, `joey`).
///
/// xtask names it in `JOEY_BIN`; otherwise it is where this process was built.
pub fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("JOEY_BIN") {
        return PathBuf::from(folder);
    }
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("/"));
    match folder.file_name() {
        // Test binaries are one folder deeper.
        Some(name) if name == "deps" => folder.parent().unwrap_or(folder).to_path_buf(),
        _ => folder.to_path_buf(),
    }
}

/// Folder of the guest image that `cargo xtask guest` builds.
pub fn guest() -> PathBuf {
    std::env::var_os("JOEY_GUEST").map_or_else(|| repository().join("target/guest"), PathBuf::from)
}

/// The shim under test.
pub fn shim() -> PathBuf {
    binaries().join("containerd-shim-joey-v2")
}

/// The program that containers of tests run where busybox does not suffice (`probe/`), linked statically.
pub fn probe() -> PathBuf {
    repository().join("target/x86_64-unknown-linux-gnu/release/joey-probe")
}

/// The operator's tool under test.
pub fn joey() -> PathBuf {
    binaries().join("joey")
}

/// The mesh's proxy of tests.
pub fn proxy() -> PathBuf {
    binaries().join("joey-proxy")
}
