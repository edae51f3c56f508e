//! Images are block data that only guests read, kept once, checked at every read.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::image::{self, BUSYBOX, Layer};
use joey_tests::node::config::Version;
use joey_tests::pod::{self, SOON};
use k8s_cri::v1::{ContainerConfig, ImageSpec, Mount};

use crate::context::{Context, Test, holds, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "storage::host_mounts_no_image", run: host_mounts_no_image },
    Test { name: "storage::layers_are_kept_once", run: layers_are_kept_once },
    Test { name: "storage::files_of_every_kind", run: files_of_every_kind },
    Test { name: "storage::many_layers", run: many_layers },
    Test { name: "storage::volumes_of_an_image", run: volumes_of_an_image },
    Test { name: "storage::image_as_a_volume", run: image_as_a_volume },
    Test { name: "storage::image_volume_of_cri", run: image_volume_of_cri },
    Test { name: "storage::flipped_bit_is_an_error", run: flipped_bit_is_an_error },
    Test { name: "storage::flipped_index_is_told", run: flipped_index_is_told },
    Test { name: "storage::pods_outlive_the_snapshotter", run: pods_outlive_the_snapshotter },
    Test { name: "storage::killed_at_every_write", run: killed_at_every_write },
    Test { name: "storage::hostile_image_is_refused", run: hostile_image_is_refused },
    Test { name: "storage::compressed_layers", run: compressed_layers },
    Test { name: "storage::runc_by_mistake_is_told", run: runc_by_mistake_is_told },
    Test { name: "storage::space_comes_back", run: space_comes_back },
];

/// Only where the handler's images are joey-snapshotter's.
fn only_its_own(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler == "joey" { Ok(()) } else { skip("a promise of joey-snapshotter's") }
}

/// An image of the test's own; gone when dropped.
pub struct Image<'a> {
    ctx: &'a Context<'a>,
    name: String,
}

impl<'a> Image<'a> {
    pub fn import(ctx: &'a Context<'a>, name: &str, layers: Vec<Layer>) -> Result<Self> {
        Self::with_volumes(ctx, name, layers, &[])
    }

    fn with_volumes(
        ctx: &'a Context<'a>,
        name: &str,
        layers: Vec<Layer>,
        volumes: &[&str],
    ) -> Result<Self> {
        let path = ctx.node.dir().join(format!("images/{name}.tar"));
        let image = Self { ctx, name: format!("localhost/{name}:1") };
        image::on_busybox(&path, &image.name, layers, volumes)?;
        ctx.node.import(&path)?;
        fs::remove_file(path)?;
        Ok(image)
    }

    pub fn script(&self, text: &str) -> ContainerConfig {
        let mut config = pod::script("c", text);
        config.image.get_or_insert_default().image = self.name.clone();
        config
    }
}

impl Drop for Image<'_> {
    fn drop(&mut self) {
        // The test has failed and says why, or looks for itself.
        let _ = self.ctx.node.cri.remove_image(&self.name);
    }
}

fn layers(ctx: &Context<'_>) -> Result<HashSet<PathBuf>> {
    let folder = fs::read_dir(ctx.node.store().join("layers"))?;
    folder.map(|entry| Ok(entry?.path())).collect()
}

