//! Writes the EROFS file system of a merged image: its superblock, inodes and directories, with the
//! files' blocks somewhere after them on the same disk (Linux, `fs/erofs/erofs_fs.h`).
//!
//! Layout: block 0 has the superblock; then come the inodes, each followed by its extended attributes
//! and by what is inline (short directories, link targets, ends of files, chunk maps); then whole
//! blocks of larger directories and of links that do not fit beside their inode. Everything is uncompressed: what a guest reads is what the host's
//! page cache holds, once for all guests.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

use crate::layer::{BLOCK, CHUNK, HOLE};
use crate::tree::{Body, Data, Id, Inode, ROOT, Tree};

const MAGIC: u32 = 0xE0F5_E1E2;
/// Incompatible features: files in chunks.
const CHUNKED_FILE: u32 = 0x4;
/// Unit of inode numbers.
const SLOT: u64 = 32;
/// Bytes of an extended inode.
const INODE: u64 = 64;
const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const CHUNKED: u16 = 4;
/// Version bit of an extended inode.
const EXTENDED: u16 = 1;
const XATTR_HEADER: usize = 12;
const DIRENT: usize = 12;

/// A file system that is laid out but not written.
#[derive(Debug)]
pub struct Layout<'a> {
    tree: &'a Tree,
    /// Files in the order of their inodes.
    order: Vec<Id>,
    /// By number; a file that is not in the tree has no link.
    places: Vec<Place>,
    /// Blocks of superblock, inodes and directories.
    blocks: u64,
    /// Block after the last inode.
    directories: u64,
}

/// Where an inode is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Byte on the disk.
    at: u64,
    links: u32,
    parent: Id,
    /// First block of a directory's whole blocks.
    block: u64,
    /// Bytes after inode and extended attributes.
    inline: u64,
}

/// Where files' bytes are, layer by layer.
#[derive(Debug)]
pub struct Source<'a> {
    /// The block of the disk at which its data begin.
    pub bases: &'a [u32],
    /// Its table.
    pub tables: &'a [File],
}

impl Source<'_> {
    /// What comes after a file's last whole block.
    ///
    /// # Errors
    /// The layer's table cannot be read.
    pub fn tail(&self, data: &Data) -> io::Result<Vec<u8>> {
        let mut tail = vec![0; usize::from(data.tail)];
        if let (false, Some(table)) = (tail.is_empty(), self.tables.get(data.layer)) {
            table.read_exact_at(&mut tail, data.tail_end.saturating_sub(u64::from(data.tail)))?;
        }
        Ok(tail)
    }
}

/// Why a tree cannot be an EROFS file system.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TooLarge(String);

/// Names in a directory's blocks, `.` and `..` among them.
struct Listing<'a> {
    /// Sorted.
    entries: Vec<(&'a [u8], Id)>,
    /// Index of the first entry of each block.
    blocks: Vec<usize>,
    size: u64,
}

impl<'a> Listing<'a> {
    fn of(children: &'a std::collections::BTreeMap<Box<[u8]>, Id>, own: Id, parent: Id) -> Self {
        let own = [(&b"."[..], own), (&b".."[..], parent)];
        let named = children.iter().map(|(name, id)| (&**name, *id));
        let mut entries: Vec<_> = own.into_iter().chain(named).collect();
        entries.sort_unstable_by_key(|(name, _)| *name);
        let (mut blocks, mut used) = (vec![0], 0);
        for (index, (name, _)) in entries.iter().enumerate() {
            let needs = DIRENT + name.len();
            if used + needs > BLOCK {
                blocks.push(index);
                used = 0;
            }
            used += needs;
        }
        let size = ((blocks.len() - 1) * BLOCK + used) as u64;
        Self { entries, blocks, size }
    }

