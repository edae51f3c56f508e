//! Layers laid on top of each other: the files that a container sees, without a file system doing it.
//!
//! Semantics are those of unpacking one tar after the other (OCI image specification, `layer.md`, and
//! containerd's `archive` package): whiteouts first, later entries replace earlier ones, directories
//! keep what is in them, and links on the way to an entry are followed within the root.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use crate::layer::{self, Content, Entry, LayerError, Meta, Node, split};
use crate::tar::shown;

/// Most links that a path may go through (Linux: 40).
const MAX_LINKS: usize = 40;

/// Number of a file in its tree.
pub type Id = u32;
/// The root directory.
pub const ROOT: Id = 0;

/// What a file is.
#[derive(Debug)]
pub enum Body {
    /// A directory: its files by name.
    Directory(BTreeMap<Box<[u8]>, Id>),
    /// A file whose bytes are in this layer.
    Regular(usize, Content),
    /// A symbolic link.
    Symlink(Vec<u8>),
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
}

/// Merged layers.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
}

fn directory(mode: u16) -> Inode {
    let meta = Meta { mode, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
    Inode { meta, body: Body::Directory(BTreeMap::new()) }
}

impl Default for Tree {
    fn default() -> Self {
        Self { inodes: vec![directory(0o755)] }
    }
}

impl Tree {
    /// The layers in these folders, lowest first.
    ///
    /// # Errors
    /// An entry that cannot be placed, by its name.
    pub fn of_layers<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<Self, LayerError> {
        let mut tree = Self::default();
        for (number, folder) in folders.into_iter().enumerate() {
            // What a layer removes is only what was there before it.
            if number > 0 {
                for entry in layer::entries(folder)? {
                    let entry = entry?;
                    tree.remove(&entry).map_err(|problem| refused(&entry, problem))?;
                }
            }
            for entry in layer::entries(folder)? {
                let entry = entry?;
                let shown = entry.path.clone();
                tree.add(number, entry).map_err(|problem| LayerError::Entry {
                    entry: crate::tar::shown(&shown),
                    problem,
                })?;
            }
        }
        Ok(tree)
    }

    /// A file.
    pub fn inode(&self, id: Id) -> Option<&Inode> {
        self.inodes.get(id as usize)
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

    fn push(&mut self, inode: Inode) -> Result<Id, String> {
        let id = Id::try_from(self.inodes.len()).map_err(|_| "too many files".to_owned())?;
        self.inodes.push(inode);
        Ok(id)
    }

    /// Walks to a path, following links within the root. With `make`, directories that are missing
    /// are made on the way.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<Id>, String> {
        let mut stack = vec![ROOT];
        let parts = |path: &[u8]| -> VecDeque<Vec<u8>> {
            path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect()
        };
        let mut left = parts(path);
        let mut links = 0;
        while let Some(part) = left.pop_front() {
            let at = stack.last().copied().unwrap_or(ROOT);
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let next = match self.child(at, &part) {
                Some(next) => next,
                None if make => {
                    let next = self.push(directory(0o755))?;
                    let children = self
                        .children(at)
                        .ok_or_else(|| format!("{:?} is not a directory", shown(path)))?;
                    children.insert(part.into(), next);
                    next
                }
                None => return Ok(None),
            };
            if let Some(Inode { body: Body::Symlink(target), .. }) = self.inode(next) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(format!(
                        "more than {MAX_LINKS} symbolic links in {:?}",
                        shown(path)
                    ));
                }
                if target.starts_with(b"/") {
                    stack.truncate(1);
                }
                for part in parts(target).into_iter().rev() {
                    left.push_front(part);
                }
                if left.len() > 8192 {
                    return Err(format!("symbolic links without end in {:?}", shown(path)));
                }
            } else {
                stack.push(next);
            }
        }
        Ok(stack.last().copied())
    }

    fn remove(&mut self, entry: &Entry) -> Result<(), String> {
        match entry.node {
            Node::Whiteout => {
                let (parent, name) = split(&entry.path);
                let parent = self.walk(parent, false)?;
                if let Some(children) = parent.and_then(|parent| self.children(parent)) {
                    children.remove(name);
                }
            }
            Node::Opaque => {
                let directory = self.walk(&entry.path, false)?;
                if let Some(children) = directory.and_then(|id| self.children(id)) {
                    children.clear();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, layer: usize, entry: Entry) -> Result<(), String> {
        let Entry { path, meta, node } = entry;
        if path.is_empty() {
            if let (Node::Directory, Some(root)) = (node, self.inodes.first_mut()) {
                root.meta = meta;
            }
            return Ok(());
        }
        let (parent, name) = split(&path);
        let body = match node {
            Node::Whiteout | Node::Opaque => return Ok(()),
            Node::Directory => Body::Directory(BTreeMap::new()),
            Node::Regular(content) => Body::Regular(layer, content),
            Node::Symlink(target) => Body::Symlink(target),
            Node::Char(major, minor) => Body::Char(major, minor),
            Node::Block(major, minor) => Body::Block(major, minor),
            Node::Fifo => Body::Fifo,
            Node::HardLink(target) => return self.link(parent, name, &target),
        };
        let parent_id = self.parent(parent)?;
        if let Some(existing) = self.child(parent_id, name)
            && matches!(body, Body::Directory(_))
            && let Some(inode) = self.inodes.get_mut(existing as usize)
            && matches!(inode.body, Body::Directory(_))
        {
            inode.meta = meta;
            return Ok(());
        }
        let id = self.push(Inode { meta, body })?;
        self.put(parent_id, name, id);
        Ok(())
    }

    fn link(&mut self, parent: &[u8], name: &[u8], target: &[u8]) -> Result<(), String> {
        let (target_parent, target_name) = split(target);
        let found = self.walk(target_parent, false)?;
        let found = found.and_then(|parent| self.child(parent, target_name));
        let found = found.ok_or_else(|| {
            format!(
                "a hard link to {:?}, which neither this layer nor one below has",
                shown(target)
            )
        })?;
        if self.inode(found).is_some_and(|inode| matches!(inode.body, Body::Directory(_))) {
            return Err(format!("a hard link to the directory {:?}", shown(target)));
        }
        let parent = self.parent(parent)?;
        self.put(parent, name, found);
        Ok(())
    }

    fn parent(&mut self, path: &[u8]) -> Result<Id, String> {
        let id = self.walk(path, true)?.unwrap_or(ROOT);
        match self.children(id) {
            Some(_) => Ok(id),
            None => Err(format!("{:?} is not a directory", shown(path))),
        }
    }

    fn put(&mut self, parent: Id, name: &[u8], id: Id) {
        if let Some(children) = self.children(parent) {
            children.insert(name.into(), id);
        }
    }

    /// The file of a path, links followed; `None` if there is none.
    pub fn find(&mut self, path: &[u8]) -> Option<&Inode> {
        let id = self.walk(path, false).ok().flatten()?;
        self.inode(id)
    }
}

fn refused(entry: &Entry, problem: String) -> LayerError {
    LayerError::Entry { entry: shown(&entry.path), problem }
}
