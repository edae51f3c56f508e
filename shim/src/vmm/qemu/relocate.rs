//! QEMU with its addresses put in, once for all clones of a template.
//!
//! A position-independent executable has its pointers adjusted by the dynamic linker whenever it starts:
//! 134,000 in Debian's QEMU, in pages that each process then has for itself, as it has the work. Here the
//! same is done to a copy of the file, as `prelink(8)` did for whole systems: its pages stay those of the
//! page cache, shared by every VMM of the template.
//!
//! The place is drawn at random, from as many as the kernel would choose from (`ELF_ET_DYN_BASE` and 28
//! bits, `mmap_rnd_bits` in `Documentation/admin-guide/sysctl/vm.rst`), but once per template instead of
//! once per process. Libraries, heap and stack keep a layout of their own in each process.
//!
//! Follows the System V ABI, chapters 4 and 5, and its AMD64 supplement. What is not understood is refused:
//! the executable as it was installed serves as well.

use std::io;
use std::ops::Range;

use object::LittleEndian as Le;
use object::elf::{self, Dyn64, FileHeader64, ProgramHeader64, Rela64, SectionHeader64, Sym64};
use object::pod::{Pod, from_bytes_mut, slice_from_bytes_mut};

use crate::sys;

/// Where the kernel puts such executables at the lowest: two thirds of a process's addresses.
const LOWEST: u64 = 0x5555_5555_4000;
/// From how many pages on it chooses.
const PAGES: u32 = 1 << 28;
const PAGE: u64 = 4096;

/// Why an executable is left as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum RelocateError {
    /// Another kind of file.
    #[error("it is not a position-independent executable of this architecture")]
    Kind,
    /// A part of it does not lie where the file says.
    #[error("its {0} is not within the file")]
    Outside(&'static str),
    /// Something this module does not know.
    #[error("its {what} {value:#x} is not known")]
    Unknown {
        /// What.
        what: &'static str,
        /// Its number.
        value: u64,
    },
}

/// A place that nobody can guess.
pub(crate) fn random_base() -> io::Result<u64> {
    let mut bytes = [0; 4];
    sys::random(&mut bytes)?;
    Ok(LOWEST + u64::from(u32::from_le_bytes(bytes) % PAGES) * PAGE)
}

/// Makes `image` an executable that can only lie at `base`. On an error it is not usable.
pub(crate) fn relocate(image: &mut [u8], base: u64) -> Result<(), RelocateError> {
    let header = Header::take(image, base)?;
    let segments = Segments::shift(image, &header, base)?;
    shift_symbols(image, &header, base)?;
    let tables = shift_dynamic(image, &segments, base)?;
    for table in &tables.relocations {
        let applied = if table.start == tables.first { tables.relative } else { 0 };
        relocate_table(image, &segments, table, applied, base)?;
    }
    Ok(())
}

/// `count` things at `offset` of the image.
fn view<'a, T: Pod>(
    image: &'a mut [u8],
    what: &'static str,
    offset: u64,
    count: u64,
) -> Result<&'a mut [T], RelocateError> {
    let outside = RelocateError::Outside(what);
    let part = usize::try_from(offset).ok().and_then(|at| image.get_mut(at..));
    let (Some(part), Ok(count)) = (part, usize::try_from(count)) else { return Err(outside) };
    slice_from_bytes_mut(part, count).map(|(things, _)| things).map_err(|()| outside)
}

/// Where the file's tables lie.
struct Header {
    segments: (u64, u64),
    sections: (u64, u64),
}

impl Header {
    /// Reads the header and makes it that of an executable with a fixed place and no sections.
    fn take(image: &mut [u8], base: u64) -> Result<Self, RelocateError> {
        let header = from_bytes_mut::<FileHeader64<Le>>(image).map_err(|()| RelocateError::Kind)?.0;
        let ident = &header.e_ident;
        let right = ident.magic == elf::ELFMAG
            && ident.class == elf::ELFCLASS64
            && ident.data == elf::ELFDATA2LSB
            && header.e_machine.get(Le) == elf::EM_X86_64
            && header.e_type.get(Le) == elf::ET_DYN;
        if !right {
            return Err(RelocateError::Kind);
        }
        let found = Self {
            segments: (header.e_phoff.get(Le), header.e_phnum.get(Le).into()),
            sections: (header.e_shoff.get(Le), header.e_shnum.get(Le).into()),
        };
        header.e_type.set(Le, elf::ET_EXEC);
        header.e_entry.set(Le, header.e_entry.get(Le).wrapping_add(base));
        header.e_shoff.set(Le, 0);
        header.e_shnum.set(Le, 0);
        header.e_shstrndx.set(Le, 0);
        Ok(found)
    }
}

/// Which addresses, before the shift, are which bytes of the file.
struct Segments {
    loaded: Vec<(Range<u64>, u64)>,
    dynamic: (u64, u64),
}

