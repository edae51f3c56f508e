//! A container's mounts, made below its root before the root becomes `/`.
//!
//! Every mount is built detached, with its attributes, and then attached to a descriptor that was
//! opened below the root: no path is looked up twice, and none can lead out of the root.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Mount;

use super::mount_options::{self, Options};
use super::paths::{self, Missing};
use super::spare::BindSource;
use super::sys::{self, MountAttr};
use super::{Error, Kind, devices};

const RESOLVE_NO_SYMLINKS: u64 = 0x04;

fn bad(mount: &Mount, why: impl std::fmt::Display) -> Error {
    Error::failed(format!("mounting {:?}: {why}", mount.destination()))
}

/// Makes all mounts of the specification, in its order. Gives whether `/dev` is to become
/// read-only once it is filled.
pub(crate) fn mount_all(
    root: BorrowedFd<'_>,
    mounts: &[Mount],
    usual: &mut Usual,
    bind_source: BindSource,
) -> Result<bool, Error> {
    let mut read_only_dev = false;
    for mount in mounts {
        let options = mount.options().as_deref().unwrap_or(&[]);
        let mut options = mount_options::parse(options).map_err(|why| {
            let text = format!("mounting {:?}: {why}", mount.destination());
            Error::new(Kind::Unsupported, text)
        })?;
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            let text = format!(
                "mounting {:?}: ID-mapped mounts are not available in a VM pod",
                mount.destination()
            );
            return Err(Error::new(Kind::Unsupported, text));
        }
        let bind = options.bind || mount.typ().as_deref() == Some("bind");
        if is_dev(mount) && !bind && options.read_only() {
            read_only_dev = true;
            options = options.without_read_only();
        }
        match bind {
            true => bind_mount(root, mount, &options, bind_source)?,
            false => new_mount(root, mount, &options, usual)?,
        }
    }
    Ok(read_only_dev)
}

fn is_dev(mount: &Mount) -> bool {
    mount.destination().components().eq(Path::new("/dev").components())
}

/// Whether the container brings the guest's or a volume's directory as its `/dev`.
pub(crate) fn brings_own_dev(mounts: &[Mount]) -> bool {
    mounts.iter().filter(|mount| is_dev(mount)).any(|mount| {
        let named = |option: &String| option == "bind" || option == "rbind";
        mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(named)
    })
}

/// Opens the mount point, creating what is missing.
fn target(root: BorrowedFd<'_>, mount: &Mount, missing: Missing) -> Result<OwnedFd, Error> {
    let path = paths::relative(mount.destination())
        .map_err(|why| Error::new(Kind::Invalid, bad(mount, why).to_string()))?;
    let Some(path) = path else {
        let text = bad(mount, "the root itself cannot be a mount's destination").to_string();
        return Err(Error::new(Kind::Invalid, text));
    };
    paths::open_or_create(root, &path, missing)
        .map_err(|error| bad(mount, format!("making its mount point: {error}")))
}

fn bind_mount(
    root: BorrowedFd<'_>,
    mount: &Mount,
    options: &Options,
    bind_source: BindSource,
) -> Result<(), Error> {
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    let below = || target(root, mount, Missing::Directory).map_err(|error| error.to_string());
    let opened = bind_source(source, &below).map_err(|why| bad(mount, why))?;
    let is_directory = File::from(opened.try_clone().map_err(|error| bad(mount, error))?)
        .metadata()
        .map_err(|error| bad(mount, format!("{source:?}: {error}")))?
        .is_dir();
    let target =
        target(root, mount, if is_directory { Missing::Directory } else { Missing::File })?;
    let onto = nix::sys::stat::fstat(&target).map_err(|error| bad(mount, error))?;
    if is_directory != (onto.st_mode & libc::S_IFMT == libc::S_IFDIR) {
        let why = match is_directory {
            true => "a directory cannot be mounted on what is a file in the image",
            false => "a file cannot be mounted on what is a directory in the image",
        };
        return Err(Error::new(Kind::Invalid, bad(mount, why).to_string()));
    }
    let copy = sys::clone_tree(opened.as_fd(), Path::new(""), options.recursive)
        .map_err(|error| bad(mount, format!("binding {source:?}: {error}")))?;
    finish(mount, copy.as_fd(), options, target.as_fd())
}

/// The file systems that nearly every container mounts, made beforehand and not yet in any place.
#[derive(Debug)]
pub(crate) struct Usual(Vec<(FileSystem, OwnedFd)>);

