//! `bench disk` and `bench volume`: the same work on a container's own files, on its image, on a bare disk, and
//! on a directory of the host.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::{ContainerConfig, Mount};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::images::store;
use super::stats::{Report, Samples};
use super::{machine, milliseconds, rest};
use crate::image::{self, Layer};
use crate::loop_device::Loop;
use crate::node::{Node, cgroups};
use crate::paths;
use crate::pod::{self, Container, Pod};

/// What is measured in a directory of its own: past the page cache where it is about bytes.
const WORK: [(&str, &str); 5] = [
    ("write_32_mib", "dd if=/dev/zero of=big bs=1M count=32 oflag=direct"),
    ("read_32_mib", "dd if=big of=/dev/null bs=1M iflag=direct"),
    ("make_300_files", "for n in $(seq 300); do echo $n > f$n; done"),
    ("read_300_files", "cat f*"),
    ("remove_300_files", "rm f*"),
];
/// The same on a disk that is neither encrypted nor has a file system.
const BARE: [(&str, &str); 2] = [
    ("write_32_mib", "dd if=/dev/zero of=/dev/bare bs=1M count=32 oflag=direct"),
    ("read_32_mib", "dd if=/dev/bare of=/dev/null bs=1M count=32 iflag=direct"),
];
/// Reads of an image's files, each of 32 MiB: metric, the probe's word, file. Cold where it is the file's first.
const READS: [(&str, &str, &str); 4] = [
    ("root_read_random_cold", "read-random", "/data/first"),
    ("root_read_cold", "read", "/data/second"),
    ("root_read_warm", "read", "/data/second"),
    ("root_read_random_warm", "read-random", "/data/second"),
];
const READ_BYTES: u64 = 32 << 20;
const IMAGE: &str = "localhost/files:1";
const HANDLERS: [&str; 2] = ["joey", "runc"];

/// The container's writable layer and its image, and for comparison a disk without dm-verity and dm-crypt.
pub fn disk(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let archive = node.dir().join("images/files.tar");
    let layer = Layer::default()
        .directory("data", 0o755)?
        .file("probe", 0o755, &fs::read(paths::probe())?)?
        .file("data/first", 0o644, &noise()?)?
        .file("data/second", 0o644, &noise()?)?;
    image::on_busybox(&archive, IMAGE, vec![layer], &[])?;
    node.import(&archive)?;
    let mut samples = Samples::default();
    for run in 0..=runs {
        // The first pods make what is made once a node.
        let mut once = Samples::default();
        let samples = if run == 0 { &mut once } else { &mut samples };
        for handler in HANDLERS {
            written(node, handler, None, samples)?;
            let first = image_read(node, handler, samples)?;
            if handler == "joey" {
                second_pod(node, samples)?;
            }
            first.remove()?;
        }
        bare_disk(node, samples)?;
        progress(&format!("{run} of {runs} runs"));
    }
    let pairs = [("joey", "runc"), ("joey", "joey+bare_disk")];
    Ok(samples.report("disk", &machine(), &pairs))
}

/// A directory of the host.
pub fn volume(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let folder = node.dir().join("bench-volume");
    fs::create_dir_all(&folder)?;
    let mut samples = Samples::default();
    for run in 0..=runs {
        for handler in HANDLERS {
            let mut once = Samples::default();
            let samples = if run == 0 { &mut once } else { &mut samples };
            written(node, handler, Some(&folder), samples)?;
        }
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(samples.report("volume", &machine(), &[(HANDLERS[0], HANDLERS[1])]))
}

/// Bytes that no cache has seen and no file system makes smaller.
fn noise() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open("/dev/urandom")?.take(READ_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The work in the container's writable layer, or in the shared folder.
fn written(node: &Node, handler: &str, shared: Option<&Path>, samples: &mut Samples) -> Result<()> {
    let pod = Pod::run(node, handler, "files")?;
    let mut config = pod::script("main", "mkdir -p /work/here; exec sleep 1000");
    config.mounts.extend(shared.map(|folder| Mount {
        container_path: "/work".into(),
        host_path: folder.display().to_string(),
        ..Mount::default()
    }));
    let container = pod.start(&config)?;
    container.sh("until cd /work/here; do sleep 0.1; done 2>/dev/null")?;
    rest(node);
    for (metric, work) in WORK {
        timed(&container, handler, metric, &format!("cd /work/here && {{ {work}; }}"), samples)?;
    }
    container.sh("rm -r /work/here")?;
    pod.remove()
}

fn timed(
    container: &Container<'_>,
    subject: &str,
    metric: &str,
    work: &str,
    samples: &mut Samples,
) -> Result<()> {
    let begun = Instant::now();
    let output = container.sh(&format!("{{ {work}; }} > /dev/null 2>&1"))?;
    ensure!(output.code == 0, "{metric} ended with {}", output.code);
    samples.add(subject, metric, "ms", milliseconds(begun.elapsed()));
    Ok(())
}

fn with_image(mut config: ContainerConfig) -> ContainerConfig {
    config.image.get_or_insert_default().image = IMAGE.into();
    config
}

/// Reads the image's files in a new pod, none of whose bytes are in the host's memory at first.
fn image_read<'n>(node: &'n Node, handler: &str, samples: &mut Samples) -> Result<Pod<'n>> {
    let pod = Pod::run(node, handler, "reads")?;
    forget(&store(node, if handler == "joey" { "joey" } else { "overlayfs" }))?;
    let container = pod.start(&with_image(pod::container("main", &["sleep", "1000"])))?;
    rest(node);
    let before = disk_reads(&pod)?;
    for (metric, how, file) in READS {
        samples.add(handler, metric, "ms", probed(&container, how, file)?);
    }
    // The processes of an exec with runc have gone, and their counters with them.
    if handler == "joey" {
        samples.add(handler, "read_from_disk", "MiB", disk_reads(&pod)? - before);
    }
    Ok(pod)
}

