//! File systems on block devices that the guest mounts in place of the host, as CSI drivers ask for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use joey_tests::loop_device::Loop;
use joey_tests::pod;
use serde_json::{Value, json};

use crate::block::zeros;
use crate::context::{Context, Test, holds, refused, same};
use crate::volumes::{mounted, volume};

pub const TESTS: &[Test] = &[
    Test { name: "direct::is_the_guests_to_mount", run: is_the_guests_to_mount },
    Test { name: "direct::may_be_xfs", run: may_be_xfs },
    Test { name: "direct::belongs_to_the_pods_group", run: belongs_to_the_pods_group },
    Test { name: "direct::read_only_and_refused", run: read_only_and_refused },
];

const MIB: u64 = 1 << 20;

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {said}{error}");
    Ok(said)
}

/// A device with an ext4 file system, in it `hello` and `part/inside`.
fn ext4(ctx: &Context<'_>) -> Result<Loop> {
    let device = zeros(ctx, 64 * MIB)?;
    let content = ctx.node.dir().join(format!("content-{}", pod::serial()));
    fs::create_dir_all(content.join("part"))?;
    fs::write(content.join("hello"), "from the host")?;
    fs::write(content.join("part/inside"), "a part")?;
    let content = content.display().to_string();
    run("mkfs.ext4", &["-q", "-d", &content, &device.device])?;
    Ok(device)
}

/// The kubelet's folder for a volume of a CSI driver, which says what is to be mounted there.
fn published(ctx: &Context<'_>, info: &Value) -> Result<PathBuf> {
    let folder = volume(ctx, "csi", &format!("pv-{}", pod::serial()))?.join("mount");
    fs::create_dir_all(&folder)?;
    publish(ctx, &folder, &info.to_string())?;
    Ok(folder)
}

fn publish(ctx: &Context<'_>, folder: &Path, text: &str) -> Result<()> {
    let name = URL_SAFE.encode(folder.as_os_str().as_encoded_bytes());
    let place = ctx.node.dir().join("direct-volumes").join(name);
    fs::create_dir_all(&place)?;
    Ok(fs::write(place.join("mountInfo.json"), text)?)
}

fn info(device: &str) -> Value {
    json!({"volume-type": "block", "device": device, "fstype": "ext4", "options": ["noatime"]})
}

fn is_the_guests_to_mount(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let device = ext4(ctx)?;
    let folder = published(ctx, &info(&device.device))?;
    let pod = ctx.pod("direct")?;
    let first = pod.start(&mounted(pod::script("a", "sleep 1000"), "/data", &folder, false))?;
    let mounts = first.sh("grep ' /data ' /proc/mounts")?.text();
    holds("the guest's file system", &mounts, " /data ext4 rw,nodev,noatime")?;
    same("its content", first.sh("cat /data/hello")?.text(), "from the host")?;
    let second = pod.start(&mounted(pod::script("b", "sleep 1000"), "/other", &folder, true))?;
    first.sh("echo first > /data/shared")?;
    same("shared", second.sh("cat /other/shared")?.text(), "first")?;
    same("read-only", second.sh("touch /other/x 2>/dev/null; echo $?")?.text(), "1")?;
    // As the kubelet does for `subPath: part`.
    let volume = folder.parent().context("the volume's folder")?;
    let pods = volume.ancestors().nth(3).context("the pod's folder")?;
    let name = volume.file_name().context("the volume's name")?;
    let target = pods.join("volume-subpaths").join(name).join("c/0");
    fs::create_dir_all(&target)?;
    fs::create_dir_all(folder.join("part"))?;
    ctx.inside("mount", &[Path::new("--bind"), &folder.join("part"), &target])?;
    let part = mounted(pod::script("c", "cat /part/inside; ls /part"), "/part", &target, false);
    let part = pod.finish(&part);
    ctx.inside("umount", &[&target])?;
    same("a part", part?.text(), "a partinside")?;
    first.remove(Duration::ZERO)?;
    same("outlives a container", second.sh("cat /other/shared")?.text(), "first")?;
    second.remove(Duration::ZERO)?;
    same("on the disk", run("debugfs", &["-R", "cat /shared", &device.device])?, "first\n")?;
    run("e2fsck", &["-fn", &device.device])?;
    // Mounted anew, by a container that dies with its pod.
    let third = pod.start(&mounted(pod::script("d", "sleep 1000"), "/data", &folder, false))?;
    same("again", third.sh("cat /data/shared; echo third > /data/shared")?.text(), "first")?;
    pod.remove()?;
    same("with the pod", run("debugfs", &["-R", "cat /shared", &device.device])?, "third\n")?;
    run("e2fsck", &["-fn", &device.device])?;
    same("on the host", fs::read_dir(&folder)?.count(), 1)
}

