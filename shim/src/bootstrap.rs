//! How containerd launches a shim: the `start`, `delete` and `-info` calls.
//!
//! `start` binds the sandbox's socket, forks the server and answers with the address. The server
//! starts cloning the VM at once, beside everything containerd still does before its first call.
//! containerd reads standard output *and* standard error of `start` as the answer, so nothing else
//! may be printed there once it has succeeded.
//!
//! Three forms of the answer exist (containerd's `docs/runtime-v2.md`): a bare address (task API 2:
//! containerd 1.6, 1.7), JSON (2.0 to 2.2, task API 3) and a protobuf message (2.3 and later).
//! With task API 2 `start` is called once per container and must name the sandbox's shim again.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim::Flags;
use containerd_shim::protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::Spec;
use sha2::{Digest as _, Sha256};

use crate::config::Config;
use crate::sandbox::record::{self, Record};
use crate::sandbox::teardown;
use crate::standby::{Claim, Terms};

/// Name of this runtime as RuntimeClass handlers give it.
pub const RUNTIME_NAME: &str = "io.containerd.joey.v2";
/// Annotation with the id of the sandbox that a CRI container belongs to.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Where containerd expects the sockets of shims, whatever its own state folder is.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The most that is read from standard input, as containerd itself bounds it.
const MAX_INPUT: u64 = 10 << 20;

/// Why the shim could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The command line is not one of containerd's.
    #[error("command line: {0}")]
    Arguments(String),
    /// A file, socket or stream of the start-up could not be used.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The bundle's `config.json` is not an OCI runtime specification.
    #[error("bundle {path}: config.json: {source}")]
    Spec {
        /// The bundle.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The sandbox that a container belongs to has no shim any more.
    #[error(
        "container {id} belongs to sandbox {sandbox}, whose shim is not running; remove the pod"
    )]
    SandboxGone {
        /// The container.
        id: String,
        /// Its sandbox.
        sandbox: String,
    },
    /// A message of containerd's could not be read or written.
    #[error("message exchanged with containerd: {0}")]
    Message(#[from] protobuf::Error),
    /// What a keeper that was killed has left could not be removed.
    #[error(transparent)]
    Left(#[from] teardown::Incomplete),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BootstrapError {
    let path = path.to_owned();
    move |source| BootstrapError::Io { what, path, source }
}

/// How the answer to `start` is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    /// A bare address: task API 2.
    Address,
    /// JSON: task API 3; a bare address where containerd does not take it.
    Json,
    /// Protobuf: containerd 2.3 and later, task API 3.
    Bootstrap,
}

/// Everything that one call of the shim binary was given, checked.
#[derive(Debug)]
pub struct Invocation {
    /// Flags as containerd passes them.
    pub flags: Flags,
    /// The bundle of the sandbox or container.
    pub bundle: PathBuf,
    /// Where events are published.
    pub ttrpc_address: String,
    /// The runtime's `options` table, if there is one.
    pub options: Option<Any>,
    /// The specification in the bundle; `None` where containerd's Sandbox API leaves it out.
    pub spec: Option<Spec>,
    reply: Reply,
}

impl Invocation {
    /// Reads flags, environment, standard input and the bundle.
    ///
    /// # Errors
    /// [`BootstrapError`] names what was unusable.
    pub fn read(args: &[OsString]) -> Result<Self, BootstrapError> {
        let flags = containerd_shim::parse(args)
            .map_err(|error| BootstrapError::Arguments(error.to_string()))?;
        let bundle = if flags.bundle.is_empty() {
            std::env::current_dir().map_err(io_error("working directory", Path::new(".")))?
        } else {
            PathBuf::from(&flags.bundle)
        };
        let mut invocation = Self {
            spec: None,
            bundle,
            ttrpc_address: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
            options: None,
            reply: Reply::Address,
            flags,
        };
        if invocation.flags.version || invocation.flags.info {
            return Ok(invocation);
        }
        invocation.spec = read_spec(&invocation.bundle)?;
        if invocation.flags.action == "start" {
            invocation.read_input()?;
        }
        Ok(invocation)
    }

