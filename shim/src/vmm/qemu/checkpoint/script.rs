//! The program that continues a process: an ELF file whose only segment is the restorer, its table of
//! system calls and what they point at. The process's memory lies in the file before it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::sys;

pub(super) const PAGE: u64 = 4096;
/// Where the segment is loaded: below everything that a position-independent program has.
pub(super) const BASE: u64 = 0x1000_0000;
/// Most that it may take.
pub(super) const ROOM: u64 = 0x1000_0000;
const WORD: usize = 8;

/// One system call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    number: u64,
    arguments: [u64; 6],
    result: u64,
}

impl Row {
    const FROM_VDSO: u64 = 1 << 32;
    const WHATEVER: u64 = 1 << 33;

    /// A call that must give `result`.
    pub(super) fn new(number: i64, arguments: &[u64], result: u64) -> Self {
        let mut all = [0; 6];
        all.iter_mut().zip(arguments).for_each(|(to, from)| *to = *from);
        Self { number: number.cast_unsigned(), arguments: all, result }
    }

    /// Its first argument counts from where the kernel put the vDSO.
    pub(super) fn relative_to_vdso(self) -> Self {
        Self { number: self.number | Self::FROM_VDSO, ..self }
    }

    /// Another result.
    pub(super) fn giving(self, result: u64) -> Self {
        Self { result, ..self }
    }

    /// It may fail.
    pub(super) fn or_not(self) -> Self {
        Self { number: self.number | Self::WHATEVER, ..self }
    }
}

/// The segment.
pub(super) struct Script(Vec<u8>);

impl Script {
    pub(super) fn new() -> Self {
        Self(sys::restorer().0.to_vec())
    }

    /// Adds something that calls point at; its address.
    pub(super) fn add(&mut self, data: &[u8]) -> u64 {
        const ALIGNMENT: usize = 64;
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        let address = BASE + self.0.len() as u64;
        self.0.extend_from_slice(data);
        address
    }

    /// Adds calls, in their order; the address of the first.
    pub(super) fn table(&mut self, rows: &[Row]) -> u64 {
        let words = |row: &Row| {
            let [a, b, c, d, e, f] = row.arguments;
            [row.number, a, b, c, d, e, f, row.result]
        };
        let bytes: Vec<u8> = rows.iter().flat_map(words).flat_map(u64::to_le_bytes).collect();
        self.add(&bytes)
    }

    /// Writes the segment at `offset` of the file, which is a multiple of a page, and the header.
    pub(super) fn write(mut self, file: &File, offset: u64, table: u64) -> io::Result<()> {
        let place = sys::restorer().1;
        let slot = self.0.get_mut(place..place + WORD);
        slot.ok_or_else(|| io::Error::other("no room for the table's address"))?
            .copy_from_slice(&table.to_le_bytes());
        let size = self.0.len() as u64;
        if size > ROOM {
            return Err(io::Error::other("the process has too many parts"));
        }
        file.write_all_at(&self.0, offset)?;
        file.write_all_at(&header(offset, size), 0)
    }
}

/// Header of an ELF program with one segment to load and a stack that is not executable.
fn header(offset: u64, size: u64) -> Vec<u8> {
    const HEADER: u16 = 64;
    const ENTRY: u16 = 56;
    let (load, stack) = (object::elf::PT_LOAD, object::elf::PT_GNU_STACK);
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    bytes.resize(16, 0);
    let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend(value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_le_bytes());
    let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_le_bytes());
    half(&mut bytes, object::elf::ET_EXEC);
    half(&mut bytes, object::elf::EM_X86_64);
    word(&mut bytes, 1);
    // Entry, program headers, no sections, no flags.
    for value in [BASE, HEADER.into(), 0] {
        long(&mut bytes, value);
    }
    word(&mut bytes, 0);
    for value in [HEADER, ENTRY, 2, 64, 0, 0] {
        half(&mut bytes, value);
    }
    for (kind, flags, offset, address, size) in [(load, 7, offset, BASE, size), (stack, 6, 0, 0, 0)]
    {
        word(&mut bytes, kind);
        word(&mut bytes, flags);
        for value in [offset, address, address, size, size, PAGE] {
            long(&mut bytes, value);
        }
    }
    bytes
}
