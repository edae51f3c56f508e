//! Power that fails while joey-snapshotter's store is written: what was committed is there and whole, what was not
//! is gone.
//!
//! The store is on a file system of its own, which is told to stop as it is (`EXT4_IOC_SHUTDOWN` without flushing the
//! log): from then on nothing reaches its disk. Mounted again, it has what was synced by then.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use joey_image::layer::{self, Node};
use joey_image::tar::Archive;
use joey_snapshotter::store::{Kind, Store};
use joey_tests::lose_power;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::block::zeros;
use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[Test { name: "power::fails_at_any_write", run: fails_at_any_write }];

const CONTENT: usize = 300_000;

fn fails_at_any_write(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let mut whole = 0;
    for wait in [0, 1, 2, 4, 8, 16, 32, 64, 128, 256] {
        let disk = zeros(ctx, 256 << 20)?;
        let made = Command::new("mkfs.ext4").args(["-q", &disk.device]).status()?;
        ensure!(made.success(), "mkfs.ext4: {made}");
        let folder = disk.file.with_extension("store");
        fs::create_dir(&folder)?;
        let outcome = apart(|| cut_off(&disk.device, &folder, Duration::from_millis(wait)));
        fs::remove_dir(&folder)?;
        whole += outcome.with_context(|| format!("power fails after {wait} ms"))?;
    }
    println!("        {whole} snapshots were committed before the power failed, and are whole");
    ensure!(whole > 0, "nothing was ever committed");
    Ok(())
}

/// Does something in a thread with mounts of its own, which are nobody else's.
pub fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let alone = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(alone).join().map_err(|_| anyhow!("panicked"))?)
}

/// Commits one snapshot after the other until the power fails, and looks at what is left; how many there are.
fn cut_off(device: &str, folder: &Path, wait: Duration) -> Result<usize> {
    let _mounted = Mounted::new(device, folder)?;
    let root = folder.join("store");
    let store = Store::open(&root)?;
    let held = File::open(folder)?;
    let done = AtomicUsize::new(0);
    let committed = std::thread::scope(|scope| -> Result<usize> {
        let power = scope.spawn(|| -> Result<usize> {
            std::thread::sleep(wait);
            // What is told as done while the power fails, nobody would have heard.
            let committed = done.load(Ordering::SeqCst);
            lose_power(&held)?;
            Ok(committed)
        });
        while add(&store, done.load(Ordering::SeqCst)).is_ok() {
            done.fetch_add(1, Ordering::SeqCst);
        }
        power.join().map_err(|_| anyhow!("panicked"))?
    })?;
    drop((store, held));
    umount2(folder, MntFlags::empty()).context("unmount what has no power")?;
    let _again = Mounted::new(device, folder).context("mount again")?;
    let store = Store::open(&root).context("open the store again")?;
    let there = (0..).take_while(|number| store.get(&format!("snapshot-{number}")).is_ok()).count();
    ensure!(there >= committed, "{committed} snapshots were committed, {there} are there");
    for number in 0..there {
        same("kind", store.get(&format!("snapshot-{number}"))?.kind, Kind::Committed)?;
        whole(&root.join(format!("layers/{number:064x}")), number)?;
    }
    let names = |folder: &str| -> Result<usize> { Ok(fs::read_dir(root.join(folder))?.count()) };
    let all = store.all()?.into_values().filter(|snapshot| snapshot.layer.is_some()).count();
    same("layers that nothing names", names("layers")?.saturating_sub(all), 0)?;
    same("unfinished", names("new")?, 0)?;
    if let Some(last) = there.checked_sub(1) {
        store.disk(&format!("snapshot-{last}")).context("a disk of all that is left")?;
    }
    Ok(committed)
}

pub struct Mounted(PathBuf);

impl Mounted {
    pub fn new(device: &str, folder: &Path) -> Result<Self> {
        mount(Some(device), folder, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The one that had no power was unmounted for the next.
        let _ = umount2(&self.0, MntFlags::empty());
    }
}

fn content(number: usize) -> Vec<u8> {
    (0..CONTENT).map(|at| (at.wrapping_mul(number + 7) >> 3) as u8).collect()
}

/// Commits a snapshot of one layer upon the last.
pub fn add(store: &Store, number: usize) -> Result<()> {
    let (key, name) = (format!("extract-{number}"), format!("snapshot-{number}"));
    let parent = number.checked_sub(1).map(|last| format!("snapshot-{last}")).unwrap_or_default();
    store.prepare(&key, &parent, Kind::Active, BTreeMap::new())?;
    let new = store.begin()?;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(CONTENT as u64);
    tar.append_data(&mut header, format!("file-{number}"), content(number).as_slice())?;
    layer::write(&new.path, Archive::new(tar.into_inner()?.as_slice()), 1 << 30)?;
    store.apply(&key, &format!("sha256:{number:064x}"), &new)?;
    Ok(store.commit(&key, &name, BTreeMap::new())?)
}

/// Whether the layer has its one file, with the content it had.
fn whole(folder: &Path, number: usize) -> Result<()> {
    let entries: Vec<_> = layer::entries(folder)?.collect::<Result<_, _>>()?;
    let [record] = entries.as_slice() else { anyhow::bail!("{} entries", entries.len()) };
    let Node::Regular(stored) = &record.entry.node else { anyhow::bail!("{:?}", record.entry) };
    let mut bytes = fs::read(folder.join("data"))?;
    bytes.truncate(CONTENT - stored.tail.len());
    bytes.extend_from_slice(&stored.tail);
    ensure!(bytes == content(number), "layer {number} has other bytes");
    Ok(())
}
