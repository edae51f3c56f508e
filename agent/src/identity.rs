//! What makes a clone itself: clock, entropy, machine id, host name, network, sysctls, shared memory.
//!
//! A clone wakes with its template's memory: the same generator state, the same clock, no name. All
//! of this is set before the first container exists, or the sandbox does not start. Order: the clock
//! first (later steps take time from it), then entropy (nothing random is drawn before), the rest
//! after. The kernel draws its `boot_id` at the first reading: nothing reads it before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use joey_protocol::handshake::VersionMismatch;
use joey_protocol::{api, handshake, limits};
use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::network::{Links, NetworkError};
use crate::phases::Phases;
use crate::sys;

/// Size of the pod's /dev/shm when the host names none, as it is mounted at boot.
const DEFAULT_SHM_BYTES: u64 = 64 << 20;
/// Longest host name that Linux takes.
const HOSTNAME_MAX: usize = 64;
/// What Linux calls a machine that was given no name.
const NO_HOSTNAME: &str = "(none)";
const MACHINE_ID: &str = "/etc/machine-id";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Sysctls that CRI sets for every pod unless it was told otherwise, and the kernel's own values.
const USUAL_SYSCTLS: [(&str, &str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0", "1024"),
    ("net.ipv4.ping_group_range", "0 2147483647", "1 0"),
];

/// Why this clone could not become the sandbox.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// The host speaks another version.
    #[error(transparent)]
    Version(#[from] VersionMismatch),
    /// A field of the request is not usable.
    #[error("sandbox request: {field} {problem}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The pod's network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A sysctl that a pod may not set.
    #[error(
        "sysctl {0:?} is not one a pod may set (net.*, kernel.shm*, kernel.msg*, kernel.sem, \
         fs.mqueue.*)"
    )]
    SysctlRefused(String),
    /// A step failed in the kernel.
    #[error("setting the sandbox's {step}: {source}")]
    Step {
        /// Which step.
        step: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl IdentityError {
    /// Whether the request, not the guest, is at fault.
    pub(crate) fn is_callers(&self) -> bool {
        if let Self::Network(error) = self {
            return error.is_callers();
        }
        matches!(self, Self::Version(_) | Self::Invalid { .. } | Self::SysctlRefused(_))
    }
}

fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> IdentityError {
    let step = step.into();
    move |source| IdentityError::Step { step, source: source.into() }
}

/// What every sandbox needs in the same way: done once, before a template is saved.
///
/// A clone repeats none of it. Under emulation a kernel path costs most when it is first taken, under
/// hardware virtualisation each page that is first touched does; both are then the template's cost.
pub(crate) struct Prepared {
    random: File,
    machine_id: File,
    links: Links,
    unique: bool,
    /// What the generator gave last: to the template, or to who this machine was at its rehearsal.
    drawn: [u8; limits::RANDOM_BYTES],
}

impl Prepared {
    /// Prepares the guest; nothing here is the pod's.
    pub(crate) fn new() -> Result<Self, IdentityError> {
        let random = OpenOptions::new().read(true).write(true).open("/dev/urandom");
        let mut random = random.map_err(step("entropy (opening /dev/urandom)"))?;
        // The generator counts as ready from now on, which patches the kernel's code. What it gives
        // before the identity is known to every clone, and used by none.
        let mut bytes = [0; limits::ENTROPY_BYTES];
        random.read_exact(&mut bytes).map_err(step("entropy (reading /dev/urandom)"))?;
        sys::add_entropy(random.as_fd(), &bytes).map_err(step("entropy (RNDADDENTROPY)"))?;
        let drawn = draw(&random)?;
        fs::write(MACHINE_ID, "").map_err(step("machine id"))?;
        let machine_id = OpenOptions::new().read(true).write(true).open(MACHINE_ID);
        let machine_id = machine_id.map_err(step("machine id"))?;
        for (name, usual, _) in USUAL_SYSCTLS {
            set_sysctl(name, usual)?;
        }
        Ok(Self { random, machine_id, links: Links::prepare()?, unique: false, drawn })
    }

    /// Whether what the kernel's generator gives is this clone's alone.
    pub(crate) fn is_unique(&self) -> bool {
        self.unique
    }

    /// What it has of entropy others will have too.
    pub(crate) fn multiply(&mut self) {
        self.unique = false;
    }

    /// What can wait until the pod has started.
    pub(crate) fn complete(&mut self, network: &api::Network) -> Result<(), IdentityError> {
        Ok(self.links.add_link_local(network)?)
    }

    /// For tests of what comes before the kernel is asked.
    #[cfg(test)]
    pub(crate) fn nothing() -> Self {
        let null = || File::open("/dev/null").unwrap();
        let drawn = [0; limits::RANDOM_BYTES];
        Self { random: null(), machine_id: null(), links: Links::none(), unique: false, drawn }
    }

    /// Takes back what [`Self::assume`] gave and the next identity would not replace: to be called before
    /// there was any container.
    pub(crate) fn resign(
        &mut self,
        request: &api::StartSandboxRequest,
    ) -> Result<(), IdentityError> {
        nix::unistd::sethostname(NO_HOSTNAME).map_err(step("host name"))?;
        for (name, usual, _) in USUAL_SYSCTLS {
            set_sysctl(name, usual)?;
        }
        Ok(self.links.clear(&request.network, request.mesh.capture)?)
    }

    /// Gives this clone its identity; on any error the sandbox must not start.
    pub(crate) fn assume(
        &mut self,
        request: &api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse, IdentityError> {
        check(request)?;
        let mut phases = Phases::begin();
        set_clock(request.wall_clock_ns)?;
        phases.done("clock");
        set_entropy(&self.random, &request.entropy)?;
        self.unique = true;
        phases.done("entropy");
        set_names(&self.machine_id, request)?;
        phases.done("names");
        // Before the sysctls, which may be an interface's.
        self.links.apply(&request.network, request.mesh.capture)?;
        phases.done("network");
        set_sysctls(request)?;
        set_shared_memory(request.shm_bytes)?;
        phases.done("settings");
        let mut response = self.read_back()?;
        phases.done("read-back");
        response.phases = phases.end();
        Ok(response)
    }

    /// What this machine is now, for the host to compare with what it asked for; but for the boot id, which a
    /// rehearsal must not read: whatever is cloned from it afterwards would have the same.
    fn read_back(&mut self) -> Result<api::StartSandboxResponse, IdentityError> {
        let mut id = [0; 2 * limits::MACHINE_ID_BYTES];
        self.machine_id.read_exact_at(&mut id, 0).map_err(step("machine id (reading it)"))?;
        let hostname = nix::unistd::gethostname().map_err(step("host name (reading it)"))?;
        let random = draw(&self.random)?;
        let former = std::mem::replace(&mut self.drawn, random);
        Ok(api::StartSandboxResponse {
            machine_id: from_hex(&id).unwrap_or_default(),
            hostname: hostname.to_string_lossy().into_owned(),
            random: random.to_vec(),
            former_random: former.to_vec(),
            ..Default::default()
        })
    }
}

/// Everything that can be wrong with the request itself, before anything is changed.
fn check(request: &api::StartSandboxRequest) -> Result<(), IdentityError> {
    let invalid = |field, problem: String| Err(IdentityError::Invalid { field, problem });
    handshake::check("host", request.protocol_version)?;
    if request.entropy.len() != limits::ENTROPY_BYTES {
        let problem = format!("has {} bytes, not {}", request.entropy.len(), limits::ENTROPY_BYTES);
        return invalid("entropy", problem);
    }
    if request.entropy.iter().all(|byte| *byte == request.entropy[0]) {
        return invalid("entropy", "is one byte repeated".to_owned());
    }
    if request.machine_id.len() != limits::MACHINE_ID_BYTES {
        let problem =
            format!("has {} bytes, not {}", request.machine_id.len(), limits::MACHINE_ID_BYTES);
        return invalid("machine_id", problem);
    }
    if request.wall_clock_ns <= 0 {
        return invalid("wall_clock_ns", format!("is {}", request.wall_clock_ns));
    }
    let name = request.hostname.as_bytes();
    if name.len() > HOSTNAME_MAX || name.iter().any(|byte| !byte.is_ascii_graphic()) {
        return invalid("hostname", format!("{:?} is not a host name", request.hostname));
    }
    for name in request.sysctls.keys() {
        sysctl_path(name)?;
    }
    Ok(())
}

fn set_clock(wall_clock_ns: i64) -> Result<(), IdentityError> {
    let time = TimeSpec::from_duration(Duration::from_nanos(wall_clock_ns.unsigned_abs()));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(step("clock"))
}

/// The generator of a clone is its template's, so every clone would draw the same bytes until this
/// has succeeded: mixing in alone may wait for the kernel's own pace, hence the reseed.
fn set_entropy(random: &File, entropy: &[u8]) -> Result<(), IdentityError> {
    sys::add_entropy(random.as_fd(), entropy).map_err(step("entropy (RNDADDENTROPY)"))?;
    sys::reseed(random.as_fd()).map_err(step("entropy (RNDRESEEDCRNG)"))
}

/// The kernel's name for this run of the machine, drawn with the first reading.
pub(crate) fn boot_id() -> Result<String, IdentityError> {
    let text = fs::read_to_string(BOOT_ID).map_err(step("boot id (reading it)"))?;
    Ok(text.trim_end().to_owned())
}

/// A few bytes from the kernel's generator.
fn draw(mut random: &File) -> Result<[u8; limits::RANDOM_BYTES], IdentityError> {
    let mut bytes = [0; limits::RANDOM_BYTES];
    random.read_exact(&mut bytes).map_err(step("entropy (reading /dev/urandom)"))?;
    Ok(bytes)
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8]| u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok();
    text.chunks_exact(2).map(byte).collect()
}

fn set_names(machine_id: &File, request: &api::StartSandboxRequest) -> Result<(), IdentityError> {
    let mut id: String = request.machine_id.iter().map(|byte| format!("{byte:02x}")).collect();
    id.push('\n');
    machine_id.write_all_at(id.as_bytes(), 0).map_err(step("machine id"))?;
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname).map_err(step("host name"))?;
    }
    Ok(())
}