/// Waits until containerd has removed what nobody needs.
fn layers_again(ctx: &Context<'_>, before: &HashSet<PathBuf>) -> Result<()> {
    let end = Instant::now() + SOON;
    while layers(ctx)?.difference(before).count() > 0 {
        ensure!(Instant::now() < end, "the image is gone, its layer is not");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn host_mounts_no_image(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let pod = ctx.pod("nomount")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let holder = ctx.node.holder();
    let mounts = fs::read_to_string(format!("/proc/{holder}/mountinfo"))?;
    for line in mounts.lines().filter(|line| line.contains(&container.id)) {
        ensure!(!line.contains(" - overlay ") && !line.contains(" - erofs "), "mounted: {line}");
    }
    // What containerd may see of an image is who its users are.
    for disk in fs::read_dir(ctx.node.store().join("disks"))? {
        for file in fs::read_dir(disk?.path().join("users/etc"))? {
            let name = file?.file_name();
            ensure!(name == "passwd" || name == "group", "the host sees {name:?}");
        }
    }
    pod.remove()
}

fn layers_are_kept_once(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let pod = ctx.pod("once")?;
    same("busybox", pod.script("echo ok")?.text(), "ok")?;
    let before = layers(ctx)?;
    let own = Layer::default().file("own", 0o644, b"own\n")?;
    let image = Image::import(ctx, "once", vec![own])?;
    same("own", pod.finish(&image.script("cat /own"))?.text(), "own")?;
    same("layers more", layers(ctx)?.difference(&before).count(), 1)?;
    pod.remove()
}

fn files_of_every_kind(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let noise: Vec<u8> =
        (0..300_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut hollow = vec![0; 3 << 20];
    hollow.splice(1_000_000..1_000_004, *b"here");
    let mut layer = Layer::default()
        .directory("k", 0o755)?
        .directory("k/private", 0o700)?
        .file("k/noise", 0o4755, &noise)?
        .file("k/hollow", 0o600, &hollow)?
        .file("k/empty", 0o644, b"")?
        .hard_link("k/again", "k/noise", 0o4755)?
        .link("k/link", "noise")?;
    for number in 0..500 {
        layer = layer.file(&format!("k/many-{number}"), 0o644, format!("{number}\n").as_bytes())?;
    }
    let image = Image::import(ctx, "kinds", vec![layer])?;
    let pod = ctx.pod("kinds")?;
    let script = "cd /k; md5sum < noise; md5sum < again; md5sum < link; md5sum < hollow; \
                  stat -c %h:%a:%s noise; stat -c %a private; cat many-499; \
                  ls | wc -l; wc -c < empty; echo more >> noise; md5sum < again; tail -c 5 noise";
    let text = pod.finish(&image.script(script))?.text();
    let lines: Vec<&str> = text.lines().collect();
    let [noise_sum, again, link, hollow_sum, stat, private, last, count, empty, rest @ ..] =
        lines.as_slice()
    else {
        bail!("too little: {text}")
    };
    for (what, sum, content) in [
        ("noise", noise_sum, &noise),
        ("again", again, &noise),
        ("link", link, &noise),
        ("hollow", hollow_sum, &hollow),
    ] {
        let expected = md5(content)?;
        same(what, sum.split_whitespace().next(), Some(expected.as_str()))?;
    }
    same("noise", *stat, "2:4755:300000")?;
    same("private", *private, "700")?;
    same("many", (*last, *count, *empty), ("499", "506", "0"))?;
    // A file that is changed is copied, so its other name may keep the old content (overlayfs).
    same("changed", rest.last().copied(), Some("more"))?;
    pod.remove()
}

fn md5(content: &[u8]) -> Result<String> {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("no stdin")?.write_all(content)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

fn many_layers(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let layer = |number: u32| {
        let text = format!("{number}\n");
        Layer::default()
            .directory("many", 0o755)?
            .file(&format!("many/{number}"), 0o644, text.as_bytes())?
            .file("many/last", 0o644, text.as_bytes())
    };
    let image = Image::import(ctx, "manylayers", (0..120).map(layer).collect::<Result<_>>()?)?;
    let pod = ctx.pod("manylayers")?;
    let script = "cat /many/last; ls /many | wc -l; cat /many/0";
    same("files", pod.finish(&image.script(script))?.text(), "119\n121\n0")?;
    pod.remove()
}

fn volumes_of_an_image(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let layer = Layer::default()
        .directory("data", 0o1770)?
        .file("data/seed", 0o640, b"seed")?
        .directory("data/below", 0o755)?;
    let image = Image::with_volumes(ctx, "volumes", vec![layer], &["/data", "/made"])?;
    let pod = ctx.pod("volumes")?;
    let script = "stat -c %a /data; cat /data/seed; echo; echo more > /data/below/x; rm /data/seed; \
                  ls /data; cat /data/below/x; echo y > /made/y && cat /made/y; \
                  touch /x 2>/dev/null; echo $?";
    same("writable", pod.finish(&image.script(script))?.text(), "1770\nseed\nbelow\nmore\ny\n0")?;
    let mut read_only = image.script(script);
    pod::security(&mut read_only).readonly_rootfs = true;
    same("read-only", pod.finish(&read_only)?.text(), "1770\nseed\nbelow\nmore\ny\n1")?;
    let found =
        Command::new("grep").args(["-rl", "more"]).arg(ctx.node.dir().join("root")).output()?;
    same("on the host", String::from_utf8_lossy(&found.stdout).contains("/volumes/"), false)?;
    pod.remove()
}

/// As containerd 2.1 leaves a pod's image volume: a snapshot of joey-snapshotter's, mounted on the host.
fn image_as_a_volume(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let before = disks(ctx)?;
    let layer = Layer::default().file("model/weights", 0o644, b"weights")?;
    let image = Image::import(ctx, "model", vec![layer])?;
    let pod = ctx.pod("model")?;
    same("made", pod.finish(&image.script("echo made"))?.text(), "made")?;
    let after = disks(ctx)?;
    let disk = after.difference(&before).next().context("no disk was made")?;
    let place = ctx.node.dir().join("io.containerd.grpc.v1.cri/image-volumes/s1/ab12");
    fs::create_dir_all(&place)?;
    let mut bind = Command::new("mount");
    bind.arg("--bind").arg(disk.join("users")).arg(&place);
    ctx.node.run_inside(bind)?;
    let script = "cat /mnt/model/weights; echo; ls /mnt | grep -c bin; touch /mnt/x 2>&1";
    let other = pod::script("c", script);
    let seen = pod.finish(&crate::volumes::mounted(other, "/mnt", &place, true));
    // The same without the description, which is the next container's only.
    let description = disk.join("disk.json");
    fs::rename(&description, disk.join("gone"))?;
    let config = crate::volumes::mounted(pod::script("u", "ls /mnt"), "/mnt", &place, true);
    let undescribed = pod.finish(&config);
    fs::rename(disk.join("gone"), &description)?;
    let mut unmount = Command::new("umount");
    unmount.arg(&place);
    ctx.node.run_inside(unmount)?;
    refused("without its description", undescribed, "disk.json")?;
    holds("content", &seen?.text(), "weights\n1\ntouch: /mnt/x: Read-only file system")?;
    pod.remove()
}

/// An image that a pod asks for as a volume, by CRI.
fn image_volume_of_cri(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    if ctx.node.version == Version::V1_7 {
        skip("containerd 1.7 knows no images as volumes")?;
    }
    let layer = Layer::default().file("model/weights", 0o644, b"weights")?;
    let image = Image::import(ctx, "crimodel", vec![layer])?;
    let pod = ctx.pod("crimodel")?;
    let script = "cat /mnt/model/weights; echo; grep -c ' /mnt erofs ro' /proc/mounts; touch /mnt/x 2>&1; \
         cat /again/model/weights";
    let mut config = pod::script("c", script);
    for place in ["/mnt", "/again"] {
        config.mounts.push(Mount {
            container_path: place.into(),
            image: Some(ImageSpec { image: image.name.clone(), ..ImageSpec::default() }),
            readonly: true,
            ..Mount::default()
        });
    }
    let seen = pod.finish(&config)?.text();
    holds("content", &seen, "weights\n1\ntouch: /mnt/x: Read-only file system")?;
    holds("at another place", &seen, "system\nweights")?;
    pod.remove()
}

fn flipped_bit_is_an_error(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    // The layers below are there already, whichever test is the first.
    let pod = ctx.pod("unflipped")?;
    pod.script("true")?;
    pod.remove()?;
    let before = layers(ctx)?;
    // The layer stays damaged if the test fails: the next time it is another one.
    let serial = std::time::UNIX_EPOCH.elapsed()?.as_nanos().to_string();
    let big = Layer::default().file("big", 0o644, &[b'x'; 1 << 20])?;
    let image = Image::import(ctx, "flipped", vec![big.file("serial", 0o644, serial.as_bytes())?])?;
    let pod = ctx.pod("flipped")?;
    let whole = "tail -c +500000 /big | wc -c; cat /big | wc -c";
    let size = format!("{}\n{}", (1 << 20) - 499_999, 1 << 20);
    same("whole", pod.finish(&image.script(whole))?.text(), size)?;
    pod.remove()?;
    let after = layers(ctx)?;
    let layer = after.difference(&before).next().context("no layer was made")?;
    let data = File::options().write(true).open(layer.join("data"))?;
    data.write_all_at(b"y", 400_000)?;
    let pod = ctx.pod("flipped2")?;
    let script = "cat /big > /copy; echo $?; grep -c y /copy; head -c 100000 /big | wc -c";
    let output = pod.finish(&image.script(script))?;
    same("after a flip", output.text(), "1\n0\n100000")?;
    holds("what cat says", &String::from_utf8_lossy(&output.stderr), "Input/output error")?;
    let console = ctx.node.joey(&["console", &pod.id])?;
    holds("the console", &console, "data block")?;
    let log = fs::read_to_string(ctx.node.dir().join("containerd.log"))?;
    let told =
        log.lines().rfind(|line| line.contains("an image is damaged")).context("not told")?;
    holds("the image", told, "localhost/flipped:1")?;
    holds("the layer's file", told, &layer.display().to_string())?;
    holds(
        "joey inspect",
        &ctx.node.joey(&["inspect", &pod.id])?,
        "damaged    image localhost/flipped:1",
    )?;
    pod.remove()
}

/// Damage that keeps a container from being made is told by the image's name, and the error says so.
fn flipped_index_is_told(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let serial = std::time::UNIX_EPOCH.elapsed()?.as_nanos().to_string();
    let before = disks(ctx)?;
    let own = Layer::default().file("serial", 0o644, serial.as_bytes())?;
    let image = Image::import(ctx, "flippedindex", vec![own])?;
    let pod = ctx.pod("index1")?;
    same("whole", pod.finish(&image.script("cat /serial"))?.text(), serial.as_str())?;
    pod.remove()?;
    let after = disks(ctx)?;
    let disk = after.difference(&before).next().context("no disk was made")?;
    // The superblock of EROFS.
    File::options().write(true).open(disk.join("index"))?.write_all_at(b"y", 1030)?;
    let pod = ctx.pod("index2")?;
    refused("a container", pod.finish(&image.script("true")), "image is damaged on this node")?;
    let log = fs::read_to_string(ctx.node.dir().join("containerd.log"))?;
    let told =
        log.lines().rfind(|line| line.contains("an image is damaged")).context("not told")?;
    holds("the image", told, "localhost/flippedindex:1")?;
    pod.remove()
}

/// Folders of the store's disks.
fn disks(ctx: &Context<'_>) -> Result<HashSet<PathBuf>> {
    let folder = fs::read_dir(ctx.node.store().join("disks"))?;
    folder.map(|entry| Ok(entry?.path())).collect()
}

fn pods_outlive_the_snapshotter(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let pod = ctx.pod("outlive")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    ctx.node.kill_snapshotter()?;
    same("read without it", container.sh("wc -l < /etc/passwd")?.text(), "2")?;
    refused("a container without it", pod.start(&pod::script("d", "true")), "s.sock")?;
    ctx.node.start_snapshotter()?;
    same("with it again", once_reached(|| pod.script("echo back"))?.text(), "back")?;
    pod.remove()
}

/// Tries until containerd reaches the snapshotter, as the kubelet would: it waits between two attempts
/// to connect.
pub fn once_reached<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    let end = Instant::now() + SOON;
    loop {
        match attempt() {
            // Refused, or cut off because the snapshotter was killed just then.
            Err(error) if Instant::now() < end && is_cut_off(&error) => {
                std::thread::sleep(Duration::from_millis(200));
            }
            done => return done,
        }
    }
}

/// The words of containerd's gRPC client.
fn is_cut_off(error: &anyhow::Error) -> bool {
    let words = format!("{error:#}");
    ["connection error", "error reading from server"].iter().any(|cut| words.contains(cut))
}

fn killed_at_every_write(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let before = layers(ctx)?;
    let pod = ctx.pod("killwrite")?;
    for (number, wait) in [0, 4, 8, 16, 32, 64, 128, 256].into_iter().enumerate() {
        let content = |layer: usize| {
            let seed = number * 100 + layer;
            (0..2_000_000).map(|at: usize| (at.wrapping_mul(seed + 7) >> 3) as u8).collect()
        };
        let layer = |layer: usize| {
            let content: Vec<u8> = content(layer);
            Layer::default().file(&format!("own-{layer}"), 0o644, &content)
        };
        let contents = (0..4).map(layer).collect::<Result<_>>()?;
        let image = Image::import(ctx, &format!("killwrite{number}"), contents)?;
        std::thread::scope(|scope| -> Result<()> {
            // Whether this one comes to be depends on when the snapshotter dies.
            let cut = scope.spawn(|| pod.create(&image.script("true")).map(|created| created.id));
            std::thread::sleep(Duration::from_millis(wait));
            ctx.node.kill_snapshotter()?;
            let _ = cut.join();
            Ok(())
        })?;
        ctx.node.start_snapshotter()?;
        let output = once_reached(|| {
            let mut config = image.script("cat /own-* | md5sum");
            config.metadata.get_or_insert_default().attempt = pod::serial();
            pod.finish(&config)
        })?;
        let all: Vec<u8> = (0..4).flat_map(content).collect();
        same("content", output.text().split_whitespace().next(), Some(md5(&all)?.as_str()))?;
    }
    pod.remove()?;
    layers_again(ctx, &before)?;
    nothing_unfinished(ctx)
}

fn hostile_image_is_refused(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let before = layers(ctx)?;
    let evil = Layer::default().raw("../../escape", b"x")?;
    // Imported it is unpacked for the node's default snapshotter, which clamps such names.
    let image = Image::import(ctx, "hostile", vec![evil])?;
    let pod = ctx.pod("hostile")?;
    refused("the image", pod.start(&image.script("true")), "leaves the image's root")?;
    same("other images", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()?;
    drop(image);
    layers_again(ctx, &before)
}

fn compressed_layers(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let own = Layer::default().file("packed", 0o644, &[b'p'; 100_000])?.gzip();
    let image = Image::import(ctx, "packed", vec![own])?;
    let pod = ctx.pod("packed")?;
    same("size", pod.finish(&image.script("wc -c < /packed"))?.text(), "100000")?;
    pod.remove()
}

/// What is removed goes by way of the folder of unfinished things: a moment later it is empty.
fn nothing_unfinished(ctx: &Context<'_>) -> Result<()> {
    let end = Instant::now() + SOON;
    let left = || -> Result<usize> { Ok(fs::read_dir(ctx.node.store().join("new"))?.count()) };
    while left()? > 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    same("unfinished", left()?, 0)
}

fn runc_by_mistake_is_told(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let pod = ctx.pod("mistake")?;
    same("unpacked", pod.script("echo ok")?.text(), "ok")?;
    let run = ["run", "--rm", "--snapshotter", "joey", "--runtime", "io.containerd.runc.v2"];
    let ran = ctx.node.ctr(&[&run[..], &[BUSYBOX, "mistake", "true"]].concat());
    refused("runc", ran, "this-snapshot-is-for-runtime-joey-only")?;
    let _ = ctx.node.ctr(&["containers", "rm", "mistake"]);
    pod.remove()
}

fn space_comes_back(ctx: &Context<'_>) -> Result<()> {
    only_its_own(ctx)?;
    let pod = ctx.pod("space")?;
    // The layers that its image shares with others are there before.
    same("unpacked", pod.script("echo ok")?.text(), "ok")?;
    let before = layers(ctx)?;
    let own = Layer::default().file("space", 0o644, &[b's'; 2 << 20])?;
    let image = Image::import(ctx, "space", vec![own])?;
    same("size", pod.finish(&image.script("wc -c < /space"))?.text(), "2097152")?;
    pod.remove()?;
    same("layers with it", layers(ctx)?.difference(&before).count(), 1)?;
    drop(image);
    layers_again(ctx, &before)?;
    nothing_unfinished(ctx)
}
