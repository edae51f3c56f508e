//! Reads a layer's tar stream: ustar, pax (POSIX.1-2001) and the GNU extensions for long names,
//! large numbers and sparse files, which is what image builders write.
//!
//! The stream is an attacker's: every length is checked before anything is made of it, and errors
//! name the entry. Content is handed out as a reader, never held.

mod entries;
mod header;

use std::io::{self, Read};

use self::header::{Extended, Raw, decimal};

const BLOCK: usize = 512;
/// Longest path or link target; Linux takes no longer ones (PATH_MAX).
const MAX_NAME: u64 = 4096;
/// Most bytes of one extended header: names, times and extended attributes of one file.
const MAX_HEADER: u64 = 1 << 20;
/// Most segments of a sparse file.
const MAX_SEGMENTS: usize = 1 << 16;

/// Why a stream is not a layer.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream ended or failed.
    #[error("after entry {after:?}: {source}")]
    Read {
        /// The last entry seen.
        after: String,
        /// What happened.
        source: io::Error,
    },
    /// It is something else from its beginning.
    #[error("this is no tar stream, nor one compressed by gzip or zstd")]
    Other,
    /// A header that cannot be right.
    #[error("entry {entry:?}: {problem}")]
    Entry {
        /// Its name as far as known.
        entry: String,
        /// What is wrong.
        problem: String,
    },
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file with content.
    Regular,
    /// Another name of the file of this path.
    HardLink(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A character device.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// As written, not yet cleaned.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes with their full names.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Size of the content as a reader sees it.
    pub size: u64,
}

/// A stream of entries.
#[derive(Debug)]
pub struct Archive<R> {
    input: R,
    /// Bytes of the current entry's content and padding not yet read.
    left: u64,
    padding: u64,
    /// Parts of a sparse file with content: offset and length; the last ends the file.
    sparse: Option<Sparse>,
    after: String,
    begun: bool,
}

#[derive(Debug, Default)]
struct Sparse {
    segments: std::collections::VecDeque<(u64, u64)>,
    position: u64,
    size: u64,
}

impl Sparse {
    /// Forgets the parts that have been read.
    fn pass(&mut self) {
        while self.segments.front().is_some_and(|(start, len)| self.position >= start + len) {
            self.segments.pop_front();
        }
    }
}

/// Text of a path for people.
pub fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn bad(entry: &[u8], problem: impl Into<String>) -> TarError {
    TarError::Entry { entry: shown(entry), problem: problem.into() }
}

