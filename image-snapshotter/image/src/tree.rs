//! Layers laid on top of each other: the files that a container sees, without a file system doing it.
//!
//! Semantics are those of unpacking one tar after the other (OCI image specification, `layer.md`, and
//! containerd's `archive` package): whiteouts first, later entries replace earlier ones, directories
//! keep what is in them, and links on the way to an entry are followed within the root.
//!
//! The layers are an attacker's. What the tree holds is counted in bytes of memory, files that are
//! gone are not held, and ends of files stay in the layers' tables. Steps along paths are counted too,
//! since links make them many.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::layer::{self, Content, Entry, LayerError, Meta, Node, Record, split};
use crate::tar::shown;

/// Most links that a path may go through (Linux: 40).
const MAX_LINKS: usize = 40;
/// Longest path with the links on it in place of their names.
const MAX_WALK: usize = 64 << 10;
/// Most steps along paths of one image: several for each of some million files.
const MAX_STEPS: u64 = 50_000_000;

/// Memory for a file: the inode itself, its place on the disk, and what growing vectors waste.
const INODE_COST: usize = 192;
/// Memory for a name besides its bytes: its allocation, its part of a directory's node, and what
/// listing and ordering directories take.
const NAME_COST: usize = 104;
/// Memory for a directory on top: the first node of its names.
const DIRECTORY_COST: usize = 240;
/// Memory for an extended attribute besides its bytes.
const XATTR_COST: usize = 112;

/// Number of a file in its tree.
pub type Id = u32;
/// The root directory.
pub const ROOT: Id = 0;

/// Where the bytes of a file are.
#[derive(Debug)]
pub struct Data {
    /// Number of its layer, the lowest being 0.
    pub layer: usize,
    /// Bytes.
    pub size: u64,
    /// Its first block in the layer's data.
    pub start: u32,
    /// For a file with holes: the first block of each chunk ([`Content::chunks`]).
    pub chunks: Box<[u32]>,
    /// Bytes after its last whole block, which are in the layer's table.
    pub tail: u16,
    /// Where in the table they end.
    pub tail_end: u64,
}

/// What a file is.
#[derive(Debug)]
pub enum Body {
    /// A directory: its files by name.
    Directory(BTreeMap<Box<[u8]>, Id>),
    /// A file whose bytes are in a layer.
    Regular(Data),
    /// A symbolic link.
    Symlink(Box<[u8]>),
    /// A character device.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file.
#[derive(Debug)]
pub struct Inode {
    /// Owner and so on.
    pub meta: Meta,
    /// What it is.
    pub body: Body,
    /// Names that it has; with none its number is free.
    names: u32,
}

/// How much a tree may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of memory.
    pub bytes: usize,
    /// Steps along paths.
    pub steps: u64,
}

impl Limits {
    /// With this much memory.
    pub fn of(bytes: usize) -> Self {
        Self { bytes, steps: MAX_STEPS }
    }
}

/// Merged layers.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    free: Vec<Id>,
    /// Links, by directory and name, in whose place the layer whose removals are being done has a
    /// directory: what it removes below is not what they lead to.
    replaced: BTreeSet<(Id, Box<[u8]>)>,
    limits: Limits,
    /// Memory in use, as it is counted.
    bytes: usize,
    /// Steps made.
    steps: u64,
}

/// Why an entry has no place.
#[derive(Debug)]
enum Problem {
    Memory,
    Other(String),
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self::Other(text)
    }
}

