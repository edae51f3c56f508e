//! What images take and containers write is in the statistics of the runtime interface, from which the kubelet
//! collects images and holds pods to their `ephemeral-storage`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::image::Layer;
use joey_tests::node::config::OVERLAYFS;
use joey_tests::pod::{self, SOON};

use crate::context::{Context, Test, same, skip};
use crate::storage::Image;
use crate::volumes::{mounted, volume};

pub const TESTS: &[Test] = &[Test { name: "statistics::have_images_and_layers", run: have_both }];

const MIB: u64 = 1 << 20;

/// containerd's CRI, in 1.7 as in 2.1, collects these of its default snapshotter alone.
fn have_both(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler != "joey" {
        skip("a promise of joey-snapshotter's")?;
    }
    ctx.node.default_snapshotter("joey")?;
    let done = images(ctx).and_then(|()| layers(ctx));
    ctx.node.default_snapshotter(OVERLAYFS)?;
    done
}

/// Waits for a number of bytes, which containerd collects every ten seconds.
fn told(what: &str, ask: impl Fn() -> Result<u64>, is: impl Fn(u64) -> bool) -> Result<u64> {
    let end = Instant::now() + 2 * SOON;
    loop {
        let bytes = ask()?;
        if is(bytes) {
            return Ok(bytes);
        }
        ensure!(Instant::now() < end, "{what}: {bytes} bytes");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// What images take is the image file system's, and no more of it once they have gone.
fn images(ctx: &Context<'_>) -> Result<()> {
    let taken = || -> Result<u64> {
        let usage = ctx.node.ctr(&["snapshots", "--snapshotter", "joey", "usage", "-b"])?;
        let sizes = usage.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1));
        Ok(sizes.map(str::parse::<u64>).sum::<Result<_, _>>()?)
    };
    let store = ctx.node.store();
    let ask = || Ok(ctx.node.cri.image_bytes(&store)?.unwrap_or_default());
    let pod = ctx.pod("told")?;
    // The layers that its image shares with others are there before.
    same("unpacked", pod.script("echo ok")?.text(), "ok")?;
    let before = taken()?;
    let own = Layer::default().file("told", 0o644, &vec![b't'; 20 << 20])?;
    let image = Image::import(ctx, "told", vec![own])?;
    same("size", pod.finish(&image.script("wc -c < /told"))?.text(), "20971520")?;
    pod.remove()?;
    let with = taken()?;
    ensure!((20 * MIB..21 * MIB).contains(&(with - before)), "{before}, then {with} bytes");
    // containerd keeps what it was told first, an estimate of the index.
    told("with 20 MiB more", ask, |bytes| bytes.abs_diff(with) < MIB)?;
    drop(image);
    told("without them", ask, |bytes| bytes.abs_diff(before) < MIB).map(drop)
}

/// Each container's layer is told as its own; and what is in the pod's emptyDirs, while one container alone is there
/// to be held to it.
fn layers(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("written")?;
    let folder = volume(ctx, "empty-dir", "counted")?;
    let config = mounted(pod::script("c", "sleep 1000"), "/cache", &folder, false);
    let container = pod.start(&config)?;
    let uses = |id: &str, mib: u64| {
        let ask = || {
            let layer = ctx.node.cri.stats(id)?.writable_layer.unwrap_or_default();
            let inodes = layer.inodes_used.unwrap_or_default().value;
            let bytes = layer.used_bytes.unwrap_or_default().value;
            ensure!(bytes == 0 || inodes > 0, "{bytes} bytes in no file");
            Ok(bytes)
        };
        told(id, ask, |bytes| bytes > 0 && bytes / MIB == mib)
    };
    container.sh(
        "dd if=/dev/zero of=/big bs=1M count=20; dd if=/dev/zero of=/cache/big bs=1M count=9",
    )?;
    uses(&container.id, 29)?;
    let other = pod.start(&pod::script("o", "sleep 1000"))?;
    other.sh("dd if=/dev/zero of=/small bs=1M count=5")?;
    uses(&container.id, 20)?;
    uses(&other.id, 5)?;
    for container in [&container, &other] {
        let used = container.sh("df -m / | awk 'END { print $3 }'")?.text().parse::<u64>()?;
        ensure!((34..38).contains(&used), "df: {used} MiB");
    }
    container.sh("rm /big")?;
    uses(&container.id, 0)?;
    let written = || -> Result<usize> {
        let folder = ctx.node.dir().join("jrun/sandboxes").join(&pod.id).join("usage");
        Ok(fs::read_dir(folder)?.count())
    };
    same("what is written down", written()?, 2)?;
    other.remove(Duration::ZERO)?;
    same("of a deleted one", written()?, 1)?;
    pod.remove()
}