    /// A block's bytes; the last one may be short.
    fn block(&self, number: usize, layout: &Layout<'_>) -> Vec<u8> {
        let from = self.blocks.get(number).copied().unwrap_or(0);
        let to = self.blocks.get(number + 1).copied().unwrap_or(self.entries.len());
        let entries = self.entries.get(from..to).unwrap_or_default();
        let mut bytes = Vec::with_capacity(BLOCK);
        let mut at = entries.len() * DIRENT;
        for (name, id) in entries {
            let number = layout.place(*id).map_or(0, |place| layout.number(place));
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(&(at as u16).to_le_bytes());
            bytes.push(layout.tree.inode(*id).map_or(0, file_type));
            bytes.push(0);
            at += name.len();
        }
        for (name, _) in entries {
            bytes.extend_from_slice(name);
        }
        if to < self.entries.len() {
            bytes.resize(BLOCK, 0);
        }
        bytes
    }
}

fn file_type(inode: &Inode) -> u8 {
    match inode.body {
        Body::Regular(..) => 1,
        Body::Directory(_) => 2,
        Body::Char(..) => 3,
        Body::Block(..) => 4,
        Body::Fifo => 5,
        Body::Symlink(_) => 7,
    }
}

fn mode(inode: &Inode) -> u16 {
    let kind = match inode.body {
        Body::Regular(..) => 0o100_000,
        Body::Directory(_) => 0o040_000,
        Body::Char(..) => 0o020_000,
        Body::Block(..) => 0o060_000,
        Body::Fifo => 0o010_000,
        Body::Symlink(_) => 0o120_000,
    };
    kind | inode.meta.mode & 0o7777
}

/// Prefixes that EROFS has numbers for.
const XATTR_PREFIXES: &[(&[u8], u8)] = &[
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// A file's extended attributes as they are stored; nothing if it has none that a file can have.
fn xattrs(inode: &Inode) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in &inode.meta.xattrs {
        let found = XATTR_PREFIXES
            .iter()
            .find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?)));
        let Some((number, rest)) = found else { continue };
        let (Ok(name_length), Ok(length)) = (u8::try_from(rest.len()), u16::try_from(value.len()))
        else {
            continue;
        };
        if bytes.is_empty() {
            bytes.resize(XATTR_HEADER, 0);
        }
        bytes.extend_from_slice(&[name_length, number]);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK as u64)
}

impl<'a> Layout<'a> {
    /// Gives every file of the tree its place.
    ///
    /// # Errors
    /// The tree does not fit the format's counters.
    pub fn of(tree: &'a Tree) -> Result<Self, TooLarge> {
        let places = vec![Place::default(); tree.numbers()];
        let mut layout = Self { tree, order: Vec::new(), places, blocks: 0, directories: 0 };
        layout.count();
        let mut at = BLOCK as u64;
        let mut whole = 0;
        for id in &layout.order {
            let (Some(inode), Some(place)) = (tree.inode(*id), layout.places.get_mut(*id as usize))
            else {
                continue;
            };
            let (inline, in_one_block, blocks) = payload(inode, *id, place.parent);
            let head = head(inode);
            at = at.next_multiple_of(INODE);
            // Linux before 6.10 takes a link's target for damaged unless all of it, inode and
            // attributes included, is in one block.
            let whole_link = head + inline;
            if matches!(inode.body, Body::Symlink(_))
                && at % BLOCK as u64 + whole_link > BLOCK as u64
            {
                at = at.next_multiple_of(BLOCK as u64);
            }
            let end = (at + head) % BLOCK as u64 + inline;
            if in_one_block && inline > 0 && end > BLOCK as u64 {
                // Where the inline part begins a block, or, if nothing is before it, the inode does.
                at += BLOCK as u64 - at % BLOCK as u64;
                let begin = (at + head) % BLOCK as u64;
                if begin + inline > BLOCK as u64 {
                    at += (BLOCK as u64 - begin).next_multiple_of(INODE);
                }
            }
            (place.at, place.inline, place.block) = (at, inline, whole);
            whole += blocks;
            at += head + inline;
        }
        layout.directories = blocks_of(at);
        layout.blocks = layout.directories + whole;
        for place in &mut layout.places {
            place.block += layout.directories;
        }
        if layout.blocks >= u64::from(HOLE) {
            return Err(TooLarge(format!("{} blocks of metadata", layout.blocks)));
        }
        Ok(layout)
    }

