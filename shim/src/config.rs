//! The node's configuration: defaults, then the file, then the runtime's options, checked once.
//!
//! A [`Config`] that exists is valid: everything behind it reads fields and never checks again.
//! The file is `/etc/joey/config.toml`, moved by `JOEY_CONFIG` and, above that, by the runtime
//! options' `ConfigPath`. A file somebody named must exist; the default one need not.

use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use joey_protocol::limits::MAX_POD_DISK;
use protobuf::CodedInputStream;
use serde::Deserialize;

use crate::policy::tenant;
use crate::services::Mode;

/// Where the file is when nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/joey/config.toml";

/// Sizes that a writable disk can have: the smallest is that of the blank in the guest image, the largest
/// what its tables have room for.
pub const DISK_MIB: std::ops::RangeInclusive<u64> = 256..=MAX_POD_DISK >> 20;

/// Environment variable that names another file.
pub const CONFIG: &str = "JOEY_CONFIG";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong type; TOML's message names the key.
    #[error("configuration {origin}: {message}")]
    Parse {
        /// File, or the runtime's options.
        origin: String,
        /// What TOML says, with the line and the known keys.
        message: String,
    },
    /// A value that cannot be used.
    #[error("configuration key {key} = {value:?}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it was.
        value: String,
        /// What it must be.
        reason: &'static str,
    },
    /// The runtime options are no `runtimeoptions.v1.Options`.
    #[error("runtime options of type {type_url:?}: {reason}")]
    Options {
        /// Their declared type.
        type_url: String,
        /// What is wrong.
        reason: String,
    },
}

/// The checked configuration of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What outlives a reboot: templates, images, the guest.
    pub state_dir: PathBuf,
    /// What does not: sockets, logs and records of running sandboxes.
    pub run_dir: PathBuf,
    /// Where the sandboxes' writable disks are, files without a name; `None`: `state_dir/disks`, see
    /// [`Config::disk_dir`].
    pub disk_dir: Option<PathBuf>,
    /// Where CSI drivers leave what the guest is to mount in place of the host.
    pub direct_volumes_dir: PathBuf,
    /// Kernel and initramfs of the guest; `None`: `state_dir/guest`, see [`Config::guest_dir`].
    pub guest_dir: Option<PathBuf>,
    /// QEMU; `None`: searched for.
    pub qemu: Option<PathBuf>,
    /// Where the packet programs and their maps are pinned.
    pub bpf_dir: PathBuf,
    /// Whether pods are kept from other tenants' (docs/network.md); if not, every packet passes.
    pub isolation: bool,
    /// Whether what a pod sends to the other end of its interface goes there past the interface, which then does
    /// not count it as sent (docs/network.md). With `isolation`.
    pub direct: bool,
    /// Annotations that say whose a pod is, the first one that is there; else its namespace is. Whoever may
    /// set them on a pod can make it another tenant's.
    pub tenant_annotations: Vec<String>,
    /// Who translates connections to services of pods that do not say it themselves.
    pub services: Mode,
    /// The operator's tool; `None`: beside the running program, see [`Config::joey`].
    pub joey: Option<PathBuf>,
    /// First uid and gid of the VMMs' jails.
    pub jail_first_id: u32,
    /// How many uids there are.
    pub jail_ids: u32,
    /// Most bytes of cached images, in MiB; the cache also keeps below a fifth of its file system.
    pub image_cache_mib: u64,
    /// vCPUs of a pod that asks for nothing.
    pub default_vcpus: u32,
    /// Memory of a pod that asks for nothing, guest overhead not counted.
    pub default_memory_mib: u32,
    /// Size of the writable disk of a pod that asks for nothing. Only what is written takes room.
    pub default_disk_mib: u64,
    /// The largest writable disk that a pod may ask for.
    pub max_disk_mib: u64,
    /// Added to a pod's memory for the guest's kernel and agent.
    pub guest_overhead_mib: u32,
    /// vCPU counts a sandbox can have, ascending.
    pub template_vcpus: Vec<u32>,
    /// Memory sizes a sandbox can have, ascending.
    pub template_memory_mib: Vec<u32>,
    /// Machines that wait for the next sandbox of a size that was used; 0: none.
    pub standby: u32,
    /// How long a sandbox may take to start.
    pub start_timeout_seconds: u64,
    /// The file that was read, for the programs that the shim runs.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/joey".into(),
            run_dir: "/run/joey".into(),
            disk_dir: None,
            direct_volumes_dir: "/run/kata-containers/shared/direct-volumes".into(),
            guest_dir: None,
            qemu: None,
            bpf_dir: "/sys/fs/bpf/joey".into(),
            isolation: true,
            direct: false,
            tenant_annotations: tenant::default_annotations(),
            services: Mode::default(),
            joey: None,
            jail_first_id: 1_900_000_000,
            jail_ids: 65_536,
            image_cache_mib: 20 * 1024,
            default_vcpus: 1,
            default_memory_mib: 128,
            default_disk_mib: 10 * 1024,
            max_disk_mib: *DISK_MIB.end(),
            guest_overhead_mib: 64,
            template_vcpus: vec![1, 2, 4, 8],
            template_memory_mib: vec![128, 256, 512, 1024, 2048, 4096, 8192, 16384],
            standby: 1,
            start_timeout_seconds: 60,
            file: None,
        }
    }
}