/// A type and its options.
type FileSystem = (&'static str, &'static [&'static str]);

/// As CRI asks for them.
const USUAL: [FileSystem; 6] = [
    ("proc", &[]),
    (DEV.0, DEV.1),
    ("devpts", &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
    ("mqueue", &[]),
    ("sysfs", &[]),
    ("cgroup2", &[]),
];
const DEV: FileSystem = ("tmpfs", &["mode=755", "size=65536k"]);

impl Usual {
    /// Makes what the kernel lets it make: the rest is made, or refused, when it is asked for.
    pub(crate) fn make() -> Usual {
        let made = |fs: FileSystem| {
            let options = fs.1.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
            let source = if fs.0 == "cgroup2" { "cgroup" } else { fs.0 };
            let made = make(fs.0, &options, Some(source)).ok()?;
            if fs == DEV {
                devices::fill_standard(made.as_fd()).ok()?;
            }
            Some((fs, made))
        };
        Usual(USUAL.into_iter().filter_map(made).collect())
    }

    /// They belong to the IPC namespace in which they were made.
    pub(crate) fn forget_message_queues(&mut self) {
        self.0.retain(|((kind, _), _)| *kind != "mqueue");
    }

    /// The one that is made like this; `/dev` is for `/dev` alone.
    fn take(&mut self, kind: &str, data: &[String], is_dev: bool) -> Option<OwnedFd> {
        let fits = |fs: &FileSystem| fs.0 == kind && fs.1 == data && (*fs == DEV) == is_dev;
        let index = self.0.iter().position(|(fs, _)| fits(fs))?;
        Some(self.0.swap_remove(index).1)
    }
}

/// Why a file system was not made.
enum Unmade {
    Unknown,
    Option(String, io::Error),
    Failed(io::Error),
}

fn make(kind: &str, data: &[String], source: Option<&str>) -> Result<OwnedFd, Unmade> {
    let text = |text: &str| CString::new(text).map_err(|error| Unmade::Failed(error.into()));
    let fs = sys::fs_open(&text(kind)?).map_err(|error| match error.raw_os_error() {
        Some(libc::ENODEV) => Unmade::Unknown,
        _ => Unmade::Failed(error),
    })?;
    for option in data {
        set_option(fs.as_fd(), option).map_err(|error| Unmade::Option(option.clone(), error))?;
    }
    if let Some(source) = source {
        sys::fs_set(fs.as_fd(), c"source", Some(&text(source)?)).map_err(Unmade::Failed)?;
    }
    sys::fs_mount(fs.as_fd(), 0).map_err(Unmade::Failed)
}

fn new_mount(
    root: BorrowedFd<'_>,
    mount: &Mount,
    options: &Options,
    usual: &mut Usual,
) -> Result<(), Error> {
    let named = mount.typ().as_deref().unwrap_or("");
    // The guest has cgroup v2 alone, whatever the host has.
    let kind = if named == "cgroup" { "cgroup2" } else { named };
    if kind.is_empty() || kind == "none" {
        return Err(bad(mount, "it has neither a type nor the option bind"));
    }
    // Options for a version 1 cgroup mean nothing to version 2.
    let data = if kind == "cgroup2" { &[][..] } else { &options.data };
    let made = match usual.take(kind, data, is_dev(mount)) {
        Some(made) => made,
        None => make(kind, data, mount.source().as_deref().and_then(Path::to_str)).map_err(
            |unmade| match unmade {
                Unmade::Unknown => {
                    let text = bad(mount, format!("unknown file system type {kind:?}"));
                    Error::new(Kind::Unsupported, text.to_string())
                }
                Unmade::Option(option, error) => bad(mount, format!("option {option:?}: {error}")),
                Unmade::Failed(error) => {
                    bad(mount, format!("file system of type {kind:?}: {error}"))
                }
            },
        )?,
    };
    let target = match kind {
        "proc" | "sysfs" => plain_target(root, mount)?,
        _ => target(root, mount, Missing::Directory)?,
    };
    finish(mount, made.as_fd(), options, target.as_fd())
}

/// The kernel's own file systems are never mounted through a link that the image brought.
fn plain_target(root: BorrowedFd<'_>, mount: &Mount) -> Result<OwnedFd, Error> {
    drop(target(root, mount, Missing::Directory)?);
    let path = paths::relative(mount.destination()).ok().flatten().unwrap_or_default();
    sys::open_at2(root, &path, libc::O_PATH | libc::O_DIRECTORY, 0, RESOLVE_NO_SYMLINKS)
        .map_err(|error| bad(mount, format!("it must be a directory, not a link: {error}")))
}

fn set_option(fs: BorrowedFd<'_>, option: &str) -> io::Result<()> {
    match option.split_once('=') {
        Some((key, value)) => sys::fs_set(fs, &CString::new(key)?, Some(&CString::new(value)?)),
        None => sys::fs_set(fs, &CString::new(option)?, None),
    }
}

/// Attributes, then the place, then what needs a place: the propagation.
fn finish(
    mount: &Mount,
    made: BorrowedFd<'_>,
    options: &Options,
    target: BorrowedFd<'_>,
) -> Result<(), Error> {
    let set = |attributes: &MountAttr, recursive: bool| match *attributes == MountAttr::default() {
        true => Ok(()),
        false => sys::set_mount_attributes(made, attributes, recursive)
            .map_err(|error| bad(mount, format!("setting its attributes: {error}"))),
    };
    set(&options.attributes, false)?;
    set(&options.recursive_attributes, true)?;
    sys::attach(made, target).map_err(|error| bad(mount, error))?;
    if let Some((propagation, recursive)) = options.propagation {
        set(&MountAttr { propagation, ..MountAttr::default() }, recursive)?;
    }
    Ok(())
}