    /// Orders files so that a directory's are beside each other, and counts their names.
    fn count(&mut self) {
        let mut left = std::collections::VecDeque::from([(ROOT, ROOT)]);
        while let Some((id, parent)) = left.pop_front() {
            let Some(place) = self.places.get_mut(id as usize) else { continue };
            if place.links > 0 {
                place.links += 1;
                continue;
            }
            self.order.push(id);
            let mut links = 1;
            if let Some(Inode { body: Body::Directory(children), .. }) = self.tree.inode(id) {
                links = 2;
                for child in children.values() {
                    left.push_back((*child, id));
                    let is_directory = |inode: &Inode| matches!(inode.body, Body::Directory(_));
                    links += u32::from(self.tree.inode(*child).is_some_and(is_directory));
                }
            }
            if let Some(place) = self.places.get_mut(id as usize) {
                *place = Place { links, parent, ..Place::default() };
            }
        }
    }

    /// Blocks that [`Self::write`] writes; files' blocks come after them.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    fn place(&self, id: Id) -> Option<&Place> {
        self.places.get(id as usize)
    }

    fn number(&self, place: &Place) -> u64 {
        (place.at - BLOCK as u64) / SLOT
    }

    /// Writes the file system; `total` tells how many blocks the disk has.
    ///
    /// # Errors
    /// Writing failed, or reading an end of a file.
    pub fn write(
        &self,
        source: &Source<'_>,
        total: u32,
        output: &mut impl Write,
    ) -> io::Result<()> {
        let mut output = Counted { output, at: 0 };
        output.write(&self.superblock(total))?;
        for id in &self.order {
            let (Some(inode), Some(place)) = (self.tree.inode(*id), self.place(*id)) else {
                continue;
            };
            output.pad_to(place.at)?;
            self.inode(*id, inode, place, source, &mut output)?;
        }
        output.pad_to(self.directories * BLOCK as u64)?;
        for id in &self.order {
            let (Some(inode), Some(place)) = (self.tree.inode(*id), self.place(*id)) else {
                continue;
            };
            if let (Body::Symlink(target), 0) = (&inode.body, place.inline) {
                output.write(target)?;
                output.pad_to(output.at.next_multiple_of(BLOCK as u64))?;
            }
            let Body::Directory(children) = &inode.body else { continue };
            let listing = Listing::of(children, *id, place.parent);
            let inline = u64::from(place.inline > 0);
            for number in 0..listing.blocks.len() as u64 - inline {
                output.write(&listing.block(number as usize, self))?;
                output.pad_to(output.at.next_multiple_of(BLOCK as u64))?;
            }
        }
        output.pad_to(self.blocks * BLOCK as u64)
    }

    fn superblock(&self, total: u32) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes()); // checksum: not used, dm-verity is below
        bytes.extend_from_slice(&0_u32.to_le_bytes()); // compatible features
        bytes.extend_from_slice(&[12, 0]); // log2 of a block's bytes; no more superblock slots
        bytes.extend_from_slice(&0_u16.to_le_bytes()); // the root's number: the first inode
        bytes.extend_from_slice(&(self.order.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 12]); // build time: the same file system for the same files
        bytes.extend_from_slice(&total.to_le_bytes());
        bytes.extend_from_slice(&1_u32.to_le_bytes()); // inodes' first block
        bytes.extend_from_slice(&0_u32.to_le_bytes()); // shared extended attributes: none
        bytes.extend_from_slice(&[0; 32]); // identifier and name
        bytes.extend_from_slice(&CHUNKED_FILE.to_le_bytes());
        bytes.resize(BLOCK, 0);
        bytes
    }

    fn inode(
        &self,
        id: Id,
        inode: &Inode,
        place: &Place,
        source: &Source<'_>,
        output: &mut Counted<'_, impl Write>,
    ) -> io::Result<()> {
        let mut layout = if place.inline > 0 { INLINE } else { PLAIN };
        let mut inline = Vec::new();
        let (size, address) = match &inode.body {
            Body::Directory(children) => {
                let listing = Listing::of(children, id, place.parent);
                if place.inline > 0 {
                    inline = listing.block(listing.blocks.len() - 1, self);
                }
                (listing.size, place.block as u32)
            }
            Body::Regular(data) => {
                let base = source.bases.get(data.layer).copied().unwrap_or(0);
                if data.chunks.is_empty() {
                    inline = source.tail(data)?;
                    (data.size, base + data.start)
                } else {
                    layout = CHUNKED;
                    for chunk in &data.chunks {
                        let address = if *chunk == HOLE { HOLE } else { base + chunk };
                        inline.extend_from_slice(&address.to_le_bytes());
                    }
                    // Blocks in a chunk, as a power of two.
                    (data.size, CHUNK.ilog2())
                }
            }
            Body::Symlink(target) => {
                let beside = place.inline > 0;
                if beside {
                    inline = target.to_vec();
                }
                (target.len() as u64, if beside { 0 } else { place.block as u32 })
            }
            Body::Char(major, minor) | Body::Block(major, minor) => {
                (0, minor & 0xff | major << 8 | (minor & !0xff) << 12)
            }
            Body::Fifo => (0, 0),
        };
        let xattrs = xattrs(inode);
        let count = match xattrs.len() {
            0 => 0,
            bytes => ((bytes - XATTR_HEADER) / 4 + 1) as u16,
        };
        let (seconds, nanos) = inode.meta.mtime;
        let mut bytes = Vec::with_capacity(INODE as usize + xattrs.len() + inline.len());
        bytes.extend_from_slice(&(EXTENDED | layout << 1).to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&mode(inode).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&(self.number(place) as u32).to_le_bytes());
        bytes.extend_from_slice(&inode.meta.uid.to_le_bytes());
        bytes.extend_from_slice(&inode.meta.gid.to_le_bytes());
        bytes.extend_from_slice(&seconds.to_le_bytes());
        bytes.extend_from_slice(&nanos.to_le_bytes());
        bytes.extend_from_slice(&place.links.to_le_bytes());
        bytes.resize(INODE as usize, 0);
        bytes.extend_from_slice(&xattrs);
        bytes.extend_from_slice(&inline);
        output.write(&bytes)
    }
}

