//! A registry of images in a node's own network.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::node::Node;
use crate::paths;
use crate::pod::SOON;

/// Where it listens, on the node's own loopback device.
const ADDRESS: &str = "127.0.0.1:5000";

/// A registry; gone when dropped, with what was pulled.
pub struct Registry<'n> {
    node: &'n Node,
    child: Child,
    images: Vec<String>,
}

impl<'n> Registry<'n> {
    /// Starts one, and waits until it serves.
    pub fn start(node: &'n Node) -> Result<Self> {
        let folder = node.dir().join("registry");
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
        let child = node.spawn_inside(command)?;
        let registry = Self { node, child, images: Vec::new() };
        let end = Instant::now() + SOON;
        while node.in_network(|| TcpStream::connect(ADDRESS).is_err())? {
            ensure!(Instant::now() < end, "the registry does not serve");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// Puts the image `local` of an archive into it, of which the node then has nothing more. Gives its name there.
    pub fn push(&mut self, archive: &Path, local: &str) -> Result<String> {
        let name = local.rsplit('/').next().unwrap_or(local);
        let image = format!("{ADDRESS}/{name}");
        self.node.import(archive)?;
        self.node.ctr(&["images", "tag", "--force", local, &image])?;
        self.node.ctr(&["images", "push", "--plain-http", &image])?;
        // By every name that it has for the runtime interface, and its content with it.
        self.node.cri.remove_image(local)?;
        self.node.cri.remove_image(&image)?;
        self.images.push(image.clone());
        Ok(image)
    }
}

impl Drop for Registry<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for image in &self.images {
            let _ = self.node.cri.remove_image(image);
        }
        let _ = std::fs::remove_dir_all(self.node.dir().join("registry"));
    }
}
