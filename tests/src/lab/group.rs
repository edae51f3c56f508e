//! A pod's share of the processors: a cgroup of the cpu controller (version 1, whose groups hold threads), with
//! the weight that a pod has which asks for nothing in particular.
//!
//! Where the controller is not there (version 2 holds whole processes) threads stay where they are, so that all
//! of a lab's share alike.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

/// The group; removed when dropped, which fails while a thread is in it.
#[derive(Debug)]
pub struct Group {
    folder: Option<PathBuf>,
}

impl Group {
    /// Makes it.
    pub fn add(name: &str) -> Result<Self> {
        let controller = Path::new("/sys/fs/cgroup/cpu");
        if !controller.join("tasks").exists() {
            return Ok(Self { folder: None });
        }
        let folder = controller.join(name);
        fs::create_dir(&folder)?;
        Ok(Self { folder: Some(folder) })
    }

    /// What a thread has to write a line to that is to be in it: `0`.
    #[must_use]
    pub fn door(&self) -> Door {
        Door(self.folder.as_ref().map(|folder| folder.join("tasks")))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Where a thread enters a group.
#[derive(Debug, Clone, Default)]
pub struct Door(Option<PathBuf>);

impl Door {
    /// Has the calling thread be in the group from now on. One that cannot shares with all others.
    pub fn enter(&self) {
        if let Some(tasks) = &self.0 {
            let _ = fs::write(tasks, "0");
        }
    }
}