fn may_be_xfs(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    // The smallest that mkfs.xfs makes.
    let device = zeros(ctx, 300 * MIB)?;
    run("mkfs.xfs", &["-q", &device.device])?;
    let mut info = info(&device.device);
    info["fstype"] = json!("xfs");
    info["options"] = json!(["noatime", "nouuid"]);
    let folder = published(ctx, &info)?;
    for (script, said) in [
        ("echo written > /data/f; grep -c ' /data xfs ' /proc/mounts", "1"),
        ("cat /data/f", "written"),
    ] {
        let pod = ctx.pod("xfs")?;
        let output = pod.finish(&mounted(pod::script("c", script), "/data", &folder, false))?;
        same(script, output.text(), said)?;
        pod.remove()?;
        run("xfs_repair", &["-n", &device.device])?;
    }
    Ok(())
}

fn belongs_to_the_pods_group(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let device = ext4(ctx)?;
    let mut info = info(&device.device);
    info["metadata"] = json!({"fsGroup": "3000", "fsGroupChangePolicy": "OnRootMismatch"});
    let folder = published(ctx, &info)?;
    let pod = ctx.pod("fsgroup")?;
    let mut config = mounted(pod::script("c", "sleep 1000"), "/data", &folder, false);
    let security = pod::security(&mut config);
    security.run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 });
    security.supplemental_groups = vec![3000];
    let container = pod.start(&config)?;
    let script = "stat -c %g:%a /data /data/hello /data/part | tr '\\n' ' '; \
                  echo new > /data/part/new; stat -c %u:%g /data/part/new";
    same("given", container.sh(script)?.text(), "3000:2775 3000:664 3000:2775 1000:3000")?;
    pod.remove()
}

fn read_only_and_refused(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let device = ext4(ctx)?;
    let mut read_only = info(&device.device);
    read_only["options"] = json!(["ro"]);
    let folder = published(ctx, &read_only)?;
    let pod = ctx.pod("directro")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let said = container.sh("cat /data/hello; touch /data/x 2>&1")?.text();
    holds("read-only", &said, "from the hosttouch: /data/x: Read-only file system")?;
    let refuse = |what: &str, text: &str, reason: &str| {
        let folder = volume(ctx, "csi", &format!("pv-{}", pod::serial()))?.join("mount");
        fs::create_dir_all(&folder)?;
        publish(ctx, &folder, text)?;
        let name = format!("r{}", pod::serial());
        let config = mounted(pod::script(&name, "true"), "/data", &folder, false);
        refused(what, pod.start(&config), reason)
    };
    let with = |field: &str, value: Value| {
        let mut info = info(&device.device);
        info[field] = value;
        info.to_string()
    };
    refuse("not JSON", "x", "mountInfo.json: expected value")?;
    refuse("a file system", &with("fstype", json!("btrfs")), "fstype \"btrfs\"")?;
    refuse("an option", &with("options", json!(["loop"])), "options \"loop\"")?;
    refuse("a device", &with("device", json!("/dev/nosuch")), "open /dev/nosuch")?;
    let empty = zeros(ctx, 8 * MIB)?;
    refuse("no file system", &info(&empty.device).to_string(), "mount ext4 with options")?;
    // What was refused has left its slot and device to others.
    run("mkfs.ext4", &["-q", &empty.device])?;
    let folder = published(ctx, &info(&empty.device))?;
    let later = mounted(pod::script("l", "ls /data"), "/data", &folder, false);
    same("later", pod.finish(&later)?.text(), "lost+found")?;
    pod.remove()
}