    /// What a keeper must know to serve in this process's stead.
    pub(crate) fn terms(&self) -> Terms {
        Terms {
            id: self.flags.id.clone(),
            namespace: self.flags.namespace.clone(),
            address: self.flags.address.clone(),
            publish_binary: self.flags.publish_binary.clone(),
            bundle: self.bundle.clone(),
            socket: self.socket_path(),
            ttrpc_address: self.ttrpc_address.clone(),
            debug: self.flags.debug,
            since_boot: started_since_boot(),
        }
    }

    /// The same, in the keeper.
    pub(crate) fn of_terms(terms: Terms) -> Result<Self, BootstrapError> {
        let spec = read_spec(&terms.bundle)?;
        let flags = Flags {
            id: terms.id,
            namespace: terms.namespace,
            address: terms.address,
            publish_binary: terms.publish_binary,
            debug: terms.debug,
            ..Flags::default()
        };
        let (bundle, ttrpc_address) = (terms.bundle, terms.ttrpc_address);
        Ok(Self { flags, bundle, ttrpc_address, options: None, spec, reply: Reply::Address })
    }

    /// The id that decides which shim serves: the sandbox's, for a container of a pod.
    #[must_use]
    pub fn sandbox_id(&self) -> &str {
        self.spec
            .as_ref()
            .and_then(|spec| spec.annotations().as_ref())
            .and_then(|annotations| annotations.get(SANDBOX_ID))
            .map_or(&self.flags.id, |id| id)
    }

    /// Path of the socket that the sandbox's shim listens on: the same for every call that names
    /// the same containerd, namespace and sandbox.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        let mut hash = Sha256::new();
        for part in ["joey", &self.flags.address, &self.flags.namespace, self.sandbox_id()] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Path::new(SOCKET_DIR).join(name)
    }

    /// Decodes standard input: runtime options, or containerd 2.3's bootstrap parameters.
    fn read_input(&mut self) -> Result<(), BootstrapError> {
        let mut input = Vec::new();
        std::io::stdin()
            .lock()
            .take(MAX_INPUT)
            .read_to_end(&mut input)
            .map_err(io_error("standard input of", Path::new("start")))?;
        let bootstrap = BootstrapParams::parse_from_bytes(&input)
            .ok()
            .filter(|params| params.instance_id == self.flags.id && !input.is_empty());
        if let Some(params) = bootstrap {
            self.reply = Reply::Bootstrap;
            if !params.containerd_ttrpc_address.is_empty() {
                self.ttrpc_address.clone_from(&params.containerd_ttrpc_address);
            }
            self.options = params.extensions.iter().find_map(|extension| {
                let any = extension.value.as_ref()?;
                any.type_url.ends_with("runtimeoptions.v1.Options").then(|| any.clone())
            });
            return Ok(());
        }
        if !input.is_empty() {
            let any = Any::parse_from_bytes(&input)?;
            self.options = (!any.type_url.is_empty()).then_some(any);
        }
        self.reply = Reply::Json;
        Ok(())
    }

    /// Whether this containerd takes task API 3. Both 1.7 and 2.x announce a highest version of 2,
    /// so the binary itself is asked, once per binary.
    fn speaks_version_3(&self, run_dir: &Path) -> bool {
        // Only containerd's Sandbox API launches a shim without a specification.
        self.spec.is_none()
            || containerd_major(&self.flags.publish_binary, run_dir).unwrap_or(1) >= 2
    }

    fn answer(&self, socket: &Path, run_dir: &Path) -> Result<Vec<u8>, BootstrapError> {
        let address = format!("unix://{}", socket.display());
        let reply = match self.reply {
            Reply::Json if !self.speaks_version_3(run_dir) => Reply::Address,
            reply => reply,
        };
        Ok(match reply {
            Reply::Address => address.into_bytes(),
            Reply::Json => serde_json::json!({
                "version": 3, "address": address, "protocol": "ttrpc",
            })
            .to_string()
            .into_bytes(),
            Reply::Bootstrap => BootstrapResult {
                version: 3,
                address,
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            }
            .write_to_bytes()?,
        })
    }
}

fn read_spec(bundle: &Path) -> Result<Option<Spec>, BootstrapError> {
    let path = bundle.join("config.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", &path)(error)),
    };
    if text.trim_ascii() == b"null" || text.trim_ascii().is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| BootstrapError::Spec { path: bundle.to_owned(), source })
}

