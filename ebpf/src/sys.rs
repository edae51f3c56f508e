//! The crate's unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Of `enum bpf_cmd`.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_MAP_GET_FD_BY_ID: libc::c_int = 14;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_LINK_CREATE: libc::c_int = 28;
/// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
pub(crate) const SK_LOOKUP: u32 = 36;

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// The source's four bits, then the destination's.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) value: i32,
}

/// The head of `union bpf_attr` as `BPF_MAP_CREATE` reads it.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// As the commands about an element of a map read it.
#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// As the commands about many elements of a map read it.
#[repr(C)]
struct BatchAttributes {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// As `BPF_PROG_LOAD` reads it.
#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// As `BPF_LINK_CREATE` reads it.
#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// bpf(2); what it returns is a descriptor for the commands that make one.
///
/// # Safety
/// `attributes` is what the kernel reads for this command, and what it points to lives.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: as the caller says.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    match libc::c_int::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The same for a command that writes to its attributes.
///
/// # Safety
/// As of [`bpf`].
unsafe fn bpf_back<T>(command: libc::c_int, attributes: &mut T) -> io::Result<()> {
    // SAFETY: as the caller says.
    match unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>())
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().unsigned_abs()
}

/// A command about the element `key` of a map. `value` is what the command reads or writes besides: the value,
/// the next key, or nothing. `Ok(false)` if there is none such.
///
/// # Safety
/// `key` (which may be null for the first key) and `value` point to as many bytes as the map's keys and
/// values have, or what else the command takes.
unsafe fn element(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: *const u8,
    value: *mut u8,
    flags: u64,
) -> io::Result<bool> {
    let (key, value) = (key as u64, value as u64);
    let attributes = ElementAttributes { map: number(map), padding: 0, key, value, flags };
    // SAFETY: as the caller says.
    match unsafe { bpf(command, &attributes) } {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sizes of what is read and written are those of the map: whoever opens it checks them.
pub(crate) mod map {
    use super::*;

    /// Reads an element into `value`; `false` if there is none.
    pub(crate) fn get(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        // SAFETY: both are as long as the map has them.
        unsafe { element(BPF_MAP_LOOKUP_ELEM, map, key.as_ptr(), value.as_mut_ptr(), 0) }
    }

    /// Writes an element.
    pub(crate) fn put(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        let value = value.as_ptr().cast_mut();
        // SAFETY: both are as long as the map has them; the kernel does not write to the value.
        let found = unsafe { element(BPF_MAP_UPDATE_ELEM, map, key.as_ptr(), value, flags) }?;
        if found { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Removes an element; `false` if there is none.
    pub(crate) fn remove(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
        // SAFETY: the key is as long as the map has it; no value is looked at.
        unsafe { element(BPF_MAP_DELETE_ELEM, map, key.as_ptr(), std::ptr::null_mut(), 0) }
    }

    /// The key after `key`, or the first; `false` if there is none. After a key that is gone comes the first.
    pub(crate) fn next(
        map: BorrowedFd<'_>,
        key: Option<&[u8]>,
        next: &mut [u8],
    ) -> io::Result<bool> {
        let key = key.map_or(std::ptr::null(), <[u8]>::as_ptr);
        // SAFETY: both are as long as the map's keys.
        unsafe { element(BPF_MAP_GET_NEXT_KEY, map, key, next.as_mut_ptr(), 0) }
    }

    #[cfg(feature = "loader")]
    /// Makes a table of these sizes that forgets what was used longest ago when it is full.
    pub(crate) fn forgetful(key: usize, value: usize, entries: u32) -> io::Result<OwnedFd> {
        /// `BPF_MAP_TYPE_LRU_HASH`.
        const LRU_HASH: u32 = 9;
        create(LRU_HASH, key, value, entries, 0)
    }

    #[cfg(feature = "loader")]
    /// Makes a map of a kind (`enum bpf_map_type`) with these sizes and flags.
    pub(crate) fn create(
        kind: u32,
        key: usize,
        value: usize,
        entries: u32,
        flags: u32,
    ) -> io::Result<OwnedFd> {
        let (key_size, value_size) = (key as u32, value as u32);
        let attributes = MapAttributes { kind, key_size, value_size, max_entries: entries, flags };
        // SAFETY: plain numbers.
        let map = unsafe { bpf(BPF_MAP_CREATE, &attributes) }?;
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(map) })
    }

    #[cfg(feature = "loader")]
    /// Writes `count` elements, one after the other. Where one is refused those before it are written.
    pub(crate) fn put_batch(
        map: BorrowedFd<'_>,
        keys: &[u8],
        values: &[u8],
        count: u32,
    ) -> io::Result<()> {
        let mut attributes = BatchAttributes {
            from: 0,
            to: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count,
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: keys and values have `count` elements of the map's sizes.
        unsafe { bpf_back(BPF_MAP_UPDATE_BATCH, &mut attributes) }
    }

    /// Where a batch ended, for the next one. As large as any map's key, of which some maps make it.
    pub(crate) type Place = [u8; 256];

    /// Reads as many elements as there is room for, one after another; the place where the first batch begins is
    /// `None`. Returns how many there were, and whether they were the last.
    pub(crate) fn batch(
        map: BorrowedFd<'_>,
        from: Option<&Place>,
        to: &mut Place,
        keys: &mut [u8],
        values: &mut [u8],
        count: u32,
    ) -> io::Result<(u32, bool)> {
        let mut attributes = BatchAttributes {
            from: from.map_or(0, |place| place.as_ptr() as u64),
            to: to.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count,
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: keys and values have room for `count` elements, places for any map's.
        match unsafe { bpf_back(BPF_MAP_LOOKUP_BATCH, &mut attributes) } {
            Ok(()) => Ok((attributes.count, false)),
            // The count is that of the last ones.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((attributes.count, true)),
            Err(error) => Err(error),
        }
    }

    /// Opens the map with this id, which is what user space reads of a map in a map.
    pub(crate) fn by_id(id: u32) -> io::Result<OwnedFd> {
        // As the command reads it: id, next id, flags.
        let attributes = [id, 0, 0];
        // SAFETY: plain numbers.
        let map = unsafe { bpf(BPF_MAP_GET_FD_BY_ID, &attributes) }?;
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(map) })
    }
}

/// The elements of an array that was made to be mapped, as memory that programs read.
#[cfg(feature = "loader")]
#[derive(Debug)]
pub(crate) struct Mapping {
    start: std::ptr::NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: it is memory that the kernel keeps for as long as it is mapped, wherever it is used from.
#[cfg(feature = "loader")]
unsafe impl Send for Mapping {}

#[cfg(feature = "loader")]
impl Mapping {
    /// Maps `length` bytes of elements.
    pub(crate) fn new(map: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let (access, sharing) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, access, sharing, map.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        std::ptr::NonNull::new(start)
            .map(|start| Self { start, length })
            .ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    fn place(&self, offset: usize, length: usize) -> io::Result<*mut u8> {
        match offset.checked_add(length) {
            // SAFETY: within the mapping.
            Some(end) if end <= self.length => {
                Ok(unsafe { self.start.as_ptr().cast::<u8>().add(offset) })
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Copies bytes to a place of which no program reads just now.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = self.place(offset, bytes.len())?;
        // SAFETY: the place is as long as the bytes, which are elsewhere; others that have it mapped are programs,
        // for which any bytes are fine.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Whether bytes are as the kernel has made them.
    pub(crate) fn is_blank(&self, offset: usize, length: usize) -> io::Result<bool> {
        let at = self.place(offset, length)?;
        // SAFETY: within the mapping, and only this process writes there.
        let bytes = unsafe { std::slice::from_raw_parts(at, length) };
        Ok(bytes.iter().all(|byte| *byte == 0))
    }
}

#[cfg(feature = "loader")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is this mapping, and nobody has references into it.
        unsafe { libc::munmap(self.start.as_ptr(), self.length) };
    }
}

/// Waits until every program that runs now has ended: they run in sections of the kernel's RCU, for whose end
/// this call waits.
pub(crate) fn wait_for_programs() -> io::Result<()> {
    /// `MEMBARRIER_CMD_GLOBAL`.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: plain numbers.
    match unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => {
            let error = io::Error::last_os_error();
            // A kernel without it, or with processors that no clock interrupts: a program runs for
            // microseconds.
            match error.raw_os_error() {
                Some(libc::ENOSYS | libc::EINVAL) => {
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    Ok(())
                }
                _ => Err(error),
            }
        }
    }
}

/// Makes a map of one socket, this one.
pub(crate) fn socket_map(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `BPF_MAP_TYPE_SOCKMAP`.
    const SOCKMAP: u32 = 15;
    let attributes =
        MapAttributes { kind: SOCKMAP, key_size: 4, value_size: 8, max_entries: 1, flags: 0 };
    // SAFETY: plain numbers.
    let map = unsafe { bpf(BPF_MAP_CREATE, &attributes) }?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    let (key, value) = (0_u32, u64::from(number(socket)));
    let attributes = ElementAttributes {
        map: map.as_raw_fd().unsigned_abs(),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value are as large as the map has them, and live until the call returns.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }?;
    Ok(map)
}

/// Loads a program that chooses sockets.
pub(crate) fn load_lookup(program: &[Instruction]) -> io::Result<OwnedFd> {
    /// `BPF_PROG_TYPE_SK_LOOKUP`.
    const KIND: u32 = 30;
    let mut log = vec![0_u8; 4096];
    let mut attributes = ProgramAttributes {
        kind: KIND,
        instruction_count: u32::try_from(program.len()).unwrap_or(0),
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"joey_forward\0\0\0\0",
        interface: 0,
        attach_type: SK_LOOKUP,
    };
    // SAFETY: the instructions and the license live until the call returns.
    let mut loaded = unsafe { bpf(BPF_PROG_LOAD, &attributes) };
    if loaded.is_err() {
        attributes.log_level = 1;
        attributes.log_size = u32::try_from(log.len()).unwrap_or(0);
        attributes.log = log.as_mut_ptr() as u64;
        // SAFETY: as before, and the log is as long as is said.
        loaded = unsafe { bpf(BPF_PROG_LOAD, &attributes) };
    }
    let program = loaded.map_err(|error| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        let words = String::from_utf8_lossy(&log[..end]).trim().replace('\n', "; ");
        io::Error::new(error.kind(), format!("loading the program: {error} {words}"))
    })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}

/// Has what `target` is, a cgroup or a network namespace, run a program at this of its hooks
/// (`enum bpf_attach_type`), after those that are there, for as long as the result is open.
pub(crate) fn link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: number(program),
        target: number(target),
        attach_type: hook,
        flags: 0,
    };
    // SAFETY: plain numbers.
    let link = unsafe { bpf(BPF_LINK_CREATE, &attributes) }?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// The head of `union bpf_attr` as `BPF_OBJ_GET` reads it.
#[repr(C)]
struct ObjectAttributes {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Opens what is pinned at `path`.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjectAttributes { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the path lives until the call returns.
    let pin = unsafe { bpf(BPF_OBJ_GET, &attributes) }?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(pin) })
}

/// Turns on an option of a netlink socket.
pub(crate) fn set_netlink_option(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one int, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