impl<R: Read> Archive<R> {
    /// Reads from `input`.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, sparse: None, after: String::new(), begun: false }
    }

    fn failed(&self, source: io::Error) -> TarError {
        TarError::Read { after: self.after.clone(), source }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let Some(rest) = block.get_mut(filled..) else { break };
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(Some(block))
    }

    /// Skips what is left of the current entry.
    fn skip(&mut self) -> Result<(), TarError> {
        let skip = self.left + self.padding;
        let copied = io::copy(&mut (&mut self.input).take(skip), &mut io::sink());
        let copied = copied.map_err(|error| self.failed(error))?;
        if copied < skip {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        (self.left, self.padding, self.sparse) = (0, 0, None);
        Ok(())
    }

    /// The next entry; its content is what [`Read`] then gives.
    ///
    /// # Errors
    /// The stream ends amidst an entry, or a header contradicts itself.
    fn next_header(&mut self) -> Result<Option<Header>, TarError> {
        self.skip()?;
        let mut extended = Extended::default();
        loop {
            let first = !std::mem::replace(&mut self.begun, true);
            // A missing end mark is common; a stream that ends amidst a block is cut.
            let block = match self.block() {
                Ok(Some(block)) => block,
                Ok(None) => return Ok(None),
                Err(TarError::Read { source, .. })
                    if first && source.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    return Err(TarError::Other);
                }
                Err(error) => return Err(error),
            };
            if is_zero(&block) {
                // The mark is two such blocks, of which the second may be missing.
                return match self.block()? {
                    Some(next) if !is_zero(&next) => {
                        Err(bad(self.after.as_bytes(), "after it is one block of zeros, and more"))
                    }
                    _ => Ok(None),
                };
            }
            let raw = Raw(&block);
            raw.check().map_err(|error| if first { TarError::Other } else { error })?;
            let size = raw.number(124, 12, "size")?;
            match raw.kind() {
                b'x' => extended.pax(&self.content(raw.name(), size, MAX_HEADER)?, &raw.name())?,
                // For all that follow: comments in practice (git's commit id).
                b'g' => drop(self.content(raw.name(), size, MAX_HEADER)?),
                b'L' => extended.path = Some(self.long_name(raw.name(), size)?),
                b'K' => extended.link = Some(self.long_name(raw.name(), size)?),
                _ => return self.entry(&raw, size, extended).map(Some),
            }
        }
    }

    fn long_name(&mut self, entry: Vec<u8>, size: u64) -> Result<Vec<u8>, TarError> {
        let mut name = self.content(entry, size, MAX_NAME + 1)?;
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        Ok(name)
    }

    fn content(&mut self, entry: Vec<u8>, size: u64, most: u64) -> Result<Vec<u8>, TarError> {
        if size > most {
            let problem = format!("its extended header has {size} bytes, more than {most}");
            return Err(bad(&entry, problem));
        }
        (self.left, self.padding) = (size, padding(size).unwrap_or(0));
        let mut content = Vec::new();
        let read = (&mut self.input).take(size).read_to_end(&mut content);
        let read = read.map_err(|error| self.failed(error))?;
        if (read as u64) < size {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        self.left = 0;
        self.skip()?;
        Ok(content)
    }

    fn entry(
        &mut self,
        raw: &Raw<'_>,
        size: u64,
        mut extended: Extended,
    ) -> Result<Header, TarError> {
        let named = extended.path.take().unwrap_or_else(|| raw.name());
        let path = extended.sparse.name.take().unwrap_or(named);
        let stored = extended.size.unwrap_or(size);
        let padding =
            padding(stored).ok_or_else(|| bad(&path, format!("a size of {stored} bytes")))?;
        let link = extended.link.take().unwrap_or_else(|| raw.text(157, 100));
        if [path.len(), link.len()].iter().any(|length| *length as u64 > MAX_NAME) {
            return Err(bad(&path, format!("a name of more than {MAX_NAME} bytes")));
        }
        if path.contains(&0) || link.contains(&0) {
            return Err(bad(&path, "a name with a NUL byte"));
        }
        let device = || -> Result<(u32, u32), TarError> {
            let number = |at, what| {
                let value = raw.number(at, 8, what)?;
                u32::try_from(value).map_err(|_| bad(&path, format!("{what} {value}")))
            };
            Ok((number(329, "major number")?, number(337, "minor number")?))
        };
        let kind = match raw.kind() {
            // Old archives mark directories by the slash only.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => device().map(|(major, minor)| Kind::Char(major, minor))?,
            b'4' => device().map(|(major, minor)| Kind::Block(major, minor))?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(bad(&path, format!("unknown type {:?}", char::from(other))));
            }
        };
        self.after = shown(&path);
        let content = matches!(kind, Kind::Regular);
        // pax(1): only files have a content; the size of another entry is advice, and nothing follows it.
        (self.left, self.padding) = if content { (stored, padding) } else { (0, 0) };
        let mut visible = if content { stored } else { 0 };
        if raw.kind() == b'S' {
            visible = raw.number(483, 12, "real size")?;
            let segments = self.old_sparse(raw, &path)?;
            self.begin_sparse(&path, segments, visible)?;
        } else if let (true, Some(real)) = (content, extended.sparse.size) {
            visible = real;
            let map = match extended.sparse.major {
                Some(1) => self.sparse_map(&path)?,
                _ => std::mem::take(&mut extended.sparse.map),
            };
            let pairs = map.chunks_exact(2).map(|pair| match pair {
                [offset, length] => (*offset, *length),
                _ => (0, 0),
            });
            self.begin_sparse(&path, pairs.collect(), real)?;
        }
        let id = |given: Option<u32>, at, what| match given {
            Some(id) => Ok(id),
            None => {
                let value = raw.number(at, 8, what)?;
                u32::try_from(value).map_err(|_| bad(&path, format!("{what} {value}")))
            }
        };
        let mtime = match extended.mtime {
            Some(time) => time,
            None => (raw.signed(136, 12, "mtime")?, 0),
        };
        Ok(Header {
            kind,
            mode: u16::try_from(raw.number(100, 8, "mode")? & 0o7777).unwrap_or(0),
            uid: id(extended.uid, 108, "uid")?,
            gid: id(extended.gid, 116, "gid")?,
            mtime,
            xattrs: extended.xattrs,
            size: visible,
            path,
        })
    }

    /// The map of GNU's own format: four segments in the header, more in blocks that follow.
    fn old_sparse(&mut self, raw: &Raw<'_>, path: &[u8]) -> Result<Vec<(u64, u64)>, TarError> {
        let mut segments = Vec::new();
        let read = |raw: &Raw<'_>, at: usize, count, segments: &mut Vec<(u64, u64)>| {
            for index in 0..count {
                let at = at + index * 24;
                if raw.0.get(at).is_none_or(|first| *first == 0) {
                    break;
                }
                let offset = raw.number(at, 12, "sparse offset")?;
                segments.push((offset, raw.number(at + 12, 12, "sparse length")?));
            }
            Ok::<_, TarError>(())
        };
        read(raw, 386, 4, &mut segments)?;
        let mut more = raw.0.get(482).is_some_and(|flag| *flag != 0);
        while more {
            if segments.len() > MAX_SEGMENTS {
                return Err(bad(path, format!("more than {MAX_SEGMENTS} sparse segments")));
            }
            let next = self.block()?;
            let next = next.ok_or_else(|| self.failed(io::ErrorKind::UnexpectedEof.into()))?;
            read(&Raw(&next), 0, 21, &mut segments)?;
            more = next.get(504).is_some_and(|flag| *flag != 0);
        }
        Ok(segments)
    }

    /// The map of pax format 1.0: decimal numbers, a line each, before the content.
    fn sparse_map(&mut self, path: &[u8]) -> Result<Vec<u64>, TarError> {
        let mut numbers = Vec::new();
        let mut expected = None;
        let mut digits = Vec::new();
        loop {
            if self.left < BLOCK as u64 {
                return Err(bad(path, "its sparse map is cut off"));
            }
            let block = self.block()?;
            let block = block.ok_or_else(|| self.failed(io::ErrorKind::UnexpectedEof.into()))?;
            self.left -= BLOCK as u64;
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > 20 {
                        return Err(bad(path, "its sparse map is not one"));
                    }
                    continue;
                }
                let number = decimal(&digits).ok_or_else(|| bad(path, "a bad sparse map"))?;
                digits.clear();
                match expected {
                    None if number > MAX_SEGMENTS as u64 => {
                        return Err(bad(path, format!("{number} sparse segments")));
                    }
                    None => expected = Some(number * 2),
                    Some(_) => numbers.push(number),
                }
                if expected.is_some_and(|expected| numbers.len() as u64 >= expected) {
                    return Ok(numbers);
                }
            }
        }
    }

    fn begin_sparse(
        &mut self,
        path: &[u8],
        segments: Vec<(u64, u64)>,
        size: u64,
    ) -> Result<(), TarError> {
        let (mut end, mut stored) = (0_u64, 0_u64);
        for (offset, length) in &segments {
            let next = offset.checked_add(*length).filter(|next| *next <= size && *offset >= end);
            end = next.ok_or_else(|| {
                bad(path, format!("sparse segment {offset}+{length} of a file of {size} bytes"))
            })?;
            stored += length;
        }
        if stored != self.left {
            let left = self.left;
            return Err(bad(path, format!("{left} bytes for sparse segments of {stored}")));
        }
        self.sparse = Some(Sparse { segments: segments.into(), position: 0, size });
        Ok(())
    }

    /// Skips the next bytes of the content if all of them are in a hole: nothing need be read to know
    /// that they are zeros.
    fn pass_hole(&mut self, bytes: u64) -> bool {
        let Some(sparse) = &mut self.sparse else { return false };
        sparse.pass();
        let until = sparse.segments.front().map_or(sparse.size, |(start, _)| *start);
        let hole = until.checked_sub(sparse.position).is_some_and(|hole| hole >= bytes);
        if hole {
            sparse.position += bytes;
        }
        hole
    }

    fn read_stored(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most) else { return Ok(0) };
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.input.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

impl<R: Read> Read for Archive<R> {
    /// The current entry's content, with the holes of a sparse file as zeros.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(sparse) = &mut self.sparse else { return self.read_stored(buffer) };
        sparse.pass();
        let (start, end) =
            sparse.segments.front().map_or((sparse.size, sparse.size), |(s, l)| (*s, s + l));
        let position = sparse.position;
        let upto = if position < start { start } else { end };
        let most = usize::try_from(upto - position).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = buffer.get_mut(..most).unwrap_or_default();
        let count = if position < start {
            buffer.fill(0);
            most
        } else {
            self.read_stored(buffer)?
        };
        if let Some(sparse) = &mut self.sparse {
            sparse.position += count as u64;
        }
        Ok(count)
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Bytes after a content of this size; none if both together are more than can be counted.
fn padding(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(BLOCK as u64).map(|end| end - size)
}
