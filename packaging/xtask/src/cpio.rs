//! Archives that a kernel unpacks as its first file system.

use std::io::Write as _;

use anyhow::{Context, Result};

/// Writer of the kernel's `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
pub struct Cpio {
    out: Vec<u8>,
    inode: u32,
}

impl Cpio {
    /// Adds a file or directory of root's, without times.
    pub fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            u32::try_from(data.len()).context("file too large for an initramfs")?,
            0, // device of the file, major and minor
            0,
            0, // device that the file is, major and minor
            0,
            u32::try_from(name.len() + 1)?,
            0, // checksum, unused in this format
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}
