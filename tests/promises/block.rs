//! Block devices of the host in a pod (`volumeDevices`).

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use joey_tests::loop_device::Loop;
use joey_tests::pod;
use k8s_cri::v1::Device;

use crate::context::{Context, Test, holds, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "block::is_read_and_written", run: is_read_and_written },
    Test { name: "block::read_only_and_refused", run: read_only_and_refused },
];

const MIB: u64 = 1 << 20;

/// A device of so many zero bytes; where none can be made, the test is skipped.
pub fn zeros(ctx: &Context<'_>, bytes: u64) -> Result<Loop> {
    Loop::new(ctx.node, bytes).map_err(|error| skip(&format!("{error:#}")).err().unwrap_or(error))
}

fn bytes_at(path: &Path, at: u64, length: usize) -> Result<String> {
    let mut buffer = vec![0; length];
    File::open(path)?.read_exact_at(&mut buffer, at)?;
    String::from_utf8(buffer).context("not text")
}

fn is_read_and_written(ctx: &Context<'_>) -> Result<()> {
    let volume = zeros(ctx, 96 * MIB)?;
    File::options().write(true).open(&volume.file)?.write_all_at(b"from the host", 64 * MIB)?;
    let pod = ctx.pod("block")?;
    let config = volume.give(pod::script("c", "sleep 1000"), "/dev/xvda", "rwm");
    let container = pod.start(&config)?;
    let script = "blockdev --getsize64 /dev/xvda; dd if=/dev/xvda bs=1M skip=64 count=1 2>/dev/null | head -c 13";
    same("read", container.sh(script)?.text(), format!("{}\nfrom the host", 96 * MIB))?;
    let script = "echo from the guest | dd of=/dev/xvda bs=1M seek=95 conv=notrunc,fsync 2>/dev/null; \
                  dd if=/dev/xvda bs=1M skip=95 count=1 2>/dev/null | head -c 14";
    same("written", container.sh(script)?.text(), "from the guest")?;
    same("on the host", bytes_at(&volume.file, 95 * MIB, 14)?.as_str(), "from the guest")?;
    let other = volume.give(pod::script("o", "sleep 1000"), "/dev/disk/other", "rwm");
    let other = pod.start(&other)?;
    let script = "dd if=/dev/disk/other bs=1M skip=95 count=1 2>/dev/null | head -c 14";
    same("in another container", other.sh(script)?.text(), "from the guest")?;
    other.sh("echo without a sync | dd of=/dev/disk/other conv=notrunc 2>/dev/null")?;
    other.remove(Duration::ZERO)?;
    container.remove(Duration::ZERO)?;
    pod.remove()?;
    same("after the pod", bytes_at(&volume.file, 0, 14)?.as_str(), "without a sync")
}

fn read_only_and_refused(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let volume = zeros(ctx, 8 * MIB)?;
    let pod = ctx.pod("blockro")?;
    let container = pod.start(&volume.give(pod::script("c", "sleep 1000"), "/dev/xvda", "r"))?;
    let script =
        "dd if=/dev/xvda of=/dev/null 2>&1 && echo read; echo x 2>&1 > /dev/xvda || echo refused";
    let said = container.sh(script)?.text();
    holds("read", &said, "read")?;
    holds("written", &said, "refused")?;
    let script =
        "mknod /disk b $(cat /sys/block/vdp/dev | tr : ' ') && cat /disk 2>&1 | head -c 100";
    let said = container.sh(script)?.text();
    holds("another disk", &said, "Operation not permitted")?;
    let mut config = pod::script("k", "true");
    config.devices.push(Device {
        container_path: "/dev/tun".into(),
        host_path: "/dev/net/tun".into(),
        permissions: "rwm".into(),
    });
    refused("a character device", pod.start(&config), "/dev/tun")?;
    ensure!(container.sh("echo on")?.text() == "on", "the pod is gone");
    pod.remove()
}
