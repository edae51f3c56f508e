//! `bench disk` and `bench volume`: the same work on a container's own files and on a directory of the host.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use k8s_cri::v1::Mount;

use super::stats::{Report, Samples};
use super::{machine, milliseconds, rest};
use crate::node::Node;
use crate::pod::{self, Pod};

/// What is measured, in a directory of its own: past the page cache where it is about bytes.
const WORK: [(&str, &str); 5] = [
    ("write_32_mib", "dd if=/dev/zero of=big bs=1M count=32 oflag=direct"),
    ("read_32_mib", "dd if=big of=/dev/null bs=1M iflag=direct"),
    ("make_300_files", "for n in $(seq 300); do echo $n > f$n; done"),
    ("read_300_files", "cat f*"),
    ("remove_300_files", "rm f*"),
];
const HANDLERS: [&str; 2] = ["joey", "runc"];

/// The container's writable layer.
pub fn disk(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    measure(node, "disk", None, runs, progress)
}

/// A directory of the host.
pub fn volume(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let folder = node.dir().join("bench-volume");
    fs::create_dir_all(&folder)?;
    measure(node, "volume", Some(&folder), runs, progress)
}

fn measure(
    node: &Node,
    name: &str,
    shared: Option<&Path>,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut samples = Samples::default();
    for run in 0..=runs {
        for handler in HANDLERS {
            // The first pods make what is made once a node.
            let mut once = Samples::default();
            one(node, handler, shared, if run == 0 { &mut once } else { &mut samples })?;
        }
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(samples.report(name, &machine(), HANDLERS[0], HANDLERS[1]))
}

fn one(node: &Node, handler: &str, shared: Option<&Path>, samples: &mut Samples) -> Result<()> {
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
        let begun = Instant::now();
        let output = container.sh(&format!("cd /work/here && {{ {work}; }} > /dev/null 2>&1"))?;
        ensure!(output.code == 0, "{metric} ended with {}", output.code);
        samples.add(handler, metric, "ms", milliseconds(begun.elapsed()));
    }
    container.sh("rm -r /work/here")?;
    pod.remove()
}
