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
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::erofs::Layout;
use crate::layer::{BLOCK, Content, HASH, HOLE, LayerError, io_error};
use crate::tree::{Body, Inode, Tree};
use crate::verity::{self, Builder, FANOUT};

/// Version of `disk.json`.
const VERSION: u32 = 1;
/// Most bytes of a passwd or group file that are shown to containerd.
const MAX_USERS: u64 = 1 << 20;
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

/// Makes a disk's files in `folder`, which must be new.
///
/// # Errors
/// An entry of a layer cannot be placed, or a file of the store fails.
pub fn make(folder: &Path, layers: &[Layer]) -> Result<Disk, LayerError> {
    let mut tree = Tree::of_layers(layers.iter().map(|layer| layer.folder.as_path()))?;
    users(&folder.join("users"), &mut tree, layers)?;
    let layout = Layout::of(&tree)
        .map_err(|error| LayerError::Entry { entry: "/".to_owned(), problem: error.to_string() })?;
    let mut extents = Vec::with_capacity(layers.len() + 2);
    let mut next = 0;
    let mut extent = |file: PathBuf, layer: Option<String>, blocks: u64| {
        let begin = next;
        let blocks = blocks.next_multiple_of(FANOUT as u64);
        if blocks > 0 {
            extents.push(Extent { file, first: 0, blocks, layer });
        }
        next += blocks;
        u32::try_from(begin).unwrap_or(HOLE)
    };
    extent("index".into(), None, layout.blocks());
    let (mut bases, mut sizes) = (Vec::new(), Vec::new());
    for layer in layers {
        let path = layer.folder.join("hashes");
        let meta = fs::metadata(&path).map_err(io_error("look at", &path))?;
        let blocks = meta.len() / HASH as u64;
        sizes.push(blocks);
        bases.push(extent(layer.relative.join("data"), Some(layer.digest.clone()), blocks));
    }
    let total = u32::try_from(next).ok().filter(|total| *total < HOLE).ok_or_else(|| {
        let problem = "the image has more blocks than EROFS can count".to_owned();
        LayerError::Entry { entry: "/".to_owned(), problem }
    })?;

    let path = folder.join("index");
    let failed = |source| io_error("write", &path)(source);
    let file = File::create_new(&path).map_err(io_error("create", &path))?;
    let mut output =
        Hashing { output: BufWriter::with_capacity(1 << 20, file), tree: Builder::default() };
    layout.write(&bases, total, &mut output).map_err(failed)?;
    drop(layout);
    drop(tree);
    let Hashing { mut output, tree: mut hashes } = output;
    let zero = verity::hash(&[0; BLOCK]);
    hashes.pad(&zero);
    output.flush().map_err(failed)?;
    let first = extents.first().map_or(0, |extent| extent.blocks);
    output.seek(SeekFrom::Start(first * BLOCK as u64)).map_err(failed)?;
    let mut buffer = Vec::new();
    for (layer, blocks) in layers.iter().zip(sizes) {
        let path = layer.folder.join("hashes");
        buffer.clear();
        let mut file = File::open(&path).map_err(io_error("open", &path))?;
        file.read_to_end(&mut buffer).map_err(io_error("read", &path))?;
        if buffer.len() as u64 != blocks * HASH as u64 {
            let error = std::io::Error::other("it does not fit the layer's data");
            return Err(io_error("read", &path)(error));
        }
        hashes.push(&buffer);
        hashes.pad(&zero);
    }
    let root = hashes.finish(&mut output).map_err(failed)?;
    let mut file = output.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_data().map_err(io_error("sync", &path))?;
    let end = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let blocks = end / BLOCK as u64 - first;
    extents.push(Extent { file: "index".into(), first, blocks, layer: None });
    let root_hash = root.iter().map(|byte| format!("{byte:02x}")).collect();
    let disk = Disk { version: VERSION, data_blocks: next, root_hash, extents };
    let path = folder.join("disk.json");
    let text = serde_json::to_vec(&disk).unwrap_or_default();
    let mut file = File::create_new(&path).map_err(io_error("create", &path))?;
    file.write_all(&text).map_err(io_error("write", &path))?;
    file.sync_data().map_err(io_error("sync", &path))?;
    Ok(disk)
}

/// Hashes whole blocks on their way.
struct Hashing {
    output: BufWriter<File>,
    tree: Builder,
}

impl std::io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.tree.data(bytes);
        self.output.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.output.flush()
    }
}

/// Writes the image's passwd and group files into `folder`.
fn users(folder: &Path, tree: &mut Tree, layers: &[Layer]) -> Result<(), LayerError> {
    let etc = folder.join("etc");
    fs::create_dir_all(&etc).map_err(io_error("create", &etc))?;
    // What runc says if it is given such a root: it finds /proc, and then has to make a link's target.
    let proc = folder.join("proc");
    fs::create_dir(&proc).map_err(io_error("create", &proc))?;
    let sign = folder.join("dev");
    std::os::unix::fs::symlink("this-snapshot-is-for-runtime-joey-only", &sign)
        .map_err(io_error("create", &sign))?;
    for name in USER_FILES {
        let Some(Inode { body: Body::Regular(layer, content), .. }) = tree.find(name.as_bytes())
        else {
            continue;
        };
        if content.size > MAX_USERS || !content.chunks.is_empty() {
            continue;
        }
        let Some(layer) = layers.get(*layer) else { continue };
        let path = folder.join(name);
        fs::write(&path, read(&layer.folder.join("data"), content)?)
            .map_err(io_error("write", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
            .map_err(io_error("write", &path))?;
    }
    Ok(())
}

/// A small file's bytes.
fn read(data: &Path, content: &Content) -> Result<Vec<u8>, LayerError> {
    let mut file = File::open(data).map_err(io_error("open", data))?;
    let whole = usize::try_from(content.size).unwrap_or(0) - content.tail.len();
    let mut bytes = vec![0; whole];
    file.seek(SeekFrom::Start(u64::from(content.start) * BLOCK as u64))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(io_error("read", data))?;
    bytes.extend_from_slice(&content.tail);
    Ok(bytes)
}