/// What a pod reads from the disk of files that another one has read: the host's page cache has them.
fn second_pod(node: &Node, samples: &mut Samples) -> Result<()> {
    let pod = Pod::run(node, "joey", "again")?;
    let before = disk_reads(&pod)?;
    let container = pod.start(&with_image(pod::container("main", &["sleep", "1000"])))?;
    for (_, how, file) in READS {
        probed(&container, how, file)?;
    }
    samples.add("joey+second_pod", "read_from_disk", "MiB", disk_reads(&pod)? - before);
    pod.remove()
}

/// The same reads, and the same writing past the page cache, of a disk without verification, encryption and
/// file system.
fn bare_disk(node: &Node, samples: &mut Samples) -> Result<()> {
    const SUBJECT: &str = "joey+bare_disk";
    let bare = Loop::new(node, READ_BYTES)?;
    File::options().write(true).open(&bare.file)?.write_all(&noise()?)?;
    let pod = Pod::run(node, "joey", "bare")?;
    let config = with_image(pod::container("main", &["sleep", "1000"]));
    let container = pod.start(&bare.give(config, "/dev/bare", "rwm"))?;
    rest(node);
    // The guest's cache of a device goes with its last opening: there is no warm one.
    for (metric, how, _) in READS.iter().filter(|(metric, ..)| metric.ends_with("cold")) {
        forget(&bare.file)?;
        forget(Path::new(&bare.device))?;
        samples.add(SUBJECT, metric, "ms", probed(&container, how, "/dev/bare")?);
    }
    for (metric, work) in BARE {
        timed(&container, SUBJECT, metric, work, samples)?;
    }
    pod.remove()
}

/// Milliseconds that the probe took, as it measured them itself.
fn probed(container: &Container<'_>, how: &str, file: &str) -> Result<f64> {
    let output = container.exec(&["/probe", how, file])?;
    output.text().parse().with_context(|| format!("{how} {file}: {output:?}"))
}

/// MiB that the pod's processes have had read from a disk since they started (`/proc/PID/io`).
fn disk_reads(pod: &Pod<'_>) -> Result<f64> {
    let mut bytes: u64 = 0;
    for pid in cgroups::processes(pod.cgroup()) {
        let counters = fs::read_to_string(format!("/proc/{pid}/io"))
            .with_context(|| format!("/proc/{pid}/io"))?;
        let line = counters.lines().find_map(|line| line.strip_prefix("read_bytes: "));
        bytes += line.context("no read_bytes in /proc/PID/io")?.parse::<u64>()?;
    }
    Ok(bytes as f64 / f64::from(1 << 20))
}

/// Drops the host's cached pages of all files below a folder, or of one file. What goes meanwhile has none.
fn forget(path: &Path) -> Result<()> {
    let mut left: Vec<PathBuf> = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        match forget_one(&path, &mut left) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            forgot => forgot.with_context(|| path.display().to_string())?,
        }
    }
    Ok(())
}

fn forget_one(path: &Path, left: &mut Vec<PathBuf>) -> io::Result<()> {
    let meta = path.symlink_metadata()?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            left.push(entry?.path());
        }
    } else if meta.is_file() || meta.file_type().is_block_device() {
        let file = File::open(path)?;
        file.sync_all()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    Ok(())
}
