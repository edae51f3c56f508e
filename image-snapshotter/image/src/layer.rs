//! One layer of an image as it is kept: made in one pass, from a tar stream or a directory.
//!
//! | file | content |
//! | --- | --- |
//! | `data` | what is in the files, each beginning at a block of 4096 bytes; ends in a hole, up to a multiple of 512 KiB |
//! | `hashes` | SHA-256 of each block of `data`, the leaves of dm-verity's tree |
//! | `table` | one [`Entry`] after the other, in the stream's order |
//!
//! The last part of a file, if short, is kept in the table, so that small files cost no block. Holes
//! are not stored. Nothing of an image is ever a file of the host's, so no name, owner or link in it
//! can do the host any harm.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::tar::{TarError, shown};
use crate::verity::FANOUT;

/// Bytes of a block: of a file's data, of dm-verity and of EROFS.
pub const BLOCK: usize = 4096;
/// Bytes of a hash.
pub const HASH: usize = 32;
/// Longest last part of a file that is kept in the table. It is there once a layer and once an image;
/// longer ones are cheaper as a block that all images share.
const MAX_TAIL: usize = 1024;
/// Blocks that are a hole if all their bytes are zero.
pub const CHUNK: usize = 16;
/// A chunk that is not stored.
const ZEROS: &[u8] = &[0; CHUNK * BLOCK];
/// In place of a chunk's block: a hole.
pub const HOLE: u32 = u32::MAX;
/// Most entries of one layer.
const MAX_ENTRIES: usize = 1_000_000;
/// Most bytes of a layer's table: it is read again for each image that has the layer.
const MAX_TABLE: u64 = 512 << 20;
/// Deepest path.
const MAX_DEPTH: usize = 256;
const MAX_COMPONENT: usize = 255;
/// Begin of a whiteout's name.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// Most bytes of the names and values of one file's extended attributes: what fits EROFS's counter
/// and any Linux file system.
const MAX_XATTRS: usize = 64 << 10;

/// What a file has besides its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Where a file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Bytes.
    pub size: u64,
    /// Its first block in `data`.
    pub start: u32,
    /// For a file with holes: the first block of each [`CHUNK`], or [`HOLE`].
    pub chunks: Vec<u32>,
    /// What comes after its last whole block.
    pub tail: Vec<u8>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A directory.
    Directory,
    /// A file.
    Regular(Content),
    /// Another name of the file of this path.
    HardLink(Vec<u8>),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A character device.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
    /// The file of this path in lower layers is gone (OCI image specification, whiteouts).
    Whiteout,
    /// What lower layers have in this directory is gone.
    Opaque,
}

/// One file of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path from the root, cleaned: neither `.` nor `..` nor empty parts; the root is empty.
    pub path: Vec<u8>,
    /// Owner and so on.
    pub meta: Meta,
    /// What it is.
    pub node: Node,
}

/// Why a stream did not become a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It is not a tar stream, or not a whole one.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry that no file system can hold, or beyond a limit.
    #[error("entry {entry:?}: {problem}")]
    Entry {
        /// Its path.
        entry: String,
        /// What is wrong.
        problem: String,
    },
    /// What is known of the image so far takes more memory than it may.
    #[error(
        "entry {entry:?}: with it the names, attributes and maps of the image take more than {most} \
         bytes of memory"
    )]
    Memory {
        /// The path of the entry that was one too many.
        entry: String,
        /// The limit.
        most: usize,
    },
    /// One layer of an image.
    #[error("layer {layer}: {source}")]
    Layer {
        /// Its folder's name, which is its digest.
        layer: String,
        /// What is wrong with it.
        source: Box<LayerError>,
    },
    /// The store's own files.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// An error about a file of the store.
pub fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayerError + use<> {
    let path = path.to_owned();
    move |source| LayerError::Io { what, path, source }
}

pub(crate) fn entry_error(path: &[u8], problem: impl Into<String>) -> LayerError {
    LayerError::Entry { entry: shown(path), problem: problem.into() }
}

/// A path without `.`, `..` and empty parts, from the root.
///
/// # Errors
/// It leaves the root, is too deep, or has a part too long.
pub fn clean(path: &[u8]) -> Result<Vec<u8>, String> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop().ok_or("its path leaves the image's root")?),
            part => parts.push(part),
        }
    }
    let last = parts.len().saturating_sub(1);
    for (at, part) in parts.iter().enumerate() {
        // A whiteout is no file: what it removes may have as long a name as any.
        let name = part.strip_prefix(WHITEOUT).filter(|_| at == last).unwrap_or(part);
        if name.len() > MAX_COMPONENT {
            return Err(format!("a name of {} bytes; Linux takes {MAX_COMPONENT}", name.len()));
        }
    }
    match parts.len() {
        depth if depth > MAX_DEPTH => {
            Err(format!("{depth} directories deep, more than {MAX_DEPTH}"))
        }
        _ => Ok(parts.join(&b'/')),
    }
}

