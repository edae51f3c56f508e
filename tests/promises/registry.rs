//! Images come from a registry, for one handler's pods or the other's, and serve both.

use std::fs::File;
use std::io::Read as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::image::{self, Layer};
use joey_tests::node::config::Version;
use joey_tests::pod::{self, Pod, SOON};
use joey_tests::registry::Registry;

use crate::context::{Context, Test, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "registry::pulled_for_either_handler", run: pulled_for_either_handler },
    Test { name: "registry::pulled_by_transfer", run: pulled_by_transfer },
    Test { name: "registry::cut_short_is_nothing", run: cut_short_is_nothing },
];

/// Bytes of a layer that no other image has.
const OWN_LAYER: usize = 1 << 20;

fn start<'a>(ctx: &'a Context<'a>) -> Result<Registry<'a>> {
    if ctx.handler != "joey" {
        skip("a promise of joey-snapshotter's")?;
    }
    Registry::start(ctx.node)
}

/// Puts an image into it of which the node has not seen the last layer.
fn push(ctx: &Context<'_>, registry: &mut Registry<'_>, name: &str) -> Result<String> {
    let path = ctx.node.dir().join(format!("images/{name}.tar"));
    let image = format!("localhost/{name}:1");
    let mut content = vec![0; OWN_LAYER];
    File::open("/dev/urandom")?.read_exact(&mut content)?;
    let layer = Layer::default().file("own", 0o644, &content)?;
    image::on_busybox(&path, &image, vec![layer], &[])?;
    let pushed = registry.push(&path, &image);
    std::fs::remove_file(path)?;
    pushed
}

fn output(ctx: &Context<'_>, handler: &str, image: &str) -> Result<String> {
    let pod = Pod::run(ctx.node, handler, "pulled")?;
    let mut config = pod::script("c", "echo here");
    config.image.get_or_insert_default().image = image.to_owned();
    let container = pod.start(&config)?;
    same("exit code", container.wait(SOON)?.exit_code, 0)?;
    let (text, _) = container.logs()?;
    pod.remove()?;
    Ok(String::from_utf8(text)?)
}

/// What is pulled for the pods of one handler serves those of the other: unpacked when they come.
fn pulled_for_either_handler(ctx: &Context<'_>) -> Result<()> {
    let mut registry = start(ctx)?;
    for (first, second) in [("joey", "runc"), ("runc", "joey")] {
        let image = push(ctx, &mut registry, &format!("for-{first}"))?;
        ctx.node.cri.pull(&image, first)?;
        for handler in [first, second, first] {
            same(handler, output(ctx, handler, &image)?.trim(), "here")?;
        }
    }
    Ok(())
}

/// containerd's transfer service unpacks into joey-snapshotter as its configuration (`unpack_config`) says.
fn pulled_by_transfer(ctx: &Context<'_>) -> Result<()> {
    if ctx.node.version == Version::V1_7 {
        return skip("containerd 1.7 has no such configuration");
    }
    let mut registry = start(ctx)?;
    let image = push(ctx, &mut registry, "transferred")?;
    ctx.node.ctr(&["images", "pull", "--plain-http", "--snapshotter", "joey", &image])?;
    same("output", output(ctx, "joey", &image)?.trim(), "here")
}

/// A pull that fails half-way leaves nothing that a pod could take for the image.
fn cut_short_is_nothing(ctx: &Context<'_>) -> Result<()> {
    let mut registry = start(ctx)?;
    let image = push(ctx, &mut registry, "short")?;
    let blobs = ctx.node.dir().join("registry/docker/registry/v2/blobs/sha256");
    let mut find = Command::new("find");
    find.arg(blobs).args(["-name", "data", "-size", "+256k"]);
    let found = String::from_utf8(ctx.node.run_inside(find)?.stdout)?;
    let spoil = || -> Result<()> {
        for path in found.lines() {
            let mut bytes = std::fs::read(path)?;
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            std::fs::write(path, bytes)?;
        }
        Ok(())
    };
    spoil()?;
    ensure!(ctx.node.cri.pull(&image, "joey").is_err(), "a layer with another digest was taken");
    let pod = ctx.pod("short")?;
    let mut config = pod::script("c", "echo here");
    config.image.get_or_insert_default().image.clone_from(&image);
    ensure!(pod.start(&config).is_err(), "a container has half an image");
    pod.remove()?;
    spoil()?;
    // As the kubelet does: containerd commits what it had got before, until it has dropped that.
    let end = Instant::now() + SOON;
    while let Err(error) = ctx.node.cri.pull(&image, "joey") {
        ensure!(Instant::now() < end, "the whole image is still refused: {error:#}");
        std::thread::sleep(Duration::from_millis(200));
    }
    same("output", output(ctx, "joey", &image)?.trim(), "here")
}
