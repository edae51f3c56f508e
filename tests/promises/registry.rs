//! Images come from a registry, for one handler's pods or the other's, and serve both.

use std::fs::File;
use std::io::Read as _;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::image::{self, Layer};
use joey_tests::node::config::Version;
use joey_tests::paths;
use joey_tests::pod::{self, Pod, SOON};

use crate::context::{Context, Test, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "registry::pulled_for_either_handler", run: pulled_for_either_handler },
    Test { name: "registry::pulled_by_transfer", run: pulled_by_transfer },
    Test { name: "registry::cut_short_is_nothing", run: cut_short_is_nothing },
];

/// Where the registry listens, on the node's own loopback device.
const ADDRESS: &str = "127.0.0.1:5000";

/// Bytes of a layer that no other image has.
const OWN_LAYER: usize = 1 << 20;

/// A registry in the node's network; gone when dropped, with what was pulled.
struct Registry<'a> {
    ctx: &'a Context<'a>,
    child: Child,
    images: Vec<String>,
}

impl<'a> Registry<'a> {
    fn start(ctx: &'a Context<'a>) -> Result<Self> {
        if ctx.handler != "joey" {
            skip("a promise of joey-snapshotter's")?;
        }
        let folder = ctx.node.dir().join("registry");
        std::fs::create_dir_all(&folder)?;
        let config = folder.join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n\
             http: {{addr: \"{ADDRESS}\"}}\n",
            folder.display()
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(paths::deps().join("registry/usr/bin/docker-registry"));
        command.arg("serve").arg(config).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = ctx.node.spawn_inside(command)?;
        let registry = Self { ctx, child, images: Vec::new() };
        let end = Instant::now() + SOON;
        while ctx.node.in_network(|| TcpStream::connect(ADDRESS).is_err())? {
            ensure!(Instant::now() < end, "the registry does not serve");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// Puts an image into it of which the node has not seen the last layer.
    fn push(&mut self, name: &str) -> Result<String> {
        let path = self.ctx.node.dir().join(format!("images/{name}.tar"));
        let image = format!("{ADDRESS}/{name}:1");
        let mut content = vec![0; OWN_LAYER];
        File::open("/dev/urandom")?.read_exact(&mut content)?;
        let layer = Layer::default().file("own", 0o644, &content)?;
        image::on_busybox(&path, &image, vec![layer], &[])?;
        self.ctx.node.import(&path)?;
        std::fs::remove_file(path)?;
        self.ctx.node.ctr(&["images", "push", "--plain-http", &image])?;
        // By every name that it has for the runtime interface, and its content with it.
        self.ctx.node.cri.remove_image(&image)?;
        self.images.push(image.clone());
        Ok(image)
    }

    fn output(&self, handler: &str, image: &str) -> Result<String> {
        let pod = Pod::run(self.ctx.node, handler, "pulled")?;
        let mut config = pod::script("c", "echo here");
        config.image.get_or_insert_default().image = image.to_owned();
        let container = pod.start(&config)?;
        same("exit code", container.wait(SOON)?.exit_code, 0)?;
        let (text, _) = container.logs()?;
        pod.remove()?;
        Ok(String::from_utf8(text)?)
    }
}

impl Drop for Registry<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for image in &self.images {
            let _ = self.ctx.node.cri.remove_image(image);
        }
        let _ = std::fs::remove_dir_all(self.ctx.node.dir().join("registry"));
    }
}

/// What is pulled for the pods of one handler serves those of the other: unpacked when they come.
fn pulled_for_either_handler(ctx: &Context<'_>) -> Result<()> {
    let mut registry = Registry::start(ctx)?;
    for (first, second) in [("joey", "runc"), ("runc", "joey")] {
        let image = registry.push(&format!("for-{first}"))?;
        ctx.node.cri.pull(&image, first)?;
        for handler in [first, second, first] {
            same(handler, registry.output(handler, &image)?.trim(), "here")?;
        }
    }
    Ok(())
}

/// containerd's transfer service unpacks into joey-snapshotter as its configuration (`unpack_config`) says.
fn pulled_by_transfer(ctx: &Context<'_>) -> Result<()> {
    if ctx.node.version == Version::V1_7 {
        return skip("containerd 1.7 has no such configuration");
    }
    let mut registry = Registry::start(ctx)?;
    let image = registry.push("transferred")?;
    ctx.node.ctr(&["images", "pull", "--plain-http", "--snapshotter", "joey", &image])?;
    same("output", registry.output("joey", &image)?.trim(), "here")
}

/// A pull that fails half-way leaves nothing that a pod could take for the image.
fn cut_short_is_nothing(ctx: &Context<'_>) -> Result<()> {
    let mut registry = Registry::start(ctx)?;
    let image = registry.push("short")?;
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
    ctx.node.cri.pull(&image, "joey")?;
    same("output", registry.output("joey", &image)?.trim(), "here")
}