impl Config {
    /// Reads, merges and checks; `options` are what containerd passed for the runtime, if anything.
    pub fn load(options: Option<&Any>) -> Result<Self, ConfigError> {
        let options = options.map(decode).transpose()?.unwrap_or_default();
        let from_env = std::env::var_os(CONFIG).map(PathBuf::from);
        let named = options.path.map(PathBuf::from).or(from_env);
        let must_exist = named.is_some();
        let path = named.unwrap_or_else(|| DEFAULT_FILE.into());
        let mut table = read(&path, must_exist)?;
        if !options.body.is_empty() {
            let origin = "in the runtime's options";
            // Checked alone too, so that an unknown key is blamed on the right place.
            parse::<Self>(&options.body, origin)?;
            table.extend(parse::<toml::Table>(&options.body, origin)?);
        }
        let config: Self = table.try_into().map_err(|error: toml::de::Error| {
            ConfigError::Parse { origin: path.display().to_string(), message: error.to_string() }
        })?;
        let file = path.exists().then_some(path);
        Self { file, ..config }.check()
    }

    /// Reads the configuration of a file that the operator named.
    ///
    /// # Errors
    /// It cannot be read, or is not a configuration.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = read(path, true)?.try_into().map_err(|error: toml::de::Error| {
            ConfigError::Parse { origin: path.display().to_string(), message: error.to_string() }
        })?;
        Self { file: Some(path.to_owned()), ..config }.check()
    }

    /// Where the guest's kernel and initramfs are.
    pub fn guest_dir(&self) -> PathBuf {
        self.guest_dir.clone().unwrap_or_else(|| self.state_dir.join("guest"))
    }

    /// Where the templates are.
    pub fn templates_dir(&self) -> PathBuf {
        self.state_dir.join("templates")
    }

    /// Where the files behind writable disks are made.
    pub fn disk_dir(&self) -> PathBuf {
        self.disk_dir.clone().unwrap_or_else(|| self.state_dir.join("disks"))
    }

    /// The operator's tool, which does the heavy once-per-node work.
    pub fn joey(&self) -> io::Result<PathBuf> {
        match &self.joey {
            Some(path) => Ok(path.clone()),
            None => Ok(std::env::current_exe()?.with_file_name("joey")),
        }
    }

    /// What the VMM needs to know.
    ///
    /// # Errors
    /// The tool's place cannot be found out.
    pub fn vmm(&self) -> io::Result<crate::vmm::VmmConfig> {
        let joey = self.joey()?.to_string_lossy().into_owned();
        Ok(crate::vmm::VmmConfig {
            qemu: self.qemu(),
            guest_dir: self.guest_dir(),
            templates_dir: self.templates_dir(),
            run_dir: self.run_dir.clone(),
            use_templates: true,
            ids: crate::host::jail::IdRange { first: self.jail_first_id, count: self.jail_ids },
            builder: Some(vec![joey, "template".to_owned(), "build".to_owned()]),
            home: Vec::new(),
        })
    }

    /// QEMU: as configured, or the first in `PATH`, or where distributions put it.
    fn qemu(&self) -> PathBuf {
        const NAME: &str = "qemu-system-x86_64";
        let in_path = || {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|dir| dir.join(NAME)).find(|file| file.is_file())
        };
        self.qemu.clone().or_else(in_path).unwrap_or_else(|| Path::new("/usr/bin").join(NAME))
    }

    fn check(self) -> Result<Self, ConfigError> {
        let paths = [
            ("state_dir", Some(&self.state_dir)),
            ("run_dir", Some(&self.run_dir)),
            ("bpf_dir", Some(&self.bpf_dir)),
            ("direct_volumes_dir", Some(&self.direct_volumes_dir)),
            ("disk_dir", self.disk_dir.as_ref()),
            ("guest_dir", self.guest_dir.as_ref()),
            ("qemu", self.qemu.as_ref()),
            ("joey", self.joey.as_ref()),
        ];
        for (key, path) in paths {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return refuse(key, path, "must be an absolute path");
            }
        }
        for (key, sizes) in [
            ("template_vcpus", &self.template_vcpus),
            ("template_memory_mib", &self.template_memory_mib),
        ] {
            if sizes.is_empty() || sizes[0] == 0 || !sizes.is_sorted_by(|a, b| a < b) {
                return refuse(key, sizes, "must be positive sizes in ascending order");
            }
        }
        if self.default_vcpus == 0 || self.template_vcpus.last() < Some(&self.default_vcpus) {
            return refuse("default_vcpus", self.default_vcpus, "must fit the largest template");
        }
        let whole = self.default_memory_mib.checked_add(self.guest_overhead_mib);
        if self.default_memory_mib == 0
            || whole.is_none_or(|mib| self.template_memory_mib.last() < Some(&mib))
        {
            let reason = "with guest_overhead_mib added must fit the largest template";
            return refuse("default_memory_mib", self.default_memory_mib, reason);
        }
        if !DISK_MIB.contains(&self.default_disk_mib) {
            let reason = "must be 256 to 262144";
            return refuse("default_disk_mib", self.default_disk_mib, reason);
        }
        if !(self.default_disk_mib..=*DISK_MIB.end()).contains(&self.max_disk_mib) {
            let reason = "must be default_disk_mib to 262144";
            return refuse("max_disk_mib", self.max_disk_mib, reason);
        }
        let end = self.jail_first_id.checked_add(self.jail_ids);
        if self.jail_first_id == 0 || self.jail_ids == 0 || end.is_none() {
            return refuse("jail_first_id", self.jail_first_id, "no usable range without root");
        }
        if self.start_timeout_seconds == 0 {
            return refuse("start_timeout_seconds", 0, "must be at least 1");
        }
        Ok(self)
    }
}

