//! A tar stream's entries as a layer's: cleaned paths, and whiteouts by their names (OCI image specification,
//! `layer.md`).

use std::io::Read;

use super::{Archive, Kind};
use crate::layer::{
    Content, Entry, LayerError, Meta, Node, Source, WHITEOUT, clean, entry_error, split,
};

impl<R: Read> Source for Archive<R> {
    fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        while let Some(header) = self.next_header()? {
            let path = clean(&header.path).map_err(|problem| entry_error(&header.path, problem))?;
            let (parent, name) = split(&path);
            let below = |name: &[u8]| match parent {
                b"" => name.to_vec(),
                parent => [parent, b"/", name].concat(),
            };
            let (path, node) = match name.strip_prefix(WHITEOUT) {
                Some(b".wh..opq") => (parent.to_vec(), Node::Opaque),
                // Other names of aufs's own, of no meaning.
                Some(rest) if rest.starts_with(WHITEOUT) => continue,
                Some(b"" | b"." | b"..") => {
                    return Err(entry_error(&path, "a whiteout of no file"));
                }
                Some(removed) => (below(removed), Node::Whiteout),
                None => match header.kind {
                    Kind::Directory => (path, Node::Directory),
                    _ if path.is_empty() => return Err(entry_error(b"/", "it is not a directory")),
                    Kind::Regular => (path, Node::Regular(Content::sized(header.size))),
                    Kind::HardLink(target) => {
                        let target =
                            clean(&target).map_err(|problem| entry_error(&path, problem))?;
                        (path, Node::HardLink(target))
                    }
                    Kind::Symlink(target) => (path, Node::Symlink(target)),
                    Kind::Char(major, minor) => (path, Node::Char(major, minor)),
                    Kind::Block(major, minor) => (path, Node::Block(major, minor)),
                    Kind::Fifo => (path, Node::Fifo),
                },
            };
            let meta = Meta {
                mode: header.mode,
                uid: header.uid,
                gid: header.gid,
                mtime: header.mtime,
                xattrs: header.xattrs,
            };
            return Ok(Some(Entry { path, meta, node }));
        }
        Ok(None)
    }

    fn skip_hole(&mut self, length: u64) -> bool {
        self.pass_hole(length)
    }
}