impl Segments {
    fn shift(image: &mut [u8], header: &Header, base: u64) -> Result<Self, RelocateError> {
        let (offset, count) = header.segments;
        let mut found = Self { loaded: Vec::new(), dynamic: (0, 0) };
        for segment in view::<ProgramHeader64<Le>>(image, "program header", offset, count)? {
            let (address, at) = (segment.p_vaddr.get(Le), segment.p_offset.get(Le));
            let size = segment.p_filesz.get(Le);
            match segment.p_type.get(Le) {
                elf::PT_LOAD => found.loaded.push((address..address.saturating_add(size), at)),
                elf::PT_DYNAMIC => found.dynamic = (at, size),
                elf::PT_GNU_STACK => continue,
                _ => {}
            }
            segment.p_vaddr.set(Le, address.wrapping_add(base));
            segment.p_paddr.set(Le, address.wrapping_add(base));
        }
        Ok(found)
    }

    fn offset(&self, what: &'static str, address: u64) -> Result<u64, RelocateError> {
        let segment = self.loaded.iter().find(|(addresses, _)| addresses.contains(&address));
        segment
            .map(|(addresses, at)| address - addresses.start + at)
            .ok_or(RelocateError::Outside(what))
    }
}

fn shift_symbols(image: &mut [u8], header: &Header, base: u64) -> Result<(), RelocateError> {
    let (offset, count) = header.sections;
    let tables: Vec<(u64, u64)> =
        view::<SectionHeader64<Le>>(image, "section header", offset, count)?
            .iter()
            .filter(|section| section.sh_type.get(Le) == elf::SHT_DYNSYM)
            .map(|section| (section.sh_offset.get(Le), section.sh_size.get(Le)))
            .collect();
    for (offset, size) in tables {
        let count = size / size_of::<Sym64<Le>>() as u64;
        for symbol in view::<Sym64<Le>>(image, "symbol table", offset, count)? {
            let placed = !matches!(symbol.st_shndx.get(Le), elf::SHN_UNDEF | elf::SHN_ABS);
            if placed && symbol.st_info & 0xf != elf::STT_TLS {
                symbol.st_value.set(Le, symbol.st_value.get(Le).wrapping_add(base));
            }
        }
    }
    Ok(())
}

/// Where the relocations lie, as offsets in the file.
#[derive(Default)]
struct Tables {
    relocations: Vec<Range<u64>>,
    /// Start of the table whose first `relative` entries need nothing but the place.
    first: u64,
    relative: u64,
}

const RELA_BYTES: u64 = size_of::<Rela64<Le>>() as u64;

/// Shifts the addresses in the dynamic section and takes the relative relocations out of it.
fn shift_dynamic(
    image: &mut [u8],
    segments: &Segments,
    base: u64,
) -> Result<Tables, RelocateError> {
    let (offset, size) = segments.dynamic;
    let count = size / size_of::<Dyn64<Le>>() as u64;
    let entries = view::<Dyn64<Le>>(image, "dynamic section", offset, count)?;
    let value = |wanted: i64| {
        let entry = entries.iter().find(|entry| entry.d_tag.get(Le) == wanted);
        entry.map_or(0, |entry| entry.d_val.get(Le))
    };
    // Addresses for calls that are looked up at the first call are not among the relocations.
    let at_once = value(elf::DT_FLAGS) & u64::from(elf::DF_BIND_NOW)
        | value(elf::DT_FLAGS_1) & u64::from(elf::DF_1_NOW);
    if at_once == 0 {
        return Err(RelocateError::Unknown { what: "lazy binding, DT_FLAGS", value: 0 });
    }
    let relative = value(elf::DT_RELACOUNT);
    let (rela, rela_bytes) = (value(elf::DT_RELA), value(elf::DT_RELASZ));
    let (calls, calls_bytes) = (value(elf::DT_JMPREL), value(elf::DT_PLTRELSZ));
    if relative.checked_mul(RELA_BYTES).is_none_or(|bytes| bytes > rela_bytes) {
        return Err(RelocateError::Outside("count of relative relocations"));
    }
    let mut tables = Tables { relative, ..Tables::default() };
    for (address, bytes) in [(rela, rela_bytes), (calls, calls_bytes)] {
        let twice = tables.relocations.iter().any(|table| table.contains(&address));
        if bytes > 0 && !twice {
            let at = segments.offset("relocation table", address)?;
            tables.relocations.push(at..at.saturating_add(bytes));
        }
    }
    tables.first = tables.relocations.first().map_or(0, |table| table.start);
    for entry in entries {
        let old = entry.d_val.get(Le);
        let tag = entry.d_tag.get(Le);
        let new = match tag {
            elf::DT_NULL => break,
            elf::DT_RELA => old + base + relative * RELA_BYTES,
            elf::DT_RELASZ => old - relative * RELA_BYTES,
            elf::DT_RELACOUNT => 0,
            elf::DT_FLAGS_1 => old & !u64::from(elf::DF_1_PIE),
            elf::DT_PLTGOT
            | elf::DT_HASH
            | elf::DT_STRTAB
            | elf::DT_SYMTAB
            | elf::DT_INIT
            | elf::DT_FINI
            | elf::DT_JMPREL
            | elf::DT_INIT_ARRAY
            | elf::DT_FINI_ARRAY
            | elf::DT_GNU_HASH
            | elf::DT_VERSYM
            | elf::DT_VERNEED
            | elf::DT_VERDEF => old.wrapping_add(base),
            elf::DT_NEEDED
            | elf::DT_SONAME
            | elf::DT_RPATH
            | elf::DT_RUNPATH
            | elf::DT_STRSZ
            | elf::DT_SYMENT
            | elf::DT_RELAENT
            | elf::DT_PLTREL
            | elf::DT_PLTRELSZ
            | elf::DT_DEBUG
            | elf::DT_BIND_NOW
            | elf::DT_INIT_ARRAYSZ
            | elf::DT_FINI_ARRAYSZ
            | elf::DT_FLAGS
            | elf::DT_VERNEEDNUM
            | elf::DT_VERDEFNUM => old,
            _ => {
                return Err(RelocateError::Unknown {
                    what: "dynamic tag",
                    value: tag.cast_unsigned(),
                });
            }
        };
        entry.d_val.set(Le, new);
    }
    Ok(tables)
}

