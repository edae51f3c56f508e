//! What headers say: the block of each entry, and pax records before it.

use super::{BLOCK, MAX_HEADER, MAX_SEGMENTS, TarError, bad, shown};

/// Most extended attributes of one file.
const MAX_XATTRS: usize = 1024;

/// What extended headers said of the next entry.
#[derive(Debug, Default)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// GNU's sparse files in pax headers, versions 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) major: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) map: Vec<u64>,
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `1700000000.123456789`, possibly negative.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let nanos = format!("{fraction:0<9}");
    let nanos: u32 = nanos.get(..9)?.parse().ok()?;
    let whole: i64 = seconds.parse().ok()?;
    match nanos {
        0 => Some((whole, 0)),
        nanos if seconds.starts_with('-') => Some((whole.checked_sub(1)?, 1_000_000_000 - nanos)),
        nanos => Some((whole, nanos)),
    }
}

impl Extended {
    /// Records are `LENGTH KEY=VALUE\n`, LENGTH counting itself; values are bytes.
    pub(super) fn pax(&mut self, mut data: &[u8], entry: &[u8]) -> Result<(), TarError> {
        let wrong = || bad(entry, "a pax header with a bad record");
        while !data.is_empty() {
            let space = data.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let length = data.get(..space).and_then(decimal).ok_or_else(wrong)?;
            let length = usize::try_from(length).map_err(|_| wrong())?;
            let record = data.get(space + 1..length).ok_or_else(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = record.split_at(equals);
            let value = value.get(1..).unwrap_or_default();
            self.record(key, value).ok_or_else(|| {
                bad(entry, format!("pax record {} of {:?}", shown(key), shown(value)))
            })?;
            data = data.get(length..).unwrap_or_default();
        }
        // One header is bounded; of an entry there may be many.
        let bytes: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        match bytes as u64 > MAX_HEADER {
            true => Err(bad(entry, format!("extended attributes of {bytes} bytes"))),
            false => Ok(()),
        }
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let id = || u32::try_from(decimal(value)?).ok();
        match key {
            // Without a value a record takes back what was said: the header's own field holds.
            b"path" if value.is_empty() => self.path = None,
            b"linkpath" if value.is_empty() => self.link = None,
            b"size" if value.is_empty() => self.size = None,
            b"uid" if value.is_empty() => self.uid = None,
            b"gid" if value.is_empty() => self.gid = None,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(id()?),
            b"gid" => self.gid = Some(id()?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = Some(decimal(value)?);
            }
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                self.sparse.map.push(decimal(value)?);
            }
            b"GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').map(decimal);
                self.sparse.map = numbers.collect::<Option<_>>()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    // Looked through for each: so many would take long.
                    if self.xattrs.len() == MAX_XATTRS {
                        return None;
                    }
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        (self.sparse.map.len() <= 2 * MAX_SEGMENTS).then_some(())
    }
}

/// A header block.
pub(super) struct Raw<'a>(pub(super) &'a [u8; BLOCK]);

impl Raw<'_> {
    fn field(&self, at: usize, length: usize) -> &[u8] {
        self.0.get(at..at + length).unwrap_or_default()
    }

    pub(super) fn text(&self, at: usize, length: usize) -> Vec<u8> {
        let field = self.field(at, length);
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        field.get(..end).unwrap_or_default().to_vec()
    }

    pub(super) fn kind(&self) -> u8 {
        self.0.get(156).copied().unwrap_or(0)
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        // Only POSIX's own format has a prefix there.
        let prefix = match self.field(257, 6) {
            b"ustar\0" => self.text(345, 155),
            _ => Vec::new(),
        };
        if prefix.is_empty() { name } else { [prefix.as_slice(), b"/", &name].concat() }
    }

    pub(super) fn check(&self) -> Result<(), TarError> {
        let stored = self.number(148, 8, "checksum")?;
        let bytes = self.0.iter().enumerate().map(|(at, byte)| match at {
            148..156 => b' ',
            _ => *byte,
        });
        let sum: u64 = bytes.clone().map(u64::from).sum();
        // Some writers take bytes for signed.
        let signed: i64 = bytes.map(|byte| i64::from(byte.cast_signed())).sum();
        match stored == sum || u64::try_from(signed) == Ok(stored) {
            true => Ok(()),
            false => Err(bad(&self.name(), "its header's checksum is wrong")),
        }
    }

    pub(super) fn number(&self, at: usize, length: usize, what: &str) -> Result<u64, TarError> {
        let value = self.signed(at, length, what)?;
        u64::try_from(value).map_err(|_| bad(&self.name(), format!("{what} {value}")))
    }

    /// Octal digits, or GNU's base 256 if the first bit is set.
    pub(super) fn signed(&self, at: usize, length: usize, what: &str) -> Result<i64, TarError> {
        let field = self.field(at, length);
        let wrong = || bad(&self.name(), format!("{what} {:?}", shown(field)));
        if let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) {
            let negative = first & 0x40 != 0;
            let mut value =
                if negative { i64::from(*first) - 0x100 } else { i64::from(first & 0x7f) };
            for byte in rest {
                value = value.checked_mul(256).ok_or_else(wrong)? + i64::from(*byte);
            }
            return Ok(value);
        }
        let mut value = 0_i64;
        let digits = field.iter().skip_while(|byte| **byte == b' ');
        for byte in digits.take_while(|byte| !matches!(**byte, 0 | b' ')) {
            match byte {
                b'0'..=b'7' => value = (value << 3) | i64::from(byte - b'0'),
                _ => return Err(wrong()),
            }
        }
        Ok(value)
    }
}