/// Major version of the containerd binary, remembered in `run_dir`, a file per binary: asking costs as
/// much as a tenth of a sandbox's start.
fn containerd_major(binary: &str, run_dir: &Path) -> Option<u32> {
    let path = which(binary)?;
    let meta = std::fs::metadata(&path).ok()?;
    let memo = run_dir.join(format!(
        "containerd-{:x}-{:x}-{:x}",
        meta.dev(),
        meta.ino(),
        meta.mtime_nsec() ^ meta.mtime()
    ));
    if let Ok(text) = std::fs::read_to_string(&memo) {
        return text.trim().parse().ok();
    }
    let output = std::process::Command::new(&path).arg("--version").output().ok()?;
    let major = parse_major(&String::from_utf8_lossy(&output.stdout))?;
    // Only a memo: a failure to keep it costs time on the next start, nothing else.
    let _ = std::fs::create_dir_all(run_dir);
    let _ = std::fs::write(&memo, major.to_string());
    Some(major)
}

/// Finds `2` in `containerd github.com/containerd/containerd 2.1.9~ds1 …`.
fn parse_major(text: &str) -> Option<u32> {
    text.split_whitespace().skip(1).find_map(|word| {
        let digits = word.strip_prefix('v').unwrap_or(word);
        let (major, rest) = digits.split_once('.')?;
        rest.starts_with(|c: char| c.is_ascii_digit()).then(|| major.parse().ok())?
    })
}

fn which(binary: &str) -> Option<PathBuf> {
    if binary.contains('/') {
        return Some(PathBuf::from(binary));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(binary)).find(|candidate| candidate.is_file())
}

fn make_socket_dir() -> Result<(), BootstrapError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(SOCKET_DIR)
        .map_err(io_error("create directory", Path::new(SOCKET_DIR)))
}

/// What `start` has to do next.
#[derive(Debug)]
pub enum Start {
    /// The sandbox's shim runs already: print this and exit.
    Running(Vec<u8>),
    /// Print the answer from the parent, serve on the socket in the forked child.
    Serve {
        /// The listening socket.
        listener: UnixListener,
        /// What the parent prints.
        answer: Vec<u8>,
    },
}

/// Finds or binds the socket of the sandbox that this call is about.
///
/// # Errors
/// The socket cannot be made, or a container's sandbox has no shim.
pub fn start(invocation: &Invocation, config: &Config) -> Result<Start, BootstrapError> {
    let socket = invocation.socket_path();
    let answer = invocation.answer(&socket, &config.run_dir)?;
    keep_address(&invocation.bundle, &socket)?;
    if UnixStream::connect(&socket).is_ok() {
        return Ok(Start::Running(answer));
    }
    if invocation.sandbox_id() != invocation.flags.id {
        return Err(BootstrapError::SandboxGone {
            id: invocation.flags.id.clone(),
            sandbox: invocation.sandbox_id().to_owned(),
        });
    }
    make_socket_dir()?;
    // What is left here belongs to a shim that was killed: nobody listens.
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(io_error("remove stale socket", &socket)(error));
        }
        _ => {}
    }
    let directory = record::directory(&config.run_dir, &invocation.flags.id);
    if let Some(claim) = Claim::find(config, invocation) {
        let listener = UnixListener::bind(&socket).map_err(io_error("bind socket", &socket))?;
        crate::failpoint::hold(&config.run_dir, "bootstrap.go");
        if claim.hand_over(&listener).is_ok() {
            return Ok(Start::Running(answer));
        }
        // The keeper went at the last moment: it takes one more start, as without it, once everything
        // that the keeper had for this sandbox is gone.
        let left = Record::read(&directory)
            .map_err(io_error("read the sandbox's record in", &directory))?;
        left.map_or(Ok(()), |record| teardown::undo(&config.run_dir, &record))?;
        let _ = std::fs::remove_file(&socket);
    }
    take_name(&config.run_dir, &directory)?;
    crate::failpoint::hold(&config.run_dir, "bootstrap.named");
    Record::begun(&invocation.flags.id, &invocation.flags.namespace, &socket)
        .write(&directory)
        .map_err(io_error("write the sandbox's record in", &directory))?;
    let listener = UnixListener::bind(&socket).map_err(io_error("bind socket", &socket))?;
    Ok(Start::Serve { listener, answer })
}