/// Applies the first `applied` relocations of a table and shifts the others.
fn relocate_table(
    image: &mut [u8],
    segments: &Segments,
    table: &Range<u64>,
    applied: u64,
    base: u64,
) -> Result<(), RelocateError> {
    let count = (table.end - table.start) / RELA_BYTES;
    for index in 0..count {
        let entry = table.start + index * RELA_BYTES;
        let [rela] = view::<Rela64<Le>>(image, "relocation table", entry, 1)? else {
            return Err(RelocateError::Outside("relocation table"));
        };
        let (target, addend) = (rela.r_offset.get(Le), rela.r_addend.get(Le));
        let moved = addend.wrapping_add_unsigned(base);
        let kind = rela.r_type(Le, false);
        rela.r_offset.set(Le, target.wrapping_add(base));
        match kind {
            elf::R_X86_64_RELATIVE | elf::R_X86_64_IRELATIVE => rela.r_addend.set(Le, moved),
            elf::R_X86_64_64
            | elf::R_X86_64_GLOB_DAT
            | elf::R_X86_64_JUMP_SLOT
            | elf::R_X86_64_COPY
            | elf::R_X86_64_DTPMOD64
            | elf::R_X86_64_DTPOFF64
            | elf::R_X86_64_TPOFF64 => {}
            _ => return Err(RelocateError::Unknown { what: "relocation", value: kind.into() }),
        }
        if index < applied {
            if kind != elf::R_X86_64_RELATIVE {
                return Err(RelocateError::Unknown {
                    what: "first relocation",
                    value: kind.into(),
                });
            }
            let at = segments.offset("relocation", target)?;
            let [word] = view::<[u8; 8]>(image, "relocation", at, 1)? else {
                return Err(RelocateError::Outside("relocation"));
            };
            *word = moved.to_le_bytes();
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    /// The tests' own program is position-independent, has thread-local data, constructors and thousands
    /// of relocations.
    fn program() -> Vec<u8> {
        fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn a_relocated_program_runs_at_its_place() {
        let mut image = program();
        let base = random_base().unwrap();
        relocate(&mut image, base).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, &image).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let ran = Command::new(&path)
            .args(["--exact", "vmm::qemu::relocate::tests::says_where_it_lies", "--nocapture"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
        assert!(said.contains(&format!("lies at {base:x}-")), "{base:x}: {said}");
    }

    /// Runs in the relocated copy; in the original it says something of no interest.
    #[test]
    #[allow(clippy::print_stdout)]
    fn says_where_it_lies() {
        let own = std::env::current_exe().unwrap().display().to_string();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        println!("lies at {}", maps.lines().find(|line| line.ends_with(&own)).unwrap());
    }

    #[test]
    fn places_are_pages_and_differ() {
        let places: Vec<u64> = (0..8).map(|_| random_base().unwrap()).collect();
        assert!(places.iter().all(|place| place % PAGE == 0 && *place >= LOWEST));
        assert!(places.iter().any(|place| *place != places[0]));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(relocate(&mut b"#!/bin/sh".to_vec(), LOWEST), Err(RelocateError::Kind));
        let mut twice = program();
        relocate(&mut twice, LOWEST).unwrap();
        assert_eq!(relocate(&mut twice, LOWEST), Err(RelocateError::Kind));
    }

    #[test]
    fn a_cut_off_file_is_refused() {
        let whole = program();
        for length in [0, 63, 64, 500, 4096, whole.len() / 2, whole.len() - 1] {
            let mut cut = whole[..length].to_vec();
            assert!(relocate(&mut cut, LOWEST).is_err(), "{length} bytes");
        }
    }
}
