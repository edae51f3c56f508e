//! dm-verity's hash tree (Linux, `Documentation/admin-guide/device-mapper/verity.rst`, format 1):
//! SHA-256 without salt, blocks of 4096 bytes, the level of the root first.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use sha2::{Digest as _, Sha256};

use crate::layer::{BLOCK, HASH};

/// Hashes in a block.
pub const FANOUT: usize = BLOCK / HASH;

/// Digest of a block.
pub type Hash = [u8; HASH];

/// Hash of a block.
pub fn hash(block: &[u8]) -> Hash {
    Sha256::digest(block).into()
}

/// One level of the tree.
#[derive(Debug)]
struct Level {
    /// Where in the file its next block goes.
    at: u64,
    /// Hashes of a block that is not whole yet.
    partial: Vec<u8>,
}

/// The tree, written as the data's hashes come: it holds one block a level, however large the disk.
///
/// That needs the disk's size beforehand, which tells where in the file each level is.
#[derive(Debug)]
pub struct Builder<'a> {
    file: &'a File,
    /// The lowest first.
    levels: Vec<Level>,
    /// Data of a block that is not whole yet.
    data: Vec<u8>,
    /// The hash of the topmost block, once it is known.
    root: Option<Hash>,
}

impl<'a> Builder<'a> {
    /// A tree over `blocks` blocks of data, in the file from byte `at` on.
    pub fn new(file: &'a File, at: u64, blocks: u64) -> Self {
        let mut sizes = vec![blocks.div_ceil(FANOUT as u64).max(1)];
        while let Some(size) = sizes.last().copied().filter(|size| *size > 1) {
            sizes.push(size.div_ceil(FANOUT as u64));
        }
        let (mut levels, mut next) = (Vec::new(), at);
        for size in sizes.iter().rev() {
            levels.push(Level { at: next, partial: Vec::with_capacity(BLOCK) });
            next += size * BLOCK as u64;
        }
        levels.reverse();
        Self { file, levels, data: Vec::with_capacity(BLOCK), root: None }
    }

    /// Data, in pieces of any length.
    ///
    /// # Errors
    /// Writing failed.
    pub fn data(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.data.len()));
            self.data.extend_from_slice(now);
            if self.data.len() == BLOCK {
                let leaf = hash(&self.data);
                self.data.clear();
                self.push(&leaf)?;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// The next data blocks' hashes.
    ///
    /// # Errors
    /// Writing failed, or there are more than the size that was told.
    pub fn push(&mut self, mut hashes: &[u8]) -> io::Result<()> {
        while !hashes.is_empty() {
            let lowest = self.levels.first_mut().ok_or_else(too_many)?;
            let room = BLOCK - lowest.partial.len();
            let (now, rest) = hashes.split_at(hashes.len().min(room));
            lowest.partial.extend_from_slice(now);
            if lowest.partial.len() == BLOCK {
                self.block(0)?;
            }
            hashes = rest;
        }
        Ok(())
    }

    /// Writes the block of this level, and those above that become whole by its hash.
    fn block(&mut self, mut level: usize) -> io::Result<()> {
        loop {
            let Some(this) = self.levels.get_mut(level) else { return Err(too_many()) };
            if self.root.is_some() {
                return Err(too_many());
            }
            this.partial.resize(BLOCK, 0);
            self.file.write_all_at(&this.partial, this.at)?;
            this.at += BLOCK as u64;
            let hash = hash(&this.partial);
            this.partial.clear();
            level += 1;
            let Some(above) = self.levels.get_mut(level) else {
                self.root = Some(hash);
                return Ok(());
            };
            above.partial.extend_from_slice(&hash);
            if above.partial.len() < BLOCK {
                return Ok(());
            }
        }
    }

    /// Repeats a hash up to the next whole block of hashes.
    ///
    /// # Errors
    /// Writing failed.
    pub fn pad(&mut self, with: &Hash) -> io::Result<()> {
        while self.levels.first().is_some_and(|level| !level.partial.is_empty()) {
            self.push(with)?;
        }
        Ok(())
    }

    /// Writes what is not whole yet; returns the root's hash.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<Hash> {
        for level in 0..self.levels.len() {
            if self.levels.get(level).is_some_and(|level| !level.partial.is_empty()) {
                self.block(level)?;
            }
        }
        self.root.ok_or_else(|| io::Error::other("the hash tree has no root"))
    }
}

fn too_many() -> io::Error {
    io::Error::other("more hashes than the disk has blocks")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The tree as dm-verity's document describes it, all levels in memory.
    fn whole(mut level: Vec<u8>) -> (Vec<u8>, Hash) {
        let mut tree = Vec::new();
        loop {
            level.resize(level.len().next_multiple_of(BLOCK), 0);
            tree.splice(0..0, level.iter().copied());
            if level.len() == BLOCK {
                return (tree, hash(&level));
            }
            level = level.chunks(BLOCK).flat_map(hash).collect();
        }
    }

    #[test]
    fn a_tree_of_any_height_is_written_as_it_comes() {
        let fanout = FANOUT as u64;
        for blocks in [1, fanout, fanout + 1, fanout * fanout, fanout * fanout + 1] {
            let leaves: Vec<u8> = (0..blocks).flat_map(|n| hash(&n.to_le_bytes())).collect();
            let file = tempfile::tempfile().unwrap();
            let mut builder = Builder::new(&file, BLOCK as u64, blocks);
            for piece in leaves.chunks(1000) {
                builder.push(piece).unwrap();
            }
            let root = builder.finish().unwrap();
            let (tree, expected) = whole(leaves);
            assert_eq!(root, expected, "{blocks} blocks");
            let mut written = vec![0; tree.len()];
            file.read_exact_at(&mut written, BLOCK as u64).unwrap();
            assert!(written == tree, "{blocks} blocks");
            assert_eq!(file.metadata().unwrap().len(), (BLOCK + tree.len()) as u64);
        }
    }

    #[test]
    fn more_than_was_told_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let mut builder = Builder::new(&file, 0, 1);
        builder.push(&[1; BLOCK]).unwrap();
        assert!(builder.push(&[1; BLOCK]).is_err());
    }
}