fn directory(mode: u16) -> Inode {
    let meta = Meta { mode, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
    Inode { meta, body: Body::Directory(BTreeMap::new()), names: 0 }
}

fn xattrs_cost(meta: &Meta) -> usize {
    meta.xattrs.iter().map(|(name, value)| XATTR_COST + name.len() + value.len()).sum()
}

impl Inode {
    fn cost(&self) -> usize {
        let body = match &self.body {
            Body::Regular(data) => size_of_val(&*data.chunks),
            Body::Symlink(target) => target.len(),
            Body::Directory(_) => DIRECTORY_COST,
            _ => 0,
        };
        INODE_COST + xattrs_cost(&self.meta) + body
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }
}

impl Tree {
    fn new(limits: Limits) -> Self {
        let root = Inode { names: 1, ..directory(0o755) };
        Self {
            inodes: vec![root],
            free: Vec::new(),
            replaced: BTreeSet::new(),
            limits,
            bytes: 0,
            steps: 0,
        }
    }

    /// The layers in these folders, lowest first.
    ///
    /// # Errors
    /// An entry that cannot be placed, or that is beyond the limits, by its layer and name;
    /// [`is_memory`] tells whether more memory would do.
    pub fn of_layers<'a>(
        folders: impl IntoIterator<Item = &'a Path>,
        limits: Limits,
    ) -> Result<Self, LayerError> {
        let mut tree = Self::new(limits);
        for (number, folder) in folders.into_iter().enumerate() {
            tree.layer(number, folder).map_err(|error| LayerError::Layer {
                layer: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                source: Box::new(error),
            })?;
        }
        Ok(tree)
    }

    fn layer(&mut self, number: usize, folder: &Path) -> Result<(), LayerError> {
        let most = self.limits.bytes;
        let refused = |entry: &[u8], problem| match problem {
            Problem::Memory => LayerError::Memory { entry: shown(entry), most },
            Problem::Other(problem) => LayerError::Entry { entry: shown(entry), problem },
        };
        // What a layer removes is only what was there before it.
        if number > 0 {
            for record in layer::entries(folder)? {
                let entry = record?.entry;
                self.remove(&entry).map_err(|problem| refused(&entry.path, problem))?;
            }
            for (_, name) in std::mem::take(&mut self.replaced) {
                self.bytes = self.bytes.saturating_sub(NAME_COST + name.len());
            }
        }
        for record in layer::entries(folder)? {
            let Record { mut entry, end } = record?;
            let path = std::mem::take(&mut entry.path);
            self.add(number, &path, entry, end).map_err(|problem| refused(&path, problem))?;
        }
        Ok(())
    }

    /// A file.
    pub fn inode(&self, id: Id) -> Option<&Inode> {
        self.inodes.get(id as usize)
    }

    /// Greatest number of a file, and one more.
    pub fn numbers(&self) -> usize {
        self.inodes.len()
    }

    fn children(&mut self, id: Id) -> Option<&mut BTreeMap<Box<[u8]>, Id>> {
        match self.inodes.get_mut(id as usize).map(|inode| &mut inode.body) {
            Some(Body::Directory(children)) => Some(children),
            _ => None,
        }
    }

    fn child(&self, id: Id, name: &[u8]) -> Option<Id> {
        match &self.inode(id)?.body {
            Body::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn spend(&mut self, bytes: usize) -> Result<(), Problem> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.bytes { Err(Problem::Memory) } else { Ok(()) }
    }

    fn step(&mut self) -> Result<(), Problem> {
        self.steps += 1;
        match self.limits.steps {
            most if self.steps > most => {
                Err(format!("with it the paths of the image have more than {most} steps").into())
            }
            _ => Ok(()),
        }
    }

    /// A new file, which has no name yet.
    fn push(&mut self, inode: Inode) -> Result<Id, Problem> {
        self.spend(inode.cost())?;
        if let Some(id) = self.free.pop()
            && let Some(place) = self.inodes.get_mut(id as usize)
        {
            *place = inode;
            return Ok(id);
        }
        let id = Id::try_from(self.inodes.len()).map_err(|_| "too many files".to_owned())?;
        self.inodes.push(inode);
        Ok(id)
    }

    /// Takes a name from a file, and what has none then is forgotten, a directory with all in it.
    fn release(&mut self, id: Id) {
        let mut left = vec![id];
        while let Some(id) = left.pop() {
            let Some(inode) = self.inodes.get_mut(id as usize) else { continue };
            inode.names = inode.names.saturating_sub(1);
            if inode.names > 0 {
                continue;
            }
            let gone = std::mem::replace(inode, Inode { body: Body::Fifo, ..directory(0) });
            self.bytes = self.bytes.saturating_sub(gone.cost());
            self.free.push(id);
            if let Body::Directory(children) = gone.body {
                for (name, child) in children {
                    self.bytes = self.bytes.saturating_sub(NAME_COST + name.len());
                    left.push(child);
                }
            }
        }
    }

    /// Takes the file of that name out of a directory.
    fn unlink(&mut self, parent: Id, name: &[u8]) {
        if let Some(id) = self.children(parent).and_then(|children| children.remove(name)) {
            self.bytes = self.bytes.saturating_sub(NAME_COST + name.len());
            self.release(id);
        }
    }

    /// Walks to a path, following links within the root. With `make`, directories that are missing
    /// are made on the way.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<Id>, Problem> {
        let mut stack = vec![ROOT];
        let mut left = path.to_vec();
        let (mut from, mut links) = (0, 0);
        while from < left.len() {
            self.step()?;
            let rest = left.get(from..).unwrap_or_default();
            let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            let part = rest.get(..end).unwrap_or_default();
            from += end + 1;
            let at = stack.last().copied().unwrap_or(ROOT);
            match part {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let next = match self.child(at, part) {
                Some(next) => next,
                None if make => self.make(at, part, path)?,
                None => return Ok(None),
            };
            if let Some(Inode { body: Body::Symlink(target), .. }) = self.inode(next) {
                if !self.replaced.is_empty() && self.replaced.contains(&(at, part.into())) {
                    return Ok(None);
                }
                links += 1;
                if links > MAX_LINKS {
                    let path = shown(path);
                    return Err(format!("more than {MAX_LINKS} symbolic links in {path:?}").into());
                }
                if target.starts_with(b"/") {
                    stack.truncate(1);
                }
                left = [target, b"/".as_slice(), left.get(from..).unwrap_or_default()].concat();
                from = 0;
                if left.len() > MAX_WALK {
                    return Err(format!("symbolic links without end in {:?}", shown(path)).into());
                }
            } else {
                stack.push(next);
            }
        }
        Ok(stack.last().copied())
    }

    /// Makes a directory that no layer has an entry for.
    fn make(&mut self, parent: Id, name: &[u8], path: &[u8]) -> Result<Id, Problem> {
        if self.children(parent).is_none() {
            return Err(format!("{:?} is not a directory", shown(path)).into());
        }
        let id = self.push(directory(0o755))?;
        self.put(parent, name, id)?;
        Ok(id)
    }

    fn remove(&mut self, entry: &Entry) -> Result<(), Problem> {
        match entry.node {
            Node::Whiteout => {
                let (parent, name) = split(&entry.path);
                if let Some(parent) = self.walk(parent, false)? {
                    self.unlink(parent, name);
                }
            }
            Node::Directory => {
                let (parent, name) = split(&entry.path);
                if let Some(parent) = self.walk(parent, false)?
                    && let Some(below) = self.child(parent, name)
                    && self.inode(below).is_some_and(|inode| matches!(inode.body, Body::Symlink(_)))
                    && self.replaced.insert((parent, name.into()))
                {
                    self.spend(NAME_COST + name.len())?;
                }
            }
            Node::Opaque => {
                let directory = self.walk(&entry.path, false)?;
                let children = directory.and_then(|id| self.children(id)).map(std::mem::take);
                for (name, id) in children.unwrap_or_default() {
                    self.bytes = self.bytes.saturating_sub(NAME_COST + name.len());
                    self.release(id);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, layer: usize, path: &[u8], entry: Entry, end: u64) -> Result<(), Problem> {
        let Entry { meta, node, .. } = entry;
        if path.is_empty() {
            return match node {
                Node::Directory => self.set_meta(ROOT, meta),
                _ => Ok(()),
            };
        }
        let (parent, name) = split(path);
        let body = match node {
            Node::Whiteout | Node::Opaque => return Ok(()),
            Node::Directory => Body::Directory(BTreeMap::new()),
            Node::Regular(content) => Body::Regular(data(layer, content, end)),
            Node::Symlink(target) => Body::Symlink(target.into()),
            Node::Char(major, minor) => Body::Char(major, minor),
            Node::Block(major, minor) => Body::Block(major, minor),
            Node::Fifo => Body::Fifo,
            Node::HardLink(target) => return self.link(parent, name, &target),
        };
        let parent = self.parent(parent)?;
        if let Some(existing) = self.child(parent, name)
            && matches!(body, Body::Directory(_))
            && self.inode(existing).is_some_and(Inode::is_directory)
        {
            return self.set_meta(existing, meta);
        }
        let id = self.push(Inode { meta, body, names: 0 })?;
        self.put(parent, name, id)
    }

    fn set_meta(&mut self, id: Id, meta: Meta) -> Result<(), Problem> {
        let Some(inode) = self.inodes.get_mut(id as usize) else { return Ok(()) };
        let (before, after) = (xattrs_cost(&inode.meta), xattrs_cost(&meta));
        inode.meta = meta;
        self.bytes = self.bytes.saturating_sub(before);
        self.spend(after)
    }

    fn link(&mut self, parent: &[u8], name: &[u8], target: &[u8]) -> Result<(), Problem> {
        let (target_parent, target_name) = split(target);
        let found = self.walk(target_parent, false)?;
        let found = found.and_then(|parent| self.child(parent, target_name));
        let found = found.ok_or_else(|| {
            format!(
                "a hard link to {:?}, which neither this layer nor one below has",
                shown(target)
            )
        })?;
        if self.inode(found).is_some_and(Inode::is_directory) {
            return Err(format!("a hard link to the directory {:?}", shown(target)).into());
        }
        let parent = self.parent(parent)?;
        self.put(parent, name, found)
    }

    fn parent(&mut self, path: &[u8]) -> Result<Id, Problem> {
        let id = self.walk(path, true)?.unwrap_or(ROOT);
        match self.children(id) {
            Some(_) => Ok(id),
            None => Err(format!("{:?} is not a directory", shown(path)).into()),
        }
    }

    /// Gives a file this name, in place of what had it.
    fn put(&mut self, parent: Id, name: &[u8], id: Id) -> Result<(), Problem> {
        self.spend(NAME_COST + name.len())?;
        // Before the old one is released: it may be the same.
        if let Some(inode) = self.inodes.get_mut(id as usize) {
            inode.names += 1;
        }
        self.unlink(parent, name);
        if let Some(children) = self.children(parent) {
            children.insert(name.into(), id);
        }
        Ok(())
    }

    /// The file of a path, links followed; `None` if there is none.
    pub fn find(&mut self, path: &[u8]) -> Option<&Inode> {
        let id = self.walk(path, false).ok().flatten()?;
        self.inode(id)
    }
}

fn data(layer: usize, content: Content, tail_end: u64) -> Data {
    let Content { size, start, chunks, tail } = content;
    let tail = u16::try_from(tail.len()).unwrap_or(u16::MAX);
    Data { layer, size, start, chunks: chunks.into(), tail, tail_end }
}

/// Whether a tree with a greater limit of memory might not have failed so.
pub fn is_memory(error: &LayerError) -> bool {
    match error {
        LayerError::Layer { source, .. } => is_memory(source),
        LayerError::Memory { .. } => true,
        _ => false,
    }
}
