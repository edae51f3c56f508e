//! The pod's writable disk: encrypted by the guest, limited, and gone with the pod.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::{self, Pod};

use crate::context::{Context, Test, holds, refused, same};
use crate::faults;
use crate::volumes::{InMemory, mounted, publish, volume};

pub const TESTS: &[Test] = &[
    Test { name: "disk::full_is_the_pods_alone", run: full_is_the_pods_alone },
    Test { name: "disk::layers_come_and_go", run: layers_come_and_go },
    Test { name: "disk::has_its_speed", run: has_its_speed },
    Test { name: "disk::reads_and_operations_have_theirs", run: reads_and_operations_have_theirs },
    Test { name: "disk::memory_has_its_limit", run: memory_has_its_limit },
    Test { name: "disk::host_sees_nothing", run: host_sees_nothing },
    Test { name: "disk::empty_dirs_have_their_limit", run: empty_dirs_have_their_limit },
];

/// Removal waits a while, since the pod is most often gone by then.
const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

fn pod<'a>(ctx: &Context<'a>, disk: &str) -> Result<Pod<'a>> {
    let mut config = pod::config(ctx.node, "disk");
    config.annotations.insert("io.joey.disk".into(), disk.into());
    Pod::run_with(ctx.node, ctx.handler, config)
}

/// The file behind a pod's disk, as only the VMM has it open.
fn behind(ctx: &Context<'_>, pod: &Pod<'_>) -> Result<PathBuf> {
    let vmm = faults::vmm(ctx, pod)?;
    let open = fs::read_dir(format!("/proc/{vmm}/fd"))?.flatten().map(|entry| entry.path());
    let disk = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        let target = target.to_string_lossy().into_owned();
        target.contains("/joey/disks/") && target.ends_with(" (deleted)")
    };
    open.into_iter().find(disk).context("the VMM has no nameless file open")
}