/// The file of a sysctl that a pod may set in its own namespaces; anything else is refused.
fn sysctl_path(name: &str) -> Result<PathBuf, IdentityError> {
    let refused = || IdentityError::SysctlRefused(name.to_owned());
    // Kubernetes writes dots; a name that has slashes uses dots literally (interface names).
    let separator = if name.contains('/') { '/' } else { '.' };
    let mut path = PathBuf::from("/proc/sys");
    let parts: Vec<&str> = name.split(separator).collect();
    for part in &parts {
        let dots = part.chars().all(|c| c == '.');
        if part.is_empty() || dots || part.contains('\0') {
            return Err(refused());
        }
        path.push(part);
    }
    let allowed = match parts.as_slice() {
        ["net", _, ..] | ["fs", "mqueue", _] => true,
        ["kernel", leaf] => leaf.starts_with("shm") || leaf.starts_with("msg") || *leaf == "sem",
        _ => false,
    };
    if allowed { Ok(path) } else { Err(refused()) }
}

fn set_sysctl(name: &str, value: &str) -> Result<(), IdentityError> {
    fs::write(sysctl_path(name)?, value).map_err(step(format!("sysctl {name}={value:?}")))
}

/// Sets what differs from what was prepared.
fn set_sysctls(request: &api::StartSandboxRequest) -> Result<(), IdentityError> {
    let usual = |name: &str| USUAL_SYSCTLS.iter().find(|(usual, ..)| *usual == name);
    for (name, value) in &request.sysctls {
        if usual(name).is_none_or(|(_, set, _)| set != value) {
            set_sysctl(name, value)?;
        }
    }
    for (name, _, kernels) in USUAL_SYSCTLS {
        if !request.sysctls.contains_key(name) {
            set_sysctl(name, kernels)?;
        }
    }
    Ok(())
}

