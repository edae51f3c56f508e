//! A directory of the host as a layer: what overlayfs keeps as one, or any other.
//!
//! In overlayfs's layers a character device 0:0 is a whiteout, and `trusted.overlay.opaque` hides what lower
//! layers have in a directory (kernel, `Documentation/filesystems/overlayfs.rst`). Names are in order, so the
//! same directory makes the same layer. Links are never followed.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use nix::unistd::{Whence, lseek};

use crate::layer::{Content, Entry, LayerError, Meta, Node, Source, clean, entry_error, io_error};

/// overlayfs's own attributes.
const OVERLAY: &str = "trusted.overlay.";

/// A directory's entries, each directory before what is in it.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    /// Paths from the root that are still to come, the next one last.
    left: Vec<PathBuf>,
    /// An opaque directory that comes next.
    opaque: Option<Entry>,
    /// Paths of files that have several names.
    names: HashMap<(u64, u64), Vec<u8>>,
    /// Content of the last entry, and how much of it was read.
    content: Option<(File, u64)>,
}

impl Directory {
    /// Reads from `root`.
    ///
    /// # Errors
    /// It is no directory.
    pub fn open(root: &Path) -> Result<Self, LayerError> {
        let meta = fs::metadata(root).map_err(io_error("look at", root))?;
        if !meta.is_dir() {
            return Err(io_error("read", root)(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self {
            root: root.to_owned(),
            left: vec![PathBuf::new()],
            opaque: None,
            names: HashMap::new(),
            content: None,
        })
    }

    /// Queues what is in a directory.
    fn descend(&mut self, path: &Path) -> Result<(), LayerError> {
        let folder = self.root.join(path);
        let names = fs::read_dir(&folder).and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<Vec<_>>>()
        });
        let mut names: Vec<OsString> = names.map_err(io_error("read", &folder))?;
        names.sort_unstable_by(|a, b| b.cmp(a));
        self.left.extend(names.into_iter().map(|name| path.join(name)));
        Ok(())
    }

    fn node(&mut self, file: &Path, path: &[u8], meta: &Metadata) -> Result<Node, LayerError> {
        let kind = meta.file_type();
        let device = (major(meta.rdev()), minor(meta.rdev()));
        let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        if kind.is_dir() {
            return Ok(Node::Directory);
        }
        if kind.is_char_device() && device == (0, 0) {
            return Ok(Node::Whiteout);
        }
        if meta.nlink() > 1
            && let Some(first) = self.names.get(&(meta.dev(), meta.ino()))
        {
            return Ok(Node::HardLink(first.clone()));
        }
        self.names.extend((meta.nlink() > 1).then(|| ((meta.dev(), meta.ino()), path.to_vec())));
        if kind.is_file() {
            let options =
                fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(file);
            self.content = Some((options.map_err(io_error("open", file))?, 0));
            return Ok(Node::Regular(Content::sized(meta.len())));
        }
        if kind.is_symlink() {
            let target = fs::read_link(file).map_err(io_error("read", file))?;
            return Ok(Node::Symlink(target.into_os_string().into_vec()));
        }
        if kind.is_char_device() {
            return Ok(Node::Char(number(device.0), number(device.1)));
        }
        if kind.is_block_device() {
            return Ok(Node::Block(number(device.0), number(device.1)));
        }
        if kind.is_fifo() {
            return Ok(Node::Fifo);
        }
        Err(entry_error(path, "it is a socket, which no image can hold"))
    }
}

/// All extended attributes of a file, of a link's own.
fn attributes(file: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let names = match xattr::list(file) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let value = |name: OsString| {
        let value = xattr::get(file, &name).transpose()?;
        Some(value.map(|value| (name.into_vec(), value)))
    };
    names.filter_map(value).collect()
}

impl Source for Directory {
    fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        if let Some(opaque) = self.opaque.take() {
            return Ok(Some(opaque));
        }
        let Some(below) = self.left.pop() else { return Ok(None) };
        let named = below.as_os_str().as_bytes();
        let path = clean(named).map_err(|problem| entry_error(named, problem))?;
        let file = self.root.join(&below);
        self.content = None;
        let meta = file.symlink_metadata().map_err(io_error("look at", &file))?;
        let mut xattrs = attributes(&file).map_err(io_error("read the attributes of", &file))?;
        let mut opaque = false;
        for (name, value) in &xattrs {
            match OsStr::from_bytes(name).to_str().and_then(|name| name.strip_prefix(OVERLAY)) {
                Some("opaque") => opaque = value == b"y",
                Some(kind @ ("redirect" | "metacopy")) => {
                    let problem = format!(
                        "overlayfs has its content elsewhere ({OVERLAY}{kind}): \
                         use a snapshotter without redirect_dir and metacopy"
                    );
                    return Err(entry_error(&path, problem));
                }
                _ => {}
            }
        }
        xattrs.retain(|(name, _)| !name.starts_with(OVERLAY.as_bytes()));
        let node = self.node(&file, &path, &meta)?;
        if node == Node::Directory {
            self.descend(&below)?;
        }
        let meta = Meta {
            mode: u16::try_from(meta.mode() & 0o7777).unwrap_or(0),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
            xattrs,
        };
        if opaque {
            let (path, meta) = (path.clone(), meta.clone());
            self.opaque = Some(Entry { path, meta, node: Node::Opaque });
        }
        Ok(Some(Entry { path, meta, node }))
    }

    fn skip_hole(&mut self, length: u64) -> bool {
        let Some((file, position)) = &mut self.content else { return false };
        let Ok(begin) = i64::try_from(*position) else { return false };
        let next = match lseek(&*file, begin, Whence::SeekData) {
            Ok(next) => next.cast_unsigned(),
            // Nothing but a hole up to the end.
            Err(nix::Error::ENXIO) => u64::MAX,
            Err(_) => 0,
        };
        let end = *position + length;
        let hole = next >= end;
        let position = if hole { end } else { *position };
        let back = i64::try_from(position).ok().map(|at| lseek(&*file, at, Whence::SeekSet));
        // Where the place cannot be told, what is read next would be of another one.
        if !matches!(back, Some(Ok(_))) {
            self.content = None;
            return false;
        }
        self.content.iter_mut().for_each(|(_, at)| *at = position);
        hole
    }
}

impl Read for Directory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some((file, position)) = &mut self.content else { return Ok(0) };
        let count = file.read(buffer)?;
        *position += count as u64;
        Ok(count)
    }
}
