//! `bench image`: a real image pulled for joey-snapshotter and for overlayfs, and containers of images with
//! few and many layers.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::stats::{Report, Samples};
use super::{machine, milliseconds, rest, timeline};
use crate::image::{self, DEBIAN, Layer};
use crate::node::{Node, cgroups};
use crate::pod::{self, Pod};
use crate::registry::Registry;

/// Layers of the images whose start is measured.
const LAYERS: [usize; 4] = [2, 10, 50, 100];

/// Measures and returns the report; `progress` is told what happens.
pub fn image(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut samples = Samples::default();
    progress("making an image of Debian's python3 and openjdk");
    let folder = crate::paths::repository().join("target/images");
    let mut registry = Registry::start(node)?;
    let debian = registry.push(&image::debian(&folder)?, DEBIAN)?;
    for run in 1..=runs {
        for (handler, snapshotter) in [("joey", "joey"), ("runc", "overlayfs")] {
            pull(node, handler, snapshotter, &debian, &mut samples)?;
        }
        progress(&format!("{run} of {runs} images pulled"));
    }
    drop(registry);
    for layers in LAYERS {
        let name = format!("localhost/layers{layers}:1");
        let path = node.dir().join("images/layers.tar");
        // Busybox has two of its own.
        let more = (2..layers).map(|number| {
            Layer::default().file(&format!("layer-{number}"), 0o644, format!("{number}").as_bytes())
        });
        image::on_busybox(&path, &name, more.collect::<Result<_>>()?, &[])?;
        node.import(&path)?;
        for handler in ["joey", "runc"] {
            // The first one unpacks the image.
            start(node, handler, layers, &name, &mut Samples::default())?;
        }
    }
    // By turns, as the ratios are of numbers of layers too.
    for run in 1..=runs {
        for layers in LAYERS {
            for handler in ["joey", "runc"] {
                start(node, handler, layers, &format!("localhost/layers{layers}:1"), &mut samples)?;
            }
        }
        progress(&format!("{run} of {runs} times started with {LAYERS:?} layers"));
    }
    let pairs = [
        ("joey", "overlayfs"),
        ("joey", "content"),
        ("joey+50_layers", "joey+2_layers"),
        ("joey+50_layers", "runc+50_layers"),
        ("joey+2_layers", "runc+2_layers"),
    ];
    Ok(samples.report("image", &machine(), &pairs))
}

/// Pulls and unpacks an image for a handler's pods into a node that has nothing of it, and prepares a first container's
/// snapshot, for which joey-snapshotter lays the layers on each other.
fn pull(
    node: &Node,
    handler: &str,
    snapshotter: &str,
    image: &str,
    samples: &mut Samples,
) -> Result<()> {
    rest(node);
    let store = store(node, snapshotter);
    let before = used(&store)?;
    let system = format!("{}/system", node.cgroup());
    let cpu = || cgroups::cpu_nanoseconds(&system).context("the node's CPU time is not counted");
    let cpu_before = cpu()?;
    let begun = Instant::now();
    node.cri.pull(image, handler)?;
    samples.add(snapshotter, "pull_image", "ms", milliseconds(begun.elapsed()));
    let snapshots = ["snapshots", "--snapshotter", snapshotter];
    let top = top(&node.ctr(&[&snapshots[..], &["ls"]].concat())?)?;
    let begun = Instant::now();
    node.ctr(&[&snapshots[..], &["prepare", "bench", &top]].concat())?;
    samples.add(snapshotter, "prepare_first_snapshot", "ms", milliseconds(begun.elapsed()));
    let cpu = Duration::from_nanos(cpu()?.saturating_sub(cpu_before));
    samples.add(snapshotter, "host_cpu", "ms", milliseconds(cpu));
    let after = used(&store)?;
    let mut add = |subject, bytes: u64| {
        samples.add(subject, "disk_used", "MiB", bytes as f64 / f64::from(1 << 20));
    };
    add(snapshotter, after.blocks.saturating_sub(before.blocks));
    if snapshotter == "overlayfs" {
        add("content", after.content.saturating_sub(before.content));
    }
    node.ctr(&[&snapshots[..], &["rm", "bench"]].concat())?;
    node.cri.remove_image(image)
}

/// The uppermost committed snapshot of the image with the most layers in `ctr snapshots ls`' table.
fn top(table: &str) -> Result<String> {
    let rows: Vec<Vec<&str>> =
        table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let parent_of = |key: &str| {
        rows.iter().find(|row| row.first() == Some(&key) && row.len() == 3).map(|row| row[1])
    };
    let depth = |key: &str| std::iter::successors(Some(key), |key| parent_of(key)).count();
    let committed = rows.iter().filter(|row| row.last() == Some(&"Committed"));
    let deepest = committed.filter_map(|row| row.first()).max_by_key(|key| depth(key));
    deepest.map(|key| (*key).to_owned()).with_context(|| format!("no snapshots in {table:?}"))
}

/// From CreateContainer to a started container, in a new pod.
fn start(
    node: &Node,
    handler: &str,
    layers: usize,
    image: &str,
    samples: &mut Samples,
) -> Result<()> {
    rest(node);
    let subject = format!("{handler}+{layers}_layers");
    let pod = Pod::run(node, handler, "layers")?;
    let mut config = pod::container("main", &["sleep", "1000"]);
    config.image.get_or_insert_default().image = image.to_owned();
    let begun = Instant::now();
    pod.start(&config)?;
    samples.add(&subject, "start_container", "ms", milliseconds(begun.elapsed()));
    if let Some(took) = attach_and_mount(node, &pod) {
        samples.add(&subject, "attach_and_mount", "ms", took);
    }
    pod.remove()
}

/// How long the pod's container waited for its root file system: its disk's attachment on the host, and its
/// mounts in the guest.
fn attach_and_mount(node: &Node, pod: &Pod<'_>) -> Option<f64> {
    let timeline = timeline(node, pod);
    let steps = timeline["steps"].as_array()?;
    let counted = ["disk", "container-disks", "container-layer"];
    let took = steps.iter().filter(|step| counted.iter().any(|name| step["name"] == *name));
    Some(took.filter_map(|step| step["took_ms"].as_f64()).sum())
}

/// Where a snapshotter has its files.
pub(super) fn store(node: &Node, snapshotter: &str) -> PathBuf {
    match snapshotter {
        "joey" => node.store(),
        _ => node.dir().join("root/io.containerd.snapshotter.v1.overlayfs"),
    }
}

/// What is below a folder, hard links counted once, in bytes.
struct Used {
    /// On disk.
    blocks: u64,
    /// In regular files.
    content: u64,
}

fn used(folder: &Path) -> Result<Used> {
    let mut seen = std::collections::HashSet::new();
    let mut used = Used { blocks: 0, content: 0 };
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        // Something may go while it is counted.
        let Ok(meta) = path.symlink_metadata() else { continue };
        if seen.insert(meta.ino()) {
            used.blocks += meta.blocks() * 512;
            used.content += if meta.is_file() { meta.len() } else { 0 };
        }
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_uppermost_snapshot_is_the_one_with_the_most_below() {
        let table = "KEY PARENT KIND\nb a Committed\na  Committed\nother a Active\nc b Committed\n";
        assert_eq!(super::top(table).unwrap(), "c");
    }
}