/// Takes a sandbox's name, so that no keeper can any more. One that has it, but was too slow to say so
/// and was not waited for, goes with everything it had.
fn take_name(run_dir: &Path, directory: &Path) -> Result<(), BootstrapError> {
    let parent = directory.parent().unwrap_or(run_dir);
    std::fs::create_dir_all(parent).map_err(io_error("create directory", parent))?;
    loop {
        match std::fs::create_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io_error("create directory", directory)(error)),
        }
        // One that cannot be read is nobody's: it is written whole.
        let record = Record::read(directory).ok().flatten();
        match record.filter(|record| record.shim.is_some_and(|shim| shim.alive())) {
            Some(record) => teardown::undo(run_dir, &record)?,
            // What a killed shim has left is written over.
            None => return Ok(()),
        }
    }
}

/// Writes the shim's address into the bundle, where containerd 1.7 looks for it when it is restarted.
/// (2.x keeps an answer in a file of its own; an upgrade in between reads this one.)
fn keep_address(bundle: &Path, socket: &Path) -> Result<(), BootstrapError> {
    let path = bundle.join("address");
    let draft = bundle.join(".address");
    std::fs::write(&draft, format!("unix://{}", socket.display()))
        .and_then(|()| std::fs::rename(&draft, &path))
        .map_err(io_error("write", &path))
}

/// When containerd started this process, as time since the host's boot.
pub(crate) fn started_since_boot() -> Duration {
    let me = record::ProcessId::of(std::process::id());
    // Clock ticks are 1/100 s on every Linux that there is (sysconf(3), USER_HZ).
    me.map_or(Duration::ZERO, |me| Duration::from_millis(me.start.saturating_mul(10)))
}

/// Prints an answer to containerd.
///
/// # Errors
/// Standard output is closed.
pub fn print(answer: &[u8]) -> Result<(), BootstrapError> {
    let mut out = std::io::stdout().lock();
    out.write_all(answer)
        .and_then(|()| out.flush())
        .map_err(io_error("write answer to", Path::new("standard output")))
}

/// What this runtime can do, as the OCI runtime specification's `features.md` says it: for containerd 2's clients.
/// (Of runc alone its CRI plugin asks for it too, up to 2.1, and tells the kubelet.)
fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev",
            "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "nosymfollow", "private",
            "rbind", "relatime", "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid",
            "symfollow", "sync",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}

/// What `-info` prints: containerd's RuntimeInfo.
///
/// # Errors
/// The message cannot be encoded (it always can).
pub fn runtime_info() -> Result<Vec<u8>, BootstrapError> {
    use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};
    let features = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(features).into(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_specifications() {
        let features: oci_spec::runtime::Features = serde_json::from_value(features()).unwrap();
        assert!(features.mount_options().iter().flatten().any(|option| option == "rro"));
        assert_eq!(features.hooks().as_deref(), Some(&[][..]));
    }

    #[test]
    fn a_keeper_that_was_too_slow_loses_the_name_and_all_it_had() {
        let run = tempfile::tempdir().unwrap();
        let directory = record::directory(run.path(), "abc");
        take_name(run.path(), &directory).unwrap();
        take_name(run.path(), &directory).unwrap();
        let mut keeper = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let shim = record::ProcessId::of(keeper.id()).ok();
        let record = Record { shim, ..Record::begun("standby-7", "", Path::new("")) };
        record.write(&directory).unwrap();
        take_name(run.path(), &directory).unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        assert!(!keeper.wait().unwrap().success());
        record.write(&directory).unwrap();
        take_name(run.path(), &directory).unwrap();
        assert_eq!(Record::read(&directory).unwrap().unwrap().id, "abc", "to be written over");
    }

    #[test]
    fn major_version_is_found_in_what_containerd_prints() {
        let cases = [
            (
                "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1",
                Some(1),
            ),
            ("containerd github.com/containerd/containerd/v2 2.1.9+ds1 2.1.9+ds1-5", Some(2)),
            ("containerd github.com/containerd/containerd/v2 v2.0.0 abcdef", Some(2)),
            ("no such thing", None),
        ];
        for (text, major) in cases {
            assert_eq!(parse_major(text), major, "{text}");
        }
    }

    #[test]
    fn a_null_specification_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_spec(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("config.json"), "null\n").unwrap();
        assert!(read_spec(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("config.json"), "{]").unwrap();
        let error = read_spec(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }
}
