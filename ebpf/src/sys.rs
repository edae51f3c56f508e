//! The crate's unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Of `enum bpf_cmd`.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_CREATE: libc::c_int = 28;
/// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
const SK_LOOKUP: u32 = 36;

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
}

/// As `BPF_MAP_UPDATE_ELEM` reads it.
#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
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

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().unsigned_abs()
}

/// Makes a map of one socket, this one.
pub(crate) fn socket_map(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `BPF_MAP_TYPE_SOCKMAP`.
    const SOCKMAP: u32 = 15;
    let attributes = MapAttributes { kind: SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 };
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

/// Has a network namespace ask such a program, for as long as the result is open.
pub(crate) fn link_lookup(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: number(program),
        target: number(netns),
        attach_type: SK_LOOKUP,
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