/// Last part of a path, and what is before.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (b"", path),
    }
}

/// What a layer has come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Entries.
    pub entries: usize,
    /// Blocks in `data`.
    pub blocks: u32,
}

/// Where a layer's entries come from. [`Read`] gives the content of the last one.
pub trait Source: Read {
    /// The next entry; of a file's content only the size is known.
    ///
    /// # Errors
    /// [`LayerError`] names the entry.
    fn next_entry(&mut self) -> Result<Option<Entry>, LayerError>;

    /// Passes the next `length` bytes of content if they are known to be a hole.
    fn skip_hole(&mut self, length: u64) -> bool;
}

/// Makes a layer's three files in `folder`, which must be new.
///
/// `max_bytes` bounds what the files have together, holes included.
///
/// # Errors
/// [`LayerError`] names the entry. The folder's content is then of no use.
pub fn write(folder: &Path, mut source: impl Source, max_bytes: u64) -> Result<Totals, LayerError> {
    let mut writer = Writer::new(folder, max_bytes)?;
    while let Some(mut entry) = source.next_entry()? {
        let xattrs = entry.meta.xattrs.iter();
        let bytes: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
        if bytes > MAX_XATTRS {
            let problem = format!("extended attributes of {bytes} bytes, more than {MAX_XATTRS}");
            return Err(entry_error(&entry.path, problem));
        }
        match &mut entry.node {
            Node::Regular(content) => {
                *content = writer.content(&entry.path, content.size, &mut source)?;
            }
            Node::Symlink(target) if target.is_empty() => {
                return Err(entry_error(&entry.path, "a symbolic link to nothing"));
            }
            Node::Symlink(target) if target.len() >= BLOCK => {
                return Err(entry_error(&entry.path, "a symbolic link of more than 4095 bytes"));
            }
            _ => {}
        }
        writer.entry(&entry)?;
    }
    writer.finish()
}

struct Writer {
    folder: PathBuf,
    data: BufWriter<File>,
    hashes: BufWriter<File>,
    table: BufWriter<File>,
    totals: Totals,
    max_bytes: u64,
    bytes: u64,
    /// What the table may still grow by.
    table_left: u64,
    chunk: Vec<u8>,
}

impl Content {
    /// Of so many bytes, not stored yet.
    pub fn sized(size: u64) -> Self {
        Self { size, start: 0, chunks: Vec::new(), tail: Vec::new() }
    }
}

impl Writer {
    fn new(folder: &Path, max_bytes: u64) -> Result<Self, LayerError> {
        let create = |name: &str, buffer| {
            let path = folder.join(name);
            let file = File::create_new(&path).map_err(io_error("create", &path))?;
            Ok::<_, LayerError>(BufWriter::with_capacity(buffer, file))
        };
        Ok(Self {
            data: create("data", 1 << 20)?,
            hashes: create("hashes", 64 << 10)?,
            table: create("table", 64 << 10)?,
            folder: folder.to_owned(),
            totals: Totals::default(),
            max_bytes,
            bytes: 0,
            table_left: MAX_TABLE,
            chunk: vec![0; CHUNK * BLOCK],
        })
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), LayerError> {
        self.totals.entries += 1;
        if self.totals.entries > MAX_ENTRIES {
            let problem = format!("the layer has more than {MAX_ENTRIES} entries");
            return Err(entry_error(&entry.path, problem));
        }
        let bytes = postcard::to_allocvec(entry)
            .map_err(|error| entry_error(&entry.path, error.to_string()))?;
        self.table_left = self.table_left.checked_sub(bytes.len() as u64 + 4).ok_or_else(|| {
            let problem = format!("the layer's table has more than {MAX_TABLE} bytes");
            entry_error(&entry.path, problem)
        })?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
        let written = self.table.write_all(&length).and_then(|()| self.table.write_all(&bytes));
        written.map_err(io_error("write", &self.folder.join("table")))
    }

