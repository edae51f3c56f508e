//! The memory of a stopped process: its mappings, and a file that their content is mapped from again.

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::script::{PAGE, Row};
use super::stopped::Stopped;

/// Memory is looked through in pieces of this size for what is worth keeping.
const PIECE: u64 = 64 << 10;
/// Nothing of it is kept of so many zeros in a row.
const HOLE: u64 = 256 << 10;
/// Room of the first thread's stack.
const STACK: u64 = 8 << 20;

/// One line of `/proc/PID/maps` (proc_pid_maps(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    protection: u64,
    shared: bool,
    inode: u64,
    name: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (permissions, inode) = (fields.next()?, fields.nth(2)?);
        let protection = permissions.chars().zip([
            ('r', libc::PROT_READ),
            ('w', libc::PROT_WRITE),
            ('x', libc::PROT_EXEC),
        ]);
        let protection = protection.filter(|(has, (means, _))| has == means);
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            protection: protection.fold(0, |all, (_, (_, bit))| all | bit as u64),
            shared: permissions.ends_with('s'),
            inode: inode.parse().ok()?,
            name: fields.next().unwrap_or_default().to_owned(),
        })
    }

    /// Whether the kernel made it, and has it in every process.
    pub(super) fn is_kernels(&self) -> bool {
        self.name.starts_with("[v")
    }

    /// Whether it is the code of the kernel that processes call.
    pub(super) fn is_vdso(&self) -> bool {
        self.name == "[vdso]"
    }

    /// Whether no process could have it elsewhere.
    pub(super) fn is_fixed(&self) -> bool {
        self.name == "[vsyscall]"
    }
}

/// Its mappings, by address.
pub(super) fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let parse = |line| {
        let unknown = || io::Error::other(format!("a mapping that is not understood: {line}"));
        Mapping::parse(line).ok_or_else(unknown)
    };
    maps.lines().map(parse).collect()
}

/// Copies the content of mappings into the file, from `offset` on; the calls that map it again from the
/// descriptor `source`, and where the copy ends.
pub(super) fn copy(
    process: &Stopped,
    mappings: &[Mapping],
    file: &File,
    mut offset: u64,
    source: u64,
) -> io::Result<(Vec<Row>, u64)> {
    let mut rows = Vec::new();
    let mut below = 0;
    for mapping in mappings {
        if mapping.shared {
            return Err(io::Error::other(format!("{} is shared memory", mapping.name)));
        }
        let stack = mapping.name == "[stack]";
        if stack {
            // It does not grow any more.
            let start = mapping.end.saturating_sub(STACK).max(below + PAGE).min(mapping.start);
            rows.push(anonymous(start, mapping.end, mapping.protection));
        }
        below = mapping.end;
        let parts = match mapping.protection {
            0 => vec![(mapping.start, mapping.end, false)],
            _ => parts(process, mapping, file, offset)?,
        };
        for (start, end, kept) in parts {
            let length = end - start;
            if !kept {
                rows.push(anonymous(start, end, mapping.protection));
                continue;
            }
            rows.push(if stack {
                // The kernel shows a process's arguments in memory that is no file's.
                Row::new(libc::SYS_pread64, &[source, start, length, offset], length)
            } else {
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
                let arguments = [start, length, mapping.protection, flags as u64, source, offset];
                Row::new(libc::SYS_mmap, &arguments, start)
            });
            offset += length;
        }
    }
    Ok((rows, offset))
}

fn anonymous(start: u64, end: u64, protection: u64) -> Row {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS;
    let arguments = [start, end - start, protection, flags as u64, u64::MAX, 0];
    Row::new(libc::SYS_mmap, &arguments, start)
}

/// Divides a mapping into what is kept in the file, which is copied to `offset` on, and what is zero. The
/// mapping of a file stays one, as the machine's memory is: there may be holes in the copy.
fn parts(
    process: &Stopped,
    mapping: &Mapping,
    file: &File,
    offset: u64,
) -> io::Result<Vec<(u64, u64, bool)>> {
    let mut parts: Vec<(u64, u64, bool)> = Vec::new();
    let mut kept_bytes = 0;
    let mut piece = vec![0; PIECE as usize];
    let mut at = mapping.start;
    while at < mapping.end {
        let end = (at + PIECE).min(mapping.end);
        let piece = piece.get_mut(..(end - at) as usize).unwrap_or_default();
        process.read(at, piece)?;
        let kept = mapping.inode != 0 || piece.iter().any(|byte| *byte != 0);
        match parts.last_mut() {
            Some((_, last, same)) if *same == kept => *last = end,
            _ => parts.push((at, end, kept)),
        }
        at = end;
    }
    let mut merged: Vec<(u64, u64, bool)> = Vec::new();
    for (start, end, kept) in parts {
        let kept = kept || (end - start < HOLE && mapping.end - mapping.start > end - start);
        match merged.last_mut() {
            Some((_, last, same)) if *same == kept => *last = end,
            _ => merged.push((start, end, kept)),
        }
    }
    for (start, end, _) in merged.iter().filter(|(.., kept)| *kept) {
        let mut page = vec![0; PAGE as usize];
        for at in (*start..*end).step_by(PAGE as usize) {
            process.read(at, &mut page)?;
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(&page, offset + kept_bytes + (at - start))?;
            }
        }
        kept_bytes += end - start;
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_as_the_kernel_writes_them() {
        let code = "5567ccbce000-5567cd065000 r-xp 00001000 fe:00 26 /usr/bin/qemu (deleted)";
        let expected = Mapping {
            start: 0x5567_ccbc_e000,
            end: 0x5567_cd06_5000,
            protection: (libc::PROT_READ | libc::PROT_EXEC) as u64,
            shared: false,
            inode: 26,
            name: "/usr/bin/qemu".to_owned(),
        };
        assert_eq!(Mapping::parse(code), Some(expected));
        let memory = Mapping::parse("7000-8000 rw-s 0 0:0 0").unwrap();
        assert!(memory.shared && memory.inode == 0 && memory.name.is_empty());
        let vdso = Mapping::parse("7000-8000 r-xp 0 0:0 0   [vdso]").unwrap();
        assert!(vdso.is_kernels() && vdso.is_vdso() && !vdso.is_fixed());
        assert_eq!(Mapping::parse("7000 rw-p 0 0:0 0"), None);
    }
}
