//! The disk of an image: one block device made of the layers' own blobs and an index over them.
//!
//! ```text
//! | superblock, inodes, directories | data of layer 1 | data of layer 2 | … | dm-verity tree |
//!   `index`, first part               `layers/…/data`   `layers/…/data`       `index`, second part
//! ```
//!
//! Each part ends in a hole, up to a multiple of 512 KiB: so the lowest level of the hash tree is made of
//! the layers' own hashes, and no layer is read again for it. A
//! guest attaches one disk, opens it through one dm-verity target and mounts one file system, however
//! many layers there are.
//!
//! `disk.json` tells the shim what the disk is made of. `users/` has the image's passwd and group
//! files, all that containerd needs to see of an image on the host.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::erofs::{Layout, Source};
use crate::layer::{BLOCK, HASH, HOLE, LayerError, io_error};
use crate::tree::{Body, Data, Inode, Limits, Tree};
use crate::verity::{self, Builder, FANOUT};

/// Version of `disk.json`.
pub const VERSION: u32 = 1;
/// Most bytes of a passwd or group file that are shown to containerd.
const MAX_USERS: u64 = 1 << 20;
/// Most layers of an image; containerd and others that make images stop at 127.
const MAX_LAYERS: usize = 500;
/// Most bytes of an image's tables, which are read to make its disk.
const MAX_TABLES: u64 = 4 << 30;
const USER_FILES: &[&str] = &["etc/passwd", "etc/group"];

/// `disk.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Version of this description.
    pub version: u32,
    /// Blocks of 4096 bytes that dm-verity protects; its tree comes right after them.
    pub data_blocks: u64,
    /// Hash of the tree's root, hexadecimal.
    pub root_hash: String,
    /// What the disk is made of, from its first block on.
    pub extents: Vec<Extent>,
}

/// Some blocks of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// The file that has them, from `disk.json`'s folder.
    pub file: PathBuf,
    /// At which block of the file they begin.
    pub first: u64,
    /// How many.
    pub blocks: u64,
    /// Digest of the layer that they are of, for an operator who reads that one is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<String>,
}

/// A layer of an image.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Digest of its uncompressed tar stream.
    pub digest: String,
    /// Its folder.
    pub folder: PathBuf,
    /// The folder as seen from the disk's.
    pub relative: PathBuf,
}

/// Makes a disk's files in `folder`, which must be new; they are on the host's disk when it returns.
///
/// # Errors
/// An entry of a layer cannot be placed, the image is beyond a limit, or a file of the store fails.
pub fn make(folder: &Path, layers: &[Layer], limits: Limits) -> Result<Disk, LayerError> {
    let tables = tables(layers)?;
    let mut tree = Tree::of_layers(layers.iter().map(|layer| layer.folder.as_path()), limits)?;
    users(&folder.join("users"), &mut tree, layers, &tables)?;
    let layout = Layout::of(&tree).map_err(|error| whole(error.to_string()))?;
    let mut extents = Extents::default();
    extents.add("index".into(), None, layout.blocks());
    let (mut bases, mut sizes) = (Vec::new(), Vec::new());
    for layer in layers {
        let path = layer.folder.join("hashes");
        let meta = fs::metadata(&path).map_err(io_error("look at", &path))?;
        let blocks = meta.len() / HASH as u64;
        sizes.push(blocks);
        let file = layer.relative.join("data");
        bases.push(extents.add(file, Some(layer.digest.clone()), blocks));
    }
    let Extents { list: mut extents, next } = extents;
    let total = u32::try_from(next).ok().filter(|total| *total < HOLE);
    let total =
        total.ok_or_else(|| whole("the image has more blocks than EROFS can count".to_owned()))?;

    let path = folder.join("index");
    let failed = |source| io_error("write", &path)(source);
    let file = File::create_new(&path).map_err(io_error("create", &path))?;
    let first = extents.first().map_or(0, |extent| extent.blocks);
    let mut output = Hashing {
        output: BufWriter::with_capacity(1 << 20, &file),
        tree: Builder::new(&file, first * BLOCK as u64, next),
    };
    let source = Source { bases: &bases, tables: &tables };
    layout.write(&source, total, &mut output).map_err(failed)?;
    output.flush().map_err(failed)?;
    drop(layout);
    drop(tree);
    let mut hashes = output.tree;
    let zero = verity::hash(&[0; BLOCK]);
    hashes.pad(&zero).map_err(failed)?;
    for (layer, blocks) in layers.iter().zip(sizes) {
        push_hashes(&layer.folder.join("hashes"), blocks, &mut hashes)?;
        hashes.pad(&zero).map_err(failed)?;
    }
    let root = hashes.finish().map_err(failed)?;
    file.sync_data().map_err(io_error("sync", &path))?;
    let end = file.metadata().map_err(failed)?.len();
    let blocks = end / BLOCK as u64 - first;
    extents.push(Extent { file: "index".into(), first, blocks, layer: None });
    let root_hash = root.iter().map(|byte| format!("{byte:02x}")).collect();
    let disk = Disk { version: VERSION, data_blocks: next, root_hash, extents };
    write(&folder.join("disk.json"), &serde_json::to_vec(&disk).unwrap_or_default())?;
    sync(folder)?;
    Ok(disk)
}

