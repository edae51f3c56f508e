//! `bench image`: a real image unpacked by joey-snapshotter and by overlayfs, and containers of images with
//! few and many layers.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::stats::{Report, Samples};
use super::{machine, milliseconds, rest};
use crate::image::{self, DEBIAN, Layer};
use crate::node::config::Version;
use crate::node::{Node, cgroups};
use crate::pod::{self, Pod};

/// Layers of the images whose start is measured.
const LAYERS: [usize; 4] = [1, 10, 50, 100];

/// Measures and returns the report; `progress` is told what happens.
pub fn image(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut samples = Samples::default();
    progress("making an image of Debian's python3 and openjdk");
    let folder = crate::paths::repository().join("target/images");
    let archive = image::debian(&folder)?;
    for run in 1..=runs {
        for (subject, snapshotter) in [("joey", "joey"), ("overlayfs", "overlayfs")] {
            unpack(node, subject, snapshotter, &archive, &mut samples)?;
        }
        progress(&format!("{run} of {runs} images unpacked"));
    }
    for layers in LAYERS {
        let name = format!("localhost/layers{layers}:1");
        let path = node.dir().join("images/layers.tar");
        // Busybox has two of its own.
        let more = (2..layers).map(|number| {
            Layer::default().file(&format!("layer-{number}"), 0o644, format!("{number}").as_bytes())
        });
        image::on_busybox(&path, &name, more.collect::<Result<_>>()?, &[])?;
        node.import(&path)?;
        for run in 0..=runs {
            for handler in ["joey", "runc"] {
                let time = start(node, handler, &name)?;
                // The first one unpacks the image.
                if run > 0 {
                    let metric = format!("start_with_{layers}_layers");
                    samples.add(handler, &metric, "ms", milliseconds(time));
                }
            }
        }
        progress(&format!("containers of {layers} layers started"));
    }
    Ok(samples.report("image", &machine(), "joey", "overlayfs"))
}

/// Imports and unpacks the archive into a node that has nothing of it.
fn unpack(
    node: &Node,
    subject: &str,
    snapshotter: &str,
    archive: &Path,
    samples: &mut Samples,
) -> Result<()> {
    rest(node);
    let store = match snapshotter {
        "joey" => node.store(),
        _ => node.dir().join("root/io.containerd.snapshotter.v1.overlayfs"),
    };
    let before = disk_used(&store)?;
    let system = format!("{}/system", node.cgroup());
    let cpu = || cgroups::cpu_nanoseconds(&system).context("the node's CPU time is not counted");
    let used = cpu()?;
    let local: &[&str] = if node.version == Version::V2_1 { &["--local"] } else { &[] };
    let path = archive.to_string_lossy();
    let start = Instant::now();
    node.ctr(&[&["images", "import", "--snapshotter", snapshotter], local, &[&*path]].concat())?;
    samples.add(subject, "unpack_image", "ms", milliseconds(start.elapsed()));
    let used = Duration::from_nanos(cpu()?.saturating_sub(used));
    samples.add(subject, "host_cpu", "ms", milliseconds(used));
    let disk = disk_used(&store)?.saturating_sub(before);
    samples.add(subject, "disk_used", "MiB", disk as f64 / f64::from(1 << 20));
    node.cri.remove_image(DEBIAN)
}

/// From CreateContainer to a started container, in a new pod.
fn start(node: &Node, handler: &str, image: &str) -> Result<Duration> {
    rest(node);
    let pod = Pod::run(node, handler, "layers")?;
    let mut config = pod::container("main", &["sleep", "1000"]);
    config.image.get_or_insert_default().image = image.to_owned();
    let start = Instant::now();
    pod.start(&config)?;
    let time = start.elapsed();
    pod.remove()?;
    Ok(time)
}

/// Bytes on disk of everything below a folder, hard links counted once.
fn disk_used(folder: &Path) -> Result<u64> {
    let mut seen = std::collections::HashSet::new();
    let (mut bytes, mut left) = (0, vec![folder.to_owned()]);
    while let Some(path) = left.pop() {
        // Something may go while it is counted.
        let Ok(meta) = path.symlink_metadata() else { continue };
        if seen.insert(meta.ino()) {
            bytes += meta.blocks() * 512;
        }
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
    }
    Ok(bytes)
}
