//! Hands every TCP connection to a network namespace's loopback addresses to one listening socket: a program
//! that the kernel asks which socket a connection is for (`BPF_PROG_TYPE_SK_LOOKUP`, with the device since Linux 5.17).
//!
//! The program names its socket by a map of its own, so it is loaded for each pod: some thirty instructions,
//! which need no compiler. Nothing is pinned; it goes with the last descriptor of its link.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use crate::sys::{self, Instruction};

/// Offsets in `struct bpf_sk_lookup` (`linux/bpf.h`).
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
const DEVICE: i16 = 64;
/// The loopback device's index in every namespace.
const LOOPBACK: i32 = 1;
/// Helpers (`enum bpf_func_id`).
const MAP_LOOKUP: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// `SK_PASS`: the socket that was chosen, or else the kernel's own choice.
const PASS: i32 = 1;

/// Where a jump goes to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Next,
    Version4,
    Give,
    Pass,
}

/// Instructions with jumps that are not resolved yet.
#[derive(Default)]
struct Assembler {
    code: Vec<(Instruction, Label)>,
    places: Vec<(Label, usize)>,
}

impl Assembler {
    fn add(&mut self, code: u8, destination: u8, source: u8, offset: i16, value: i32) {
        let registers = source << 4 | destination;
        self.code.push((Instruction { code, registers, offset, value }, Label::Next));
    }

    /// `destination = *(u32 *)(source + offset)`.
    fn load(&mut self, destination: u8, source: u8, offset: i16) {
        self.add(0x61, destination, source, offset, 0);
    }

    fn move_register(&mut self, destination: u8, source: u8) {
        self.add(0xbf, destination, source, 0, 0);
    }

    fn set(&mut self, destination: u8, value: i32) {
        self.add(0xb7, destination, 0, 0, value);
    }

    fn call(&mut self, helper: i32) {
        self.add(0x85, 0, 0, 0, helper);
    }

    /// Jumps if the lower half of a register is this value.
    fn if_equal(&mut self, register: u8, value: i32, to: Label) {
        self.add(0x16, register, 0, 0, value);
        self.aim(to);
    }

    fn unless_equal(&mut self, register: u8, value: i32, to: Label) {
        self.add(0x56, register, 0, 0, value);
        self.aim(to);
    }

    fn aim(&mut self, to: Label) {
        if let Some((_, label)) = self.code.last_mut() {
            *label = to;
        }
    }

    fn here(&mut self, label: Label) {
        self.places.push((label, self.code.len()));
    }

    fn finish(self) -> Vec<Instruction> {
        let place = |label| self.places.iter().find(|(it, _)| *it == label).map(|(_, at)| *at);
        let resolve = |(at, (mut instruction, label)): (usize, (Instruction, Label))| {
            if let Some(place) = place(label) {
                instruction.offset = i16::try_from(place - at - 1).unwrap_or(0);
            }
            instruction
        };
        self.code.clone().into_iter().enumerate().map(resolve).collect()
    }
}

/// The program; `map` holds the socket at index 0.
fn program(map: BorrowedFd<'_>) -> Vec<Instruction> {
    let mut it = Assembler::default();
    let (result, first, second, third, context, socket, stack) = (0, 1, 2, 3, 6, 7, 10);
    it.move_register(context, first);
    it.load(first, context, PROTOCOL);
    it.unless_equal(first, libc::IPPROTO_TCP, Label::Pass);
    // Of the namespace's own, not of a program's that asks who would take what enters another device.
    it.load(first, context, DEVICE);
    it.unless_equal(first, LOOPBACK, Label::Pass);
    it.load(first, context, FAMILY);
    it.if_equal(first, libc::AF_INET, Label::Version4);
    it.unless_equal(first, libc::AF_INET6, Label::Pass);
    // ::1
    for (word, value) in [0, 0, 0, 1_i32.to_be()].into_iter().enumerate() {
        it.load(first, context, LOCAL_IP6 + 4 * i16::try_from(word).unwrap_or(0));
        it.unless_equal(first, value, Label::Pass);
    }
    // Always.
    it.add(0x05, 0, 0, 0, 0);
    it.aim(Label::Give);
    it.here(Label::Version4);
    // 127.0.0.0/8
    it.load(first, context, LOCAL_IP4);
    it.add(0x54, first, 0, 0, i32::from_ne_bytes([0xff, 0, 0, 0]));
    it.unless_equal(first, i32::from_ne_bytes([127, 0, 0, 0]), Label::Pass);
    it.here(Label::Give);
    // The key, 0, on the stack.
    it.add(0x62, stack, 0, -4, 0);
    it.add(0x18, first, 1, 0, map.as_raw_fd());
    it.add(0, 0, 0, 0, 0);
    it.move_register(second, stack);
    it.add(0x07, second, 0, 0, -4);
    it.call(MAP_LOOKUP);
    // All of the pointer.
    it.add(0x15, result, 0, 0, 0);
    it.aim(Label::Pass);
    it.move_register(socket, result);
    it.move_register(first, context);
    it.move_register(second, socket);
    it.set(third, 0);
    it.call(SK_ASSIGN);
    it.move_register(first, socket);
    it.call(SK_RELEASE);
    it.here(Label::Pass);
    it.set(result, PASS);
    // Exit.
    it.add(0x95, 0, 0, 0, 0);
    it.finish()
}

/// From now on, and until the result is dropped, gives every TCP connection to a loopback address of the
/// network namespace, whatever its port, to `listener`, a listening socket of that namespace.
///
/// # Errors
/// The kernel refuses: it is older than Linux 5.17, or the listener does not listen.
pub fn attach(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = sys::socket_map(listener)?;
    let program = sys::load_lookup(&program(map.as_fd()))?;
    sys::link(program.as_fd(), netns, sys::SK_LOOKUP)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn every_port_of_loopback_leads_to_one_listener() {
        if !nix::unistd::geteuid().is_root() {
            // Not by a macro, whose output a harness keeps for itself when a test passes.
            let why = "\nSKIPPED connections to loopback: needs root\n";
            let _ = io::stdout().write_all(why.as_bytes());
            return;
        }
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.unwrap().success());
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            let link = attach(netns.as_fd(), listener.as_fd()).unwrap();
            let loopback: [IpAddr; 3] = [
                Ipv4Addr::LOCALHOST.into(),
                Ipv4Addr::new(127, 9, 9, 9).into(),
                Ipv6Addr::LOCALHOST.into(),
            ];
            for address in loopback {
                for port in [1, 8080, 65535] {
                    let mut near = TcpStream::connect((address, port)).unwrap();
                    let (mut far, _) = listener.accept().unwrap();
                    assert_eq!(far.local_addr().unwrap().port(), port);
                    near.write_all(b"there").unwrap();
                    far.write_all(b"back").unwrap();
                    drop((
                        near.shutdown(std::net::Shutdown::Write),
                        far.shutdown(std::net::Shutdown::Write),
                    ));
                    let (mut there, mut back) = (String::new(), String::new());
                    far.read_to_string(&mut there).unwrap();
                    near.read_to_string(&mut back).unwrap();
                    assert_eq!((there.as_str(), back.as_str()), ("there", "back"));
                }
            }
            drop(link);
            assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)).is_err());
        };
        // The namespace ends with the thread.
        std::thread::spawn(test).join().unwrap();
    }
}
