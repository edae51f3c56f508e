//! `joey image convert`: directories of a snapshot to one EROFS image, in a process of its own.
//!
//! One converter per image, by a lock; the others wait and find it made. The merged view of several
//! layers is an overlay in a mount namespace that nobody else sees. An image is written beside,
//! synced, and appears by rename.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use nix::fcntl::FlockArg;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::{RootfsError, cache, io_error};
use crate::config::Config;

/// The same image for the same content.
const UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Lines of mkfs.erofs's output that an error shows.
const SHOWN: usize = 4;

/// Makes `output` of `lowers` (the top one first), unless it is there; then keeps the cache within
/// `bound_mib` MiB and a fifth of its file system.
///
/// # Errors
/// [`RootfsError`]; nothing is left behind.
pub fn run(
    config: &Config,
    output: &Path,
    bound_mib: u64,
    lowers: &[PathBuf],
) -> Result<(), RootfsError> {
    let folder = cache::folder(config);
    fs::create_dir_all(&folder).map_err(io_error("make folder", &folder))?;
    let lock = output.with_extension("lock");
    let held = cache::lock(&lock, FlockArg::LockExclusive).map_err(io_error("lock", &lock))?;
    if !output.exists() {
        make(config, output, lowers)?;
    }
    let _ = fs::remove_file(lock);
    drop(held);
    let fifth = nix::sys::statvfs::statvfs(&folder)
        .map_or(u64::MAX, |stat| stat.blocks() * stat.fragment_size() / 5);
    cache::shrink(config, (bound_mib << 20).min(fifth))?;
    Ok(())
}

fn make(config: &Config, output: &Path, lowers: &[PathBuf]) -> Result<(), RootfsError> {
    let beside = output.with_extension("new");
    let merged = output.with_extension("mnt");
    // Left by a converter that was killed.
    let _ = fs::remove_file(&beside);
    let made = match lowers {
        [only] => mkfs(config, &beside, only),
        several => with_overlay(&merged, several, || mkfs(config, &beside, &merged)),
    };
    let made = made.and_then(|()| {
        let file = File::open(&beside).map_err(io_error("open", &beside))?;
        file.sync_all().map_err(io_error("sync", &beside))?;
        fs::rename(&beside, output).map_err(io_error("publish", output))
    });
    if made.is_err() {
        let _ = fs::remove_file(&beside);
    }
    made
}

/// Runs `act` while `lowers` are mounted as one at `merged`, seen by this process only.
fn with_overlay(
    merged: &Path,
    lowers: &[PathBuf],
    act: impl FnOnce() -> Result<(), RootfsError>,
) -> Result<(), RootfsError> {
    let fail = |what| move |errno: nix::Error| io_error(what, merged)(io::Error::from(errno));
    unshare(CloneFlags::CLONE_NEWNS).map_err(fail("own mount namespace for"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(fail("own mount namespace for"))?;
    fs::create_dir_all(merged).map_err(io_error("make folder", merged))?;
    // mount(2) takes one page of options, so many layers need short names: relative ones.
    let parent = common_parent(lowers);
    std::env::set_current_dir(&parent).map_err(io_error("enter", &parent))?;
    let names: Vec<String> = lowers
        .iter()
        .map(|lower| lower.strip_prefix(&parent).unwrap_or(lower))
        .map(|lower| lower.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:"))
        .collect();
    let options = format!("lowerdir={}", names.join(":"));
    let mounted = mount(
        Some("overlay"),
        merged,
        Some("overlay"),
        MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some(options.as_str()),
    );
    let done = mounted.map_err(fail("mount the layers at")).and_then(|()| act());
    let _ = umount2(merged, MntFlags::MNT_DETACH);
    let _ = fs::remove_dir(merged);
    done
}

fn common_parent(paths: &[PathBuf]) -> PathBuf {
    let Some((first, rest)) = paths.split_first() else { return PathBuf::from("/") };
    let mut common: Vec<Component<'_>> = first.parent().unwrap_or(first).components().collect();
    for path in rest {
        let same = common.iter().zip(path.components()).take_while(|(a, b)| **a == *b).count();
        common.truncate(same);
    }
    common.iter().collect()
}

/// Has mkfs.erofs make an image of nothing, as it makes those of pods: older ones do not know all that they are
/// asked for. Its version.
///
/// # Errors
/// [`RootfsError`] with its own words.
pub fn trial(config: &Config) -> Result<String, RootfsError> {
    let folder = config.run_dir.join(format!("mkfs-{}", std::process::id()));
    let source = folder.join("source");
    fs::create_dir_all(&source).map_err(io_error("make folder", &source))?;
    let made = mkfs(config, &folder.join("image"), &source);
    let _ = fs::remove_dir_all(&folder);
    made?;
    // Its first line is its version even where it does not know the option.
    let told = Command::new(program(config)).arg("-V").output();
    let told = told.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    Ok(told.unwrap_or_default().lines().next().unwrap_or_default().to_owned())
}

fn program(config: &Config) -> PathBuf {
    config.mkfs_erofs.clone().unwrap_or_else(|| PathBuf::from("mkfs.erofs"))
}

fn mkfs(config: &Config, output: &Path, source: &Path) -> Result<(), RootfsError> {
    let failed = |reason: String| RootfsError::Convert { layers: 1, reason };
    let program = program(config);
    let run = Command::new(&program)
        .args(["--quiet", "-T0", "-U", UUID])
        .arg(output)
        .arg(source)
        .output()
        .map_err(|error| {
            failed(format!("{}: {error}; install the package erofs-utils", program.display()))
        })?;
    if run.status.success() {
        return Ok(());
    }
    let text = [run.stdout, run.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default().join("; ");
    let free = output.parent().and_then(|parent| nix::sys::statvfs::statvfs(parent).ok());
    let full = free.is_some_and(|stat| stat.blocks_available() < 256);
    let advice = if full { " (the file system is full: free some space)" } else { "" };
    Err(failed(format!("{} {}: {last}{advice}", program.display(), run.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_from_what_they_share() {
        let paths = ["/s/snapshots/3/fs", "/s/snapshots/20/fs"].map(PathBuf::from);
        assert_eq!(common_parent(&paths), Path::new("/s/snapshots"));
        assert_eq!(common_parent(&[PathBuf::from("/a/fs"), PathBuf::from("/b")]), Path::new("/"));
    }

    #[test]
    fn a_missing_mkfs_names_its_package_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: dir.path().to_owned(),
            mkfs_erofs: Some("/nowhere/mkfs.erofs".into()),
            ..Config::default()
        };
        let output = cache::folder(&config).join("k.erofs");
        let error = run(&config, &output, 1, &[dir.path().to_owned()]).unwrap_err().to_string();
        assert!(error.contains("erofs-utils"), "{error}");
        let left: Vec<_> = fs::read_dir(cache::folder(&config))
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != "k.lock")
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