/// Waits until no more than so much of the host's disk is used.
fn shrinks(ctx: &Context<'_>, pod: &Pod<'_>, bytes: u64) -> Result<()> {
    let (file, begun) = (behind(ctx, pod)?, Instant::now());
    loop {
        let used = fs::metadata(&file)?.blocks() * 512;
        if used <= bytes {
            return Ok(());
        }
        ensure!(begun.elapsed() < SOON, "{used} bytes are used, not {bytes}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn full_is_the_pods_alone(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = pod(ctx, "256Mi")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let full = container.sh("dd if=/dev/zero of=/big bs=1M 2>&1; df -m / | tail -1")?.text();
    holds("said", &full, "No space left on device")?;
    let file = behind(ctx, &pod)?;
    same("size of the host's file", fs::metadata(&file)?.len(), 256 * MIB)?;
    let other = ctx.pod("neighbour")?;
    same("a neighbour", other.script("echo x > /x; cat /x")?.text(), "x")?;
    other.remove()?;
    same("still runs", container.sh("rm /big; echo x > /x; cat /x")?.text(), "x")?;
    shrinks(ctx, &pod, 32 * MIB)?;
    same(
        "again",
        container.sh("dd if=/dev/zero of=/big bs=1M count=100 2>/dev/null; echo $?")?.text(),
        "0",
    )?;
    pod.remove()
}

fn layers_come_and_go(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = pod(ctx, "1Gi")?;
    let script = "ls /big 2>/dev/null; dd if=/dev/zero of=/big bs=1M count=60 2>/dev/null; sync; df -m / | awk 'END { print $3 }'";
    for round in 0..3 {
        let used = pod.finish(&pod::script("c", script))?.text();
        let used: u64 = used.parse().with_context(|| format!("round {round}: {used:?}"))?;
        ensure!((60..70).contains(&used), "round {round}: a new layer uses {used} MiB");
        shrinks(ctx, &pod, 32 * MIB)?;
    }
    pod.remove()
}

/// How long it takes at least, that is: what it takes without a limit is the machine's matter.
fn has_its_speed(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let mut config = pod::config(ctx.node, "speed");
    config.annotations.insert("io.joey.disk.write-bytes".into(), "2Mi".into());
    let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let write = |mib: u64| {
        let begun = Instant::now();
        let said = container.sh(&format!(
            "dd if=/dev/zero of=/f bs=256k count={} oflag=direct 2>&1; echo $?",
            mib * 4
        ))?;
        ensure!(said.text().ends_with('0'), "{}", said.text());
        Ok(begun.elapsed())
    };
    let took = write(4)?;
    ensure!(took >= Duration::from_millis(1500), "4 MiB at 2 MiB/s took {took:?}");
    let limit = |value: &str| ctx.node.joey(&["limit", &pod.id, "--write-bytes", value]);
    limit("512Ki")?;
    let took = write(2)?;
    ensure!(took >= Duration::from_millis(3000), "2 MiB at 512 KiB/s took {took:?}");
    refused("a limit that is none", limit("fast"), "io.joey.disk.write-bytes")?;
    pod.remove()
}

fn reads_and_operations_have_theirs(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("operations")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let run = |script: &str| {
        let begun = Instant::now();
        let said = container.sh(&format!("{script} 2>&1; echo $?"))?;
        ensure!(said.text().ends_with('0'), "{}", said.text());
        Ok(begun.elapsed())
    };
    run("dd if=/dev/zero of=/f bs=256k count=16 oflag=direct")?;
    for (option, value, script) in [
        ("--read-bytes", "2Mi", "dd if=/f of=/dev/null bs=256k count=16 iflag=direct"),
        ("--read-operations", "50", "dd if=/f of=/dev/null bs=4k count=150 iflag=direct"),
        ("--write-operations", "50", "dd if=/dev/zero of=/f bs=4k count=150 oflag=direct"),
    ] {
        ctx.node.joey(&["limit", &pod.id, option, value])?;
        let took = run(script)?;
        ctx.node.joey(&["limit", &pod.id, option, "0"])?;
        ensure!(
            took >= Duration::from_millis(1500),
            "{script} with {option} {value} took {took:?}"
        );
    }
    pod.remove()
}

fn memory_has_its_limit(ctx: &Context<'_>) -> Result<()> {
    let folder = volume(ctx, "empty-dir", "memory")?;
    // As the kubelet does for `medium: Memory` with a sizeLimit.
    let _mounted = InMemory::mount(ctx, &folder, "size=8m,mode=1777")?;
    let pod = ctx.pod("memory")?;
    let script = "dd if=/dev/zero of=/m/big bs=1M count=16 2>&1; stat -c %a /m; df -k /m | tail -1";
    let container = mounted(pod::script("c", script), "/m", &folder, false);
    let said = pod.finish(&container)?.text();
    holds("said", &said, "No space left on device")?;
    holds("mode", &said, "1777")?;
    holds("size", &said, "8192")?;
    let later =
        mounted(pod::script("d", "ls -l /m | awk 'END { print $5 }'"), "/m", &folder, false);
    same("outlives a container", pod.finish(&later)?.text(), (8 * MIB).to_string())?;
    pod.remove()
}

fn host_sees_nothing(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    // What is searched for is never said: the container turns it round.
    let (turned, secret) = ("4d8a1c77e90b3f52-rekram", "c41f77a80e9d-terces");
    let [marker, secret_marker] =
        [turned, secret].map(|text| text.chars().rev().collect::<String>());
    let begun = ctx.node.dir().join("begun");
    fs::write(&begun, "")?;
    let scratch = volume(ctx, "empty-dir", "scratch")?;
    let folder = volume(ctx, "secret", "key")?;
    publish(&folder, 1, &[("key", &secret_marker)])?;
    let pod = pod(ctx, "256Mi")?;
    let container = mounted(pod::script("c", "sleep 1000"), "/scratch", &scratch, false);
    let container = pod.start(&mounted(container, "/key", &folder, true))?;
    let script = format!(
        "M=$(echo {turned} | rev); for f in /in-layer /scratch/in-volume /dev/shm/in-memory; do \
         for i in $(seq 2000); do echo \"$M $i\"; done > $f; cat /key/key >> $f; done; sync; \
         sed -n '$p' /scratch/in-volume"
    );
    holds("the container's copy", &container.sh(&script)?.text(), &secret_marker)?;
    let disk = behind(ctx, &pod)?;
    ensure!(fs::metadata(&disk)?.blocks() > 0, "nothing was written to {}", disk.display());
    // The kubelet's own copy shows that the search finds what is there.
    let kubelets = format!("{}/", folder.display());
    let found = changed_with(ctx, &secret_marker, &begun)?;
    ensure!(
        found.iter().any(|file| file.starts_with(&kubelets)),
        "the search does not work: {found:?}"
    );
    for text in [&marker, &secret_marker] {
        let mut found = changed_with(ctx, text, &begun)?;
        found.retain(|file| !file.starts_with(&kubelets));
        same("files with it", found, Vec::<String>::new())?;
    }
    pod.remove()
}

/// All files of the host with this text in them that changed after `stamp`, on disks and in memory, and those that
/// have no name any more and that some process has open (but machines' disks of a GiB and more, which are not this pod's).
fn changed_with(ctx: &Context<'_>, text: &str, stamp: &Path) -> Result<Vec<String>> {
    const SEARCH: &str = r#"{
        find / \( -fstype proc -o -fstype sysfs -o -fstype cgroup -o -fstype cgroup2 -o -fstype bpf \) -prune \
            -o -type f -cnewer "$2" -print0
        find -L /proc/[0-9]*/fd -maxdepth 1 -type f -links 0 -size -1048576k -print0
    } 2>/dev/null | xargs -0 -r grep --files-with-matches --text --fixed-strings --no-messages -- "$1""#;
    let mut search = Command::new("sh");
    search.args(["-c", SEARCH, "search", text]).arg(stamp);
    // Files may go while they are searched, and then the outcome is that of a failure.
    let output = ctx.node.run_inside(search)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(ToOwned::to_owned).collect())
}

/// An emptyDir on disk has the limit that the pod's annotation names, which the container meets as an error.
fn empty_dirs_have_their_limit(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let folder = volume(ctx, "empty-dir", "limited")?;
    let mut config = pod::config(ctx.node, "limited");
    config.annotations.insert("io.joey.empty-dir.limited".into(), "8Mi".into());
    let pod = Pod::run_with(ctx.node, ctx.handler, config.clone())?;
    let container = mounted(pod::script("c", "sleep 1000"), "/cache", &folder, false);
    let container = pod.start(&container)?;
    let fill = |n: u32| format!("dd if=/dev/zero of=/cache/f bs=1M count={n} 2>&1; rm /cache/f");
    let within = container.sh(&fill(7))?;
    ensure!(!within.text().contains("quota"), "{within:?}");
    let beyond = container.sh(&fill(9))?;
    ensure!(beyond.text().contains("quota exceeded"), "{beyond:?}");
    let size = container.sh("df -m /cache | awk 'END { print $2 }'")?;
    same("its size", size.text(), "8")?;
    // The layer is not what is limited.
    same(
        "the layer",
        container.sh("dd if=/dev/zero of=/f bs=1M count=20 2>/dev/null; echo $?")?.text(),
        "0",
    )?;
    pod.remove()?;
    config.annotations.insert("io.joey.empty-dir.limited".into(), "much".into());
    let wrong = Pod::run_with(ctx.node, ctx.handler, config);
    refused("a limit", wrong, "io.joey.empty-dir.limited = \"much\"")
}