fn set_shared_memory(bytes: u64) -> Result<(), IdentityError> {
    if bytes == 0 || bytes == DEFAULT_SHM_BYTES {
        return Ok(());
    }
    let options = format!("mode=1777,size={bytes}");
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(None::<&str>, "/dev/shm", None::<&str>, flags, Some(options.as_str()))
        .map_err(step(format!("/dev/shm of {bytes} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> api::StartSandboxRequest {
        api::StartSandboxRequest {
            protocol_version: limits::PROTOCOL_VERSION,
            wall_clock_ns: 1,
            entropy: (0..limits::ENTROPY_BYTES).map(|n| n as u8).collect(),
            machine_id: vec![1; 16],
            hostname: "web-0".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn sysctls_of_a_pod_only() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.100/rp_filter", "/proc/sys/net/ipv4/conf/eth0.100/rp_filter"),
            ("kernel.shm_rmid_forced", "/proc/sys/kernel/shm_rmid_forced"),
            ("kernel.sem", "/proc/sys/kernel/sem"),
            ("fs.mqueue.msg_max", "/proc/sys/fs/mqueue/msg_max"),
        ] {
            assert_eq!(sysctl_path(name).unwrap(), PathBuf::from(path));
        }
        for name in [
            "",
            "net",
            "net.",
            "net..x",
            "kernel.core_pattern",
            "vm.swappiness",
            "net/../kernel/x",
            "net/./x",
            "/net/x",
            "kernel.random.boot_id",
            "fs.mqueue.a.b",
            "net.a\0b",
        ] {
            assert!(sysctl_path(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_machine_id_is_read_as_it_is_written() {
        assert_eq!(from_hex(b"00ff1a"), Some(vec![0, 0xff, 0x1a]));
        assert_eq!(from_hex(b"0g"), None);
    }

    #[test]
    fn refuses_what_cannot_make_an_identity() {
        assert!(check(&request()).is_ok());
        let faults: [fn(&mut api::StartSandboxRequest); 7] = [
            |r| r.protocol_version += 1,
            |r| r.entropy.truncate(8),
            |r| r.entropy.fill(0),
            |r| r.machine_id.clear(),
            |r| r.wall_clock_ns = 0,
            |r| r.hostname = "a b".to_owned(),
            |r| drop(r.sysctls.insert("vm.swappiness".to_owned(), "1".to_owned())),
        ];
        for (index, fault) in faults.iter().enumerate() {
            let mut request = request();
            fault(&mut request);
            assert!(check(&request).is_err_and(|e| e.is_callers()), "fault {index}");
        }
    }
}
