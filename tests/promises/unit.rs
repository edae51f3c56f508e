//! joey-snapshotter as it is packaged: its systemd unit, with all that the unit denies it.
//!
//! A systemd of its own runs nothing but the unit, in namespaces of its own: what it writes of the host's files it
//! writes to memory, its control groups are below the node's, the kernel's settings are read-only for it. The node's
//! containerd is served by that snapshotter meanwhile.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::image::{self, Layer};
use joey_tests::node::cgroups;
use joey_tests::paths;
use joey_tests::pod::{self, SOON};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::context::{Context, Test, holds, same, skip};
use crate::storage::once_reached;

pub const TESTS: &[Test] = &[Test { name: "unit::serves_as_packaged", run: serves_as_packaged }];

const SYSTEMD: &str = "/lib/systemd/systemd";
/// Enters the control group `$1` and new namespaces, for the script `$2`.
const ENTER: &str = r#"set -e
echo $$ > "$1/cgroup.procs"
script=$2
shift 2
exec unshare --mount --pid --uts --cgroup --fork --kill-child=KILL -- sh -c "$script" enter "$@""#;
/// Starts systemd on an overlay of the host's files in `$1`, with the node's folder `$2`, unit `$3` and program `$4`.
/// The drop-in adds what is the test's: where the node is, and no other unit.
const START: &str = r#"set -e
mount --make-rprivate /
mount -t tmpfs scratch "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work" root
cd root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --rbind /sys sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs run run
mount -t tmpfs tmp tmp
mkdir -p ".$2" etc/joey etc/systemd/system/joey-snapshotter.service.d
mount --rbind "$2" ".$2"
cp "$2/snapshotter.toml" etc/joey/
cp "$3" etc/systemd/system/
cp "$4" usr/bin/joey-snapshotter
cat > etc/systemd/system/joey-snapshotter.service.d/test.conf <<EOF
[Unit]
DefaultDependencies=no
[Service]
BindPaths=$2
ReadWritePaths=$2
StandardOutput=append:$2/snapshotter.log
StandardError=append:$2/snapshotter.log
EOF
cat > etc/systemd/system/try.target <<EOF
[Unit]
DefaultDependencies=no
Wants=joey-snapshotter.service
EOF
export container=joey
exec chroot . /lib/systemd/systemd --system --unit=try.target --show-status=no"#;

/// A systemd that runs the unit; gone when dropped, and the node's own snapshotter serves again.
struct Unit<'a> {
    ctx: &'a Context<'a>,
    systemd: Child,
}

impl<'a> Unit<'a> {
    fn start(ctx: &'a Context<'a>) -> Result<Self> {
        let below = Path::new("/sys/fs/cgroup/unified");
        let unified = if below.exists() { below } else { Path::new("/sys/fs/cgroup") };
        let group = unified.join(ctx.node.cgroup().trim_start_matches('/')).join("unit");
        fs::create_dir_all(&group).with_context(|| group.display().to_string())?;
        let scratch = ctx.node.dir().join("unit");
        fs::create_dir_all(&scratch)?;
        let unit = paths::repository().join("packaging/systemd/joey-snapshotter.service");
        ctx.node.kill_snapshotter()?;
        let mut command = Command::new("sh");
        command.args(["-c", ENTER, "enter"]).arg(&group).arg(START).arg(scratch);
        command.arg(ctx.node.dir()).arg(unit).arg(paths::binaries().join("joey-snapshotter"));
        command.stdin(Stdio::null());
        let systemd = ctx.node.spawn_inside(command)?;
        let unit = Self { ctx, systemd };
        unit.process()?;
        Ok(unit)
    }

    /// The snapshotter, once there is one.
    fn process(&self) -> Result<u32> {
        let begun = Instant::now();
        let is = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim_end() == "joey-snapshotte"
        };
        loop {
            if let Some(pid) =
                cgroups::processes(&format!("{}/unit", self.ctx.node.cgroup())).into_iter().find(is)
            {
                return Ok(pid);
            }
            ensure!(begun.elapsed() < SOON, "the unit does not start, see snapshotter.log");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        // What cannot be undone here fails the next test.
        let _ = self.systemd.kill();
        let _ = self.systemd.wait();
        std::thread::sleep(Duration::from_millis(200));
        cgroups::purge(&format!("{}/unit", self.ctx.node.cgroup()));
        let _ = fs::remove_dir(self.ctx.node.dir().join("unit"));
        let _ = self.ctx.node.start_snapshotter();
    }
}

fn serves_as_packaged(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler != "joey" {
        skip("a promise of joey-snapshotter's")?;
    }
    if !Path::new(SYSTEMD).exists() {
        skip("systemd is not installed here")?;
    }
    let unit = Unit::start(ctx)?;
    let pid = unit.process()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for line in
        ["Seccomp:\t2", "NoNewPrivs:\t1", "CapBnd:\t0000000000000000", "CapEff:\t0000000000000000"]
    {
        holds("the process", &status, line)?;
    }
    let image = "localhost/unit:1";
    let path = ctx.node.dir().join("images/unit.tar");
    let serial = pod::serial().to_string();
    let layer = Layer::default().file("own", 0o644, serial.as_bytes())?;
    image::on_busybox(&path, image, vec![layer], &[])?;
    once_reached(|| ctx.node.import(&path))?;
    fs::remove_file(path)?;
    let pod = ctx.pod("unit")?;
    let output = |script: &str| -> Result<String> {
        let mut config = pod::script("c", script);
        config.image.get_or_insert_default().image = image.into();
        config.metadata.get_or_insert_default().attempt = pod::serial();
        Ok(once_reached(|| pod.finish(&config))?.text())
    };
    same("made, and read", output("cat /own")?.as_str(), serial.as_str())?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    same("restarted", output("cat /own")?.as_str(), serial.as_str())?;
    ensure!(unit.process()? != pid, "it was not killed");
    pod.remove()?;
    ctx.node.cri.remove_image(image)
}
