//! The snapshotter's configuration: a TOML file whose unknown keys are refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the configuration is unless the command line says otherwise.
pub const DEFAULT: &str = "/etc/joey/snapshotter.toml";

/// Settings; each has a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Folder of the store. It must be on one file system.
    pub root: PathBuf,
    /// Unix socket for containerd.
    pub socket: PathBuf,
    /// containerd's own socket, from which layers are read.
    pub containerd: PathBuf,
    /// Most bytes that the files of one layer may have together, holes included, and that its stream
    /// may have when it is decompressed.
    pub max_layer_bytes: u64,
    /// `run_dir` of the shims, where they write down what containers have written.
    pub run_dir: PathBuf,
    /// Unix socket on which metrics are given, if at all.
    pub metrics: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/joey-snapshotter".into(),
            socket: "/run/joey/snapshotter.sock".into(),
            containerd: "/run/containerd/containerd.sock".into(),
            max_layer_bytes: 64 << 30,
            run_dir: "/run/joey".into(),
            metrics: None,
        }
    }
}

impl Config {
    /// Reads `path`, or the default one, which may be missing.
    ///
    /// # Errors
    /// The file cannot be read, or says what is not understood; the message names it.
    pub fn load(path: Option<&Path>) -> Result<Self, String> {
        let file = path.unwrap_or(Path::new(DEFAULT));
        match std::fs::read_to_string(file) {
            Ok(text) => {
                toml::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))
            }
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(format!("{}: {error}", file.display())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_packaged_file_has_every_default_and_others_are_refused() {
        let packaged = include_str!("../../packaging/config/snapshotter.toml");
        assert_eq!(toml::from_str::<Config>(packaged).unwrap(), Config::default());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "rot = 1").unwrap();
        let error = Config::load(Some(file.path())).unwrap_err();
        assert!(error.contains("rot") && error.contains(file.path().to_str().unwrap()), "{error}");
        assert!(Config::load(Some(Path::new("/nowhere"))).unwrap_err().contains("/nowhere"));
    }
}
