//! The disk under joey-snapshotter's store is full to its last block: images can still be removed, and then there is
//! room again.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use joey_snapshotter::store::Store;

use crate::block::zeros;
use crate::context::{Context, Test, same};
use crate::power::{Mounted, add, apart};

pub const TESTS: &[Test] = &[Test { name: "full::images_can_go", run: images_can_go }];

fn images_can_go(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let disk = zeros(ctx, 64 << 20)?;
    let made = Command::new("mkfs.ext4").args(["-q", &disk.device]).status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    let folder = disk.file.with_extension("store");
    fs::create_dir(&folder)?;
    let done = apart(|| {
        let _mounted = Mounted::new(&disk.device, &folder)?;
        fill(&folder)
    });
    fs::remove_dir(&folder)?;
    done
}

fn fill(folder: &Path) -> Result<()> {
    let root = folder.join("store");
    let store = Store::open(&root)?;
    for number in 0..8 {
        add(&store, number)?;
    }
    let mut filler = File::create(folder.join("filler"))?;
    for piece in [1 << 20, 4096] {
        while filler.write_all(&vec![1; piece]).is_ok() {}
    }
    filler.sync_all()?;
    ensure!(add(&store, 8).is_err(), "the disk is not full");
    drop(store);
    let store = Store::open(&root).context("open the store on a full disk")?;
    if store.get("extract-8").is_ok() {
        store.remove("extract-8").context("what was begun")?;
    }
    for number in (0..8).rev() {
        store
            .remove(&format!("snapshot-{number}"))
            .with_context(|| format!("snapshot {number}"))?;
    }
    store.collect().context("collect")?;
    same("layers", fs::read_dir(root.join("layers"))?.count(), 0)?;
    add(&store, 0).context("there is room again")
}
