//! dm-verity's hash tree (Linux, `Documentation/admin-guide/device-mapper/verity.rst`, format 1):
//! SHA-256 without salt, blocks of 4096 bytes, the level of the root first.

use std::io::{self, Write};

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

/// The levels above the data's hashes, made as these come.
#[derive(Debug, Default)]
pub struct Builder {
    /// Level 0: the data's hashes, in whole blocks.
    leaves: Vec<u8>,
    /// Data of a block that is not whole yet.
    partial: Vec<u8>,
}

impl Builder {
    /// Data, in pieces of any length.
    pub fn data(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.partial.len()));
            self.partial.extend_from_slice(now);
            if self.partial.len() == BLOCK {
                self.leaves.extend_from_slice(&hash(&self.partial));
                self.partial.clear();
            }
            bytes = rest;
        }
    }

    /// The next data blocks' hashes.
    pub fn push(&mut self, hashes: &[u8]) {
        self.leaves.extend_from_slice(hashes);
    }

    /// Repeats a hash up to the next whole block of hashes.
    pub fn pad(&mut self, with: &Hash) {
        while !self.leaves.len().is_multiple_of(BLOCK) {
            self.leaves.extend_from_slice(with);
        }
    }

    /// Writes the tree; returns the root's hash.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self, output: &mut impl Write) -> io::Result<Hash> {
        pad_block(&mut self.leaves);
        let mut levels = vec![self.leaves];
        while let Some(top) = levels.last().filter(|top| top.len() > BLOCK) {
            let mut above: Vec<u8> = top.chunks(BLOCK).flat_map(hash).collect();
            pad_block(&mut above);
            levels.push(above);
        }
        let root = levels.last().map_or([0; HASH], |top| hash(top));
        for level in levels.iter().rev() {
            output.write_all(level)?;
        }
        Ok(root)
    }
}

fn pad_block(level: &mut Vec<u8>) {
    level.resize(level.len().next_multiple_of(BLOCK).max(BLOCK), 0);
}