    /// Stores what `input` gives, `size` bytes.
    fn content(
        &mut self,
        path: &[u8],
        size: u64,
        input: &mut impl Source,
    ) -> Result<Content, LayerError> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.max_bytes {
            let problem =
                format!("the layer has more than {} bytes (max_layer_bytes)", self.max_bytes);
            return Err(entry_error(path, problem));
        }
        let mut content = Content { start: self.totals.blocks, ..Content::sized(size) };
        let mut left = size;
        let mut chunk = std::mem::take(&mut self.chunk);
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            let Some(bytes) = chunk.get_mut(..length) else { break };
            let is_chunk = length == CHUNK * BLOCK;
            let is_hole = is_chunk && input.skip_hole(length as u64);
            if !is_hole {
                input
                    .read_exact(bytes)
                    .map_err(|source| TarError::Read { after: shown(path), source })?;
            }
            left -= length as u64;
            if is_hole || (is_chunk && bytes == ZEROS) {
                if content.chunks.is_empty() {
                    content.chunks = self.chunks(&content);
                }
                content.chunks.push(HOLE);
                continue;
            }
            let holes = !content.chunks.is_empty();
            if holes {
                content.chunks.push(self.totals.blocks);
            }
            let whole = length - length % BLOCK;
            let (blocks, tail) = bytes.split_at(whole);
            for block in blocks.chunks_exact(BLOCK) {
                self.block(path, block)?;
            }
            if tail.len() > MAX_TAIL || (holes && !tail.is_empty()) {
                let mut block = [0; BLOCK];
                if let Some(begin) = block.get_mut(..tail.len()) {
                    begin.copy_from_slice(tail);
                }
                self.block(path, &block)?;
            } else {
                content.tail = tail.to_vec();
            }
        }
        self.chunk = chunk;
        Ok(content)
    }

    /// The chunks so far of a file that has had no hole, and room for the others. Most files have no
    /// hole, so for them nothing is held.
    fn chunks(&self, content: &Content) -> Vec<u32> {
        let all = usize::try_from(content.size).unwrap_or(0).div_ceil(CHUNK * BLOCK);
        let mut chunks = Vec::with_capacity(all.min(MAX_ENTRIES));
        chunks.extend((content.start..self.totals.blocks).step_by(CHUNK));
        chunks
    }

    fn block(&mut self, path: &[u8], block: &[u8]) -> Result<(), LayerError> {
        self.data.write_all(block).map_err(io_error("write", &self.folder.join("data")))?;
        self.hashes
            .write_all(&Sha256::digest(block))
            .map_err(io_error("write", &self.folder.join("hashes")))?;
        // The last number is a hole's.
        self.totals.blocks =
            self.totals.blocks.checked_add(1).filter(|next| *next < HOLE).ok_or_else(|| {
                entry_error(path, "the layer has more blocks than EROFS can count")
            })?;
        Ok(())
    }

    fn finish(self) -> Result<Totals, LayerError> {
        let folder = self.folder;
        for (name, file) in [("data", self.data), ("hashes", self.hashes), ("table", self.table)] {
            let path = folder.join(name);
            let file =
                file.into_inner().map_err(|error| io_error("write", &path)(error.into_error()))?;
            if name == "data" {
                let padded = u64::from(self.totals.blocks).next_multiple_of(FANOUT as u64);
                file.set_len(padded * BLOCK as u64).map_err(io_error("extend", &path))?;
            }
            file.sync_data().map_err(io_error("sync", &path))?;
        }
        Ok(self.totals)
    }
}

/// A layer's entries, in their order.
#[derive(Debug)]
pub struct Entries {
    path: PathBuf,
    table: BufReader<File>,
    /// Bytes of the table that have been read, and all.
    at: u64,
    size: u64,
}

/// An entry, and where in the table it ends. The end of a file comes last in its entry, so it can be
/// read again from there and need not be held.
#[derive(Debug)]
pub struct Record {
    /// The entry.
    pub entry: Entry,
    /// Byte of the table after it.
    pub end: u64,
}

/// Opens the table of the layer in `folder`.
///
/// # Errors
/// It cannot be opened.
pub fn entries(folder: &Path) -> Result<Entries, LayerError> {
    let path = folder.join("table");
    let file = File::open(&path).map_err(io_error("open", &path))?;
    let size = file.metadata().map_err(io_error("look at", &path))?.len();
    Ok(Entries { path, table: BufReader::with_capacity(64 << 10, file), at: 0, size })
}

impl Entries {
    fn read(&mut self) -> io::Result<Option<Record>> {
        if self.at == self.size {
            return Ok(None);
        }
        let mut length = [0; 4];
        self.table.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        self.at += 4 + u64::from(length);
        // A damaged length must not become memory.
        if self.at > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; length as usize];
        self.table.read_exact(&mut bytes)?;
        let entry = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
        Ok(Some(Record { entry, end: self.at }))
    }
}

impl Iterator for Entries {
    type Item = Result<Record, LayerError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().map_err(io_error("read", &self.path)).transpose()
    }
}

/// Bytes that a layer takes on disk.
pub fn disk_bytes(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}
