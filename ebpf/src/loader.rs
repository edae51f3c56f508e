//! Loading the programs and pinning them: once per node and version, by `joey ebpf load`.
//!
//! Kept off the start path of pods: verifying takes milliseconds, and the loader reads the kernel's
//! type information first. Whoever finds the pin missing runs the tool, as often as they like.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use aya::programs::{ProgramError, SchedClassifier};
use aya::{EbpfError, EbpfLoader, include_bytes_aligned};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::policy::loader::{Policy, PolicyError};

static OBJECT: &[u8] = include_bytes_aligned!(env!("JOEY_WIRE_OBJECT"));
/// The function in `bpf/wire.bpf.c`.
const PROGRAM: &str = "wire";

/// Why the program is not pinned.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is nowhere to pin.
    #[error(
        "{0} is not on a BPF file system: mount one there (mount -t bpf bpf {0}), or set bpf_dir to \
         a directory below one"
    )]
    NotBpf(PathBuf),
    /// A step on the file system.
    #[error("BPF directory {path}: {step}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The object could not be read or its maps made.
    #[error("the wire's object: {0}")]
    Object(#[from] EbpfError),
    /// The kernel did not take the program.
    #[error("the wire's program: {0}; Joey needs Linux 5.4 or later with CONFIG_BPF_SYSCALL")]
    Program(#[from] ProgramError),
    /// The policy's programs or maps.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Another program than the one built.
    #[error("the wire's object has no program {PROGRAM:?}")]
    Missing,
}

/// Loads and pins the programs, the wire's and the policy's with its maps, unless they are there; returns
/// where the wire's is. `fill` is to put into maps that were just made, as after a boot, what was in force: no pod
/// starts before it has.
pub fn load(
    bpf_dir: &Path,
    fill: impl FnOnce() -> Result<(), String>,
) -> Result<PathBuf, LoadError> {
    let fail =
        |step| move |source: io::Error| LoadError::Io { path: bpf_dir.to_owned(), step, source };
    let parent = bpf_dir.parent().unwrap_or(bpf_dir);
    let kind = statfs(parent).map_err(|error| LoadError::Io {
        path: parent.to_owned(),
        step: "look at its file system",
        source: error.into(),
    })?;
    if kind.filesystem_type() != BPF_FS_MAGIC {
        return Err(LoadError::NotBpf(parent.to_owned()));
    }
    match DirBuilder::new().mode(0o700).create(bpf_dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(fail("create")(error));
        }
        _ => {}
    }
    // A BPF file system has no plain files, so the directory itself is what is locked.
    let directory = File::open(bpf_dir).map_err(fail("open"))?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, error)| fail("lock")(error.into()))?;
    load_wire(bpf_dir)?;
    Policy::pin(bpf_dir, fill)?;
    Ok(crate::pinned_path(bpf_dir))
}

fn load_wire(bpf_dir: &Path) -> Result<(), LoadError> {
    let path = crate::pinned_path(bpf_dir);
    if fs::symlink_metadata(&path).is_ok() {
        return Ok(());
    }
    let mut object = EbpfLoader::new().load(OBJECT)?;
    let program = object.program_mut(PROGRAM).ok_or(LoadError::Missing)?;
    let program: &mut SchedClassifier = program.try_into()?;
    program.load()?;
    program.pin(&path).map_err(|error| LoadError::Io {
        path,
        step: "pin",
        source: io::Error::other(error),
    })
}

#[cfg(test)]
#[allow(clippy::print_stdout)]
mod tests {
    use super::*;
    use crate::policy::maps::{Lock, Maps};

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let error = load(Path::new("/tmp/joey"), || Ok(())).unwrap_err();
        assert!(matches!(error, LoadError::NotBpf(_)), "{error}");
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }

    #[test]
    fn loading_twice_is_loading_once() {
        if !nix::unistd::geteuid().is_root() {
            // Not by a macro, whose output a harness keeps for itself when a test passes.
            let why = "\nSKIPPED loading programs: needs root\n";
            let _ = io::Write::write_all(&mut io::stdout(), why.as_bytes());
            return;
        }
        let root = std::env::temp_dir().join(format!("joey-bpf-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("bpf"), &root, Some("bpf"), flags, None::<&str>).unwrap();
        let directory = root.join("joey");
        assert_eq!(
            crate::attach::open(&directory).unwrap_err().kind(),
            io::ErrorKind::NotFound,
            "who attaches must see that it was not loaded"
        );
        let loads: Vec<_> = (0..4)
            .map(|_| {
                let directory = directory.clone();
                std::thread::spawn(move || load(&directory, || Ok(())))
            })
            .collect();
        for load in loads {
            assert_eq!(load.join().unwrap().unwrap(), crate::pinned_path(&directory));
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
        crate::attach::open(&directory).unwrap();
        crate::policy::attach::Programs::open(&directory).unwrap();
        let pins = || fs::read_dir(crate::policy::maps::directory(&directory)).unwrap();
        // 14 maps and 7 programs.
        assert_eq!(pins().count(), 21);
        let maps = Maps::open(&directory).unwrap();
        let active = maps.active().unwrap();
        assert_eq!(active.epoch, 1);
        // Whatever of it is missing is made again; what is there stays.
        let lock = Lock::take(&directory).unwrap();
        assert_eq!(maps.number_of(&lock, "red").unwrap(), 1);
        drop(lock);
        for pin in pins() {
            let pin = pin.unwrap();
            let name = pin.file_name();
            if matches!(name.to_str(), Some("names" | "active")) {
                continue;
            }
            fs::remove_file(pin.path()).unwrap();
            for side in ["from_vm", "mesh_out"] {
                let digest = env!("JOEY_POLICY_DIGEST");
                let program = crate::policy::maps::directory(&directory);
                let _ = fs::remove_file(program.join(format!("{side}-{digest}")));
            }
            load(&directory, || Ok(())).unwrap();
            assert_eq!(pins().count(), 21, "without {name:?}");
        }
        let maps = Maps::open(&directory).unwrap();
        assert_eq!(maps.active().unwrap(), active);
        assert_eq!(maps.names().unwrap().get(&1).map(String::as_str), Some("red"));
        nix::mount::umount(&root).unwrap();
        fs::remove_dir(&root).unwrap();
    }
}