fn refuse<T>(
    key: &'static str,
    value: impl std::fmt::Debug,
    reason: &'static str,
) -> Result<T, ConfigError> {
    Err(ConfigError::Value { key, value: format!("{value:?}"), reason })
}

fn read(path: &Path, must_exist: bool) -> Result<toml::Table, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, &path.display().to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {
            Ok(toml::Table::new())
        }
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

fn parse<T: serde::de::DeserializeOwned>(text: &str, origin: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| ConfigError::Parse {
        origin: origin.to_owned(),
        message: error.to_string(),
    })
}

#[derive(Debug, Default)]
struct Options {
    path: Option<String>,
    body: String,
}

/// Decodes `runtimeoptions.v1.Options`: 1 `type_url`, 2 `config_path`, 3 `config_body`.
fn decode(any: &Any) -> Result<Options, ConfigError> {
    let bad = |reason: String| ConfigError::Options { type_url: any.type_url.clone(), reason };
    if !any.type_url.ends_with("runtimeoptions.v1.Options") {
        return Err(bad("only runtimeoptions.v1.Options is understood".to_owned()));
    }
    let mut options = Options::default();
    let mut input = CodedInputStream::from_bytes(&any.value);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(|e| bad(e.to_string()))? {
        // Every field is a string: the tag's low bits are wire type 2.
        if tag & 7 != 2 {
            return Err(bad(format!("field tag {tag} is no string")));
        }
        let text = input.read_string().map_err(|e| bad(e.to_string()))?;
        match tag >> 3 {
            2 if !text.is_empty() => options.path = Some(text),
            3 => options.body = text,
            _ => {}
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn defaults_are_valid() {
        Config::default().check().unwrap();
    }

    #[test]
    fn unknown_key_is_named_with_its_file() {
        let error = parse::<Config>("defualt_vcpus = 1", "/x.toml").unwrap_err().to_string();
        assert!(error.contains("defualt_vcpus") && error.contains("/x.toml"), "{error}");
    }
}