/// Bytes of a file's inode and extended attributes.
fn head(inode: &Inode) -> u64 {
    INODE + xattrs(inode).len() as u64
}

/// Bytes that follow a file's inode, whether they must be in one block, and whole blocks of its own
/// beside the inodes.
fn payload(inode: &Inode, id: Id, parent: Id) -> (u64, bool, u64) {
    match &inode.body {
        Body::Directory(children) => {
            let listing = Listing::of(children, id, parent);
            let last = listing.size % BLOCK as u64;
            // A long last block beside its inode would leave a hole before it.
            if last == 0 || last > BLOCK as u64 / 2 {
                (0, false, listing.blocks.len() as u64)
            } else {
                (last, true, listing.blocks.len() as u64 - 1)
            }
        }
        Body::Regular(Data { chunks, .. }) if !chunks.is_empty() => {
            (4 * chunks.len() as u64, false, 0)
        }
        Body::Regular(data) => (u64::from(data.tail), true, 0),
        Body::Symlink(target) if head(inode) + target.len() as u64 > BLOCK as u64 => (0, false, 1),
        Body::Symlink(target) => (target.len() as u64, true, 0),
        _ => (0, false, 0),
    }
}

struct Counted<'a, W> {
    output: &'a mut W,
    at: u64,
}

impl<W: Write> Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.output.write_all(bytes)
    }

    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        static ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.at < at {
            let most = usize::try_from(at - self.at).unwrap_or(BLOCK).min(BLOCK);
            self.write(ZEROS.get(..most).unwrap_or_default())?;
        }
        Ok(())
    }
}
