//! A block device of the host, made of a file.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use k8s_cri::v1::{ContainerConfig, Device};

use crate::node::Node;
use crate::pod;

/// A block device over a file, until dropped.
pub struct Loop {
    /// The device's path.
    pub device: String,
    /// What is behind it.
    pub file: PathBuf,
}

impl Loop {
    /// A device of so many zero bytes.
    pub fn new(node: &Node, bytes: u64) -> Result<Self> {
        let file = node.dir().join(format!("block-{}", pod::serial()));
        File::create_new(&file)?.set_len(bytes)?;
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output()?;
        if !made.status.success() {
            let why = String::from_utf8_lossy(&made.stderr).into_owned();
            bail!("no loop device can be made here: {why}");
        }
        let device = String::from_utf8(made.stdout)?.trim().to_owned();
        Ok(Self { device, file })
    }

    /// The container has the device at this path.
    pub fn give(
        &self,
        mut config: ContainerConfig,
        at: &str,
        permissions: &str,
    ) -> ContainerConfig {
        config.devices.push(Device {
            container_path: at.into(),
            host_path: self.device.clone(),
            permissions: permissions.into(),
        });
        config
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The test has failed and says why, or does not need it any more.
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = fs::remove_file(&self.file);
    }
}