/// An error about the image as a whole.
fn whole(problem: String) -> LayerError {
    LayerError::Entry { entry: "/".to_owned(), problem }
}

/// Opens the layers' tables, if they are not beyond what an image may have.
fn tables(layers: &[Layer]) -> Result<Vec<File>, LayerError> {
    if layers.len() > MAX_LAYERS {
        let count = layers.len();
        return Err(whole(format!("the image has {count} layers, more than {MAX_LAYERS}")));
    }
    let (mut tables, mut bytes) = (Vec::with_capacity(layers.len()), 0);
    for layer in layers {
        let path = layer.folder.join("table");
        let file = File::open(&path).map_err(io_error("open", &path))?;
        bytes += file.metadata().map_err(io_error("look at", &path))?.len();
        if bytes > MAX_TABLES {
            let digest = &layer.digest;
            return Err(whole(format!(
                "with layer {digest} the image's tables have more than {MAX_TABLES} bytes"
            )));
        }
        tables.push(file);
    }
    Ok(tables)
}

/// Parts of a disk, one after the other.
#[derive(Default)]
struct Extents {
    list: Vec<Extent>,
    next: u64,
}

impl Extents {
    /// Adds one of so many blocks and of holes up to a whole block of hashes; gives its first block.
    fn add(&mut self, file: PathBuf, layer: Option<String>, blocks: u64) -> u32 {
        let begin = self.next;
        let blocks = blocks.next_multiple_of(FANOUT as u64);
        if blocks > 0 {
            self.list.push(Extent { file, first: 0, blocks, layer });
        }
        self.next += blocks;
        u32::try_from(begin).unwrap_or(HOLE)
    }
}

/// Passes a layer's hashes on, a piece at a time.
fn push_hashes(path: &Path, blocks: u64, hashes: &mut Builder<'_>) -> Result<(), LayerError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let (mut left, mut piece) = (blocks * HASH as u64, vec![0; 64 << 10]);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        let bytes = piece.get_mut(..length).unwrap_or_default();
        file.read_exact(bytes).map_err(io_error("read", path))?;
        hashes.push(bytes).map_err(io_error("write the hash tree over", path))?;
        left -= length as u64;
    }
    Ok(())
}

/// Hashes whole blocks on their way.
struct Hashing<'a> {
    output: BufWriter<&'a File>,
    tree: Builder<'a>,
}

impl io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tree.data(bytes)?;
        self.output.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Writes a new file and syncs it.
fn write(path: &Path, bytes: &[u8]) -> Result<File, LayerError> {
    let mut file = File::create_new(path).map_err(io_error("create", path))?;
    file.write_all(bytes).map_err(io_error("write", path))?;
    file.sync_all().map_err(io_error("sync", path))?;
    Ok(file)
}

/// Syncs a folder: the names in it.
pub fn sync(folder: &Path) -> Result<(), LayerError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
}

/// Writes the image's passwd and group files into `folder`, and syncs them.
fn users(
    folder: &Path,
    tree: &mut Tree,
    layers: &[Layer],
    tables: &[File],
) -> Result<(), LayerError> {
    let etc = folder.join("etc");
    // What runc says if it is given such a root: it finds /proc, and then has to make a link's target.
    let proc = folder.join("proc");
    for path in [folder, &etc, &proc] {
        fs::DirBuilder::new().mode(0o755).create(path).map_err(io_error("create", path))?;
    }
    let sign = folder.join("dev");
    std::os::unix::fs::symlink("this-snapshot-is-for-runtime-joey-only", &sign)
        .map_err(io_error("create", &sign))?;
    for name in USER_FILES {
        let Some(Inode { body: Body::Regular(data), .. }) = tree.find(name.as_bytes()) else {
            continue;
        };
        if data.size > MAX_USERS || !data.chunks.is_empty() {
            continue;
        }
        let Some(layer) = layers.get(data.layer) else { continue };
        let path = folder.join(name);
        let file = write(&path, &read(&layer.folder, data, tables)?)?;
        file.set_permissions(fs::Permissions::from_mode(0o444))
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &path))?;
    }
    for path in [&etc, &proc, folder] {
        sync(path)?;
    }
    Ok(())
}

/// A small file's bytes.
fn read(layer: &Path, data: &Data, tables: &[File]) -> Result<Vec<u8>, LayerError> {
    let path = layer.join("data");
    let file = File::open(&path).map_err(io_error("open", &path))?;
    let tail =
        Source { bases: &[], tables }.tail(data).map_err(io_error("read", &layer.join("table")))?;
    let length = usize::try_from(data.size).unwrap_or(0).saturating_sub(tail.len());
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, u64::from(data.start) * BLOCK as u64)
        .map_err(io_error("read", &path))?;
    bytes.extend_from_slice(&tail);
    Ok(bytes)
}
