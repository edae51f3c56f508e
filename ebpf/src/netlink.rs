//! Route netlink, as little of it as a pod's network needs: build messages, send many in one call,
//! read the answers.
//!
//! Synchronous: the kernel answers a request before `send` returns, so reading never waits long.
//! A [`Socket`] belongs to the network namespace of the thread that opened it and may be used from
//! any other.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

use crate::sys;

const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
/// An attribute whose value is attributes.
const NESTED: u16 = 0x8000;
/// Of an acknowledgement: attributes follow, one of which is the kernel's reason as a text.
const ACK_HAS_ATTRIBUTES: u16 = 0x200;
const ACK_MESSAGE: u16 = 1;
/// More than the kernel puts into one datagram of a dump.
const RECEIVE_BYTES: usize = 64 << 10;
/// The kernel answers at once; this only bounds a hang that should not be.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be made or used.
    #[error("netlink socket: {step}: {source}")]
    Socket {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("{step}: {source}{}", reason(.message))]
    Refused {
        /// What was asked.
        step: String,
        /// The kernel's number.
        source: io::Error,
        /// The kernel's words; may be empty.
        message: String,
    },
    /// The kernel's answer is not one.
    #[error("{0}: the kernel's answer cannot be read")]
    Answer(String),
}

fn reason(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

impl NetlinkError {
    /// The kernel's number, when it refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// One request. Lengths are filled in as it grows.
#[derive(Debug, Clone)]
pub struct Message {
    /// What it asks, for errors.
    step: String,
    bytes: Vec<u8>,
    /// Refusals by which what is asked is so already.
    fine: &'static [i32],
}

impl Message {
    /// A request of `kind` (`RTM_*`) with `flags` beyond `NLM_F_REQUEST`, and the family's fixed header.
    #[must_use]
    pub fn new(step: impl Into<String>, kind: u16, flags: i32, header: &[u8]) -> Self {
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or(u16::MAX);
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header);
        let mut message = Self { step: step.into(), bytes, fine: &[] };
        message.pad();
        message
    }

    /// Takes a refusal with one of these numbers as done.
    #[must_use]
    pub fn or(self, fine: &'static [i32]) -> Self {
        Self { fine, ..self }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds a 32-bit attribute.
    #[must_use]
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a text attribute, terminated.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Adds an attribute made of attributes.
    #[must_use]
    pub fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.attribute(kind | NESTED, &[]));
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = self.bytes.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(&mut self, sequence: u32, flags: i32) {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let old = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        let flags = old | u16::try_from(flags).unwrap_or(0);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// One object that was asked for, without netlink's own header.
#[derive(Debug, Clone)]
pub struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    /// The family's fixed header, `None` when the answer is shorter.
    #[must_use]
    pub fn header(&self, length: usize) -> Option<&[u8]> {
        self.bytes.get(..length)
    }

    /// The attributes behind a fixed header of `length` bytes.
    #[must_use]
    pub fn attributes(&self, length: usize) -> Attributes<'_> {
        Attributes(self.bytes.get(length.next_multiple_of(4)..).unwrap_or_default())
    }
}

/// Attributes in order. Ends at the first that is not well formed.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Those inside a nested attribute's value.
    #[must_use]
    pub fn of(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// The value of the first attribute of `kind`.
    #[must_use]
    pub fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.into_iter().find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    /// A 32-bit attribute.
    #[must_use]
    pub fn number(self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// A text attribute.
    #[must_use]
    pub fn text(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    }
}

/// A socket in one network namespace.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

fn failed(step: &'static str) -> impl FnOnce(nix::Error) -> NetlinkError {
    move |source| NetlinkError::Socket { step, source: source.into() }
}

impl Socket {
    /// A socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .map_err(failed("open"))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(failed("bind"))?;
        let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&fd, ReceiveTimeout, &patience).map_err(failed("set a timeout"))?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            sys::set_netlink_option(fd.as_fd(), option)
                .map_err(|source| NetlinkError::Socket { step: "set an option", source })?;
        }
        Ok(Self { fd, sequence: 0, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// A socket that hears of changes to a namespace's addresses (`RTM_NEWADDR`, `RTM_DELADDR`), of the
    /// calling thread's. It does not block: [`Socket::drain`] it when it is readable.
    pub fn addresses() -> Result<Self, NetlinkError> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )
        .map_err(failed("open"))?;
        let groups = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR).cast_unsigned();
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups)).map_err(failed("join"))?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Throws away what was told, and what the kernel could not tell because nobody had read: in both cases
    /// something has changed, and a dump says what there is.
    pub fn drain(&mut self) -> Result<(), NetlinkError> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(error) => return Err(failed("receive")(error)),
            }
        }
    }

    /// Sends one request and waits until the kernel has done it.
    pub fn request(&mut self, message: Message) -> Result<(), NetlinkError> {
        self.batch([message])
    }

    /// Sends requests in one call. The kernel does them in order and does not stop at an error: the
    /// first one is returned after all were answered.
    pub fn batch(
        &mut self,
        messages: impl IntoIterator<Item = Message>,
    ) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut steps = Vec::new();
        for mut message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.finish(self.sequence, libc::NLM_F_ACK);
            bytes.append(&mut message.bytes);
            steps.push((message.step, message.fine));
        }
        if steps.is_empty() {
            return Ok(());
        }
        self.send(&bytes)?;
        let mut left = steps.len();
        let mut result = Ok(());
        while left > 0 {
            self.receive(|kind, flags, sequence, body| {
                let step = steps.get(sequence.wrapping_sub(first) as usize);
                if let (true, Some((step, fine))) = (i32::from(kind) == libc::NLMSG_ERROR, step) {
                    left = left.saturating_sub(1);
                    let answer = acknowledged(step, flags, body);
                    let is_fine = |errno| fine.contains(&errno);
                    if result.is_ok()
                        && !answer.as_ref().is_err_and(|e| e.errno().is_some_and(is_fine))
                    {
                        result = answer;
                    }
                }
                Ok(())
            })?;
        }
        result
    }

    /// Asks for all objects of a kind.
    pub fn dump(&mut self, message: Message) -> Result<Vec<Reply>, NetlinkError> {
        self.ask(message, libc::NLM_F_DUMP)
    }

    /// Asks for one object.
    pub fn get(&mut self, message: Message) -> Result<Reply, NetlinkError> {
        let step = message.step.clone();
        self.ask(message, libc::NLM_F_ACK)?.pop().ok_or(NetlinkError::Answer(step))
    }

    fn ask(&mut self, mut message: Message, flags: i32) -> Result<Vec<Reply>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let wanted = self.sequence;
        message.finish(wanted, flags);
        self.send(&message.bytes)?;
        let mut replies = Vec::new();
        let mut done = false;
        while !done {
            self.receive(|kind, flags, sequence, body| {
                match i32::from(kind) {
                    _ if sequence != wanted => {}
                    libc::NLMSG_DONE => done = true,
                    libc::NLMSG_ERROR => {
                        done = true;
                        acknowledged(&message.step, flags, body)?;
                    }
                    _ => replies.push(Reply { bytes: body.to_vec() }),
                }
                Ok(())
            })?;
        }
        Ok(replies)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()).map_err(failed("send"))?;
        Ok(())
    }

    fn receive(
        &mut self,
        mut each: impl FnMut(u16, u16, u32, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let length = recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC)
            .map_err(failed("receive"))?;
        let mut rest = self
            .buffer
            .get(..length)
            .ok_or_else(|| NetlinkError::Answer(format!("a datagram of {length} bytes")))?;
        while !rest.is_empty() {
            let unreadable = || NetlinkError::Answer("a message".to_owned());
            let word = |at: usize| -> Option<u32> {
                Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?))
            };
            let length = word(0).ok_or_else(unreadable)? as usize;
            let types = word(4).ok_or_else(unreadable)?;
            let sequence = word(8).ok_or_else(unreadable)?;
            let body = rest.get(HEADER..length).ok_or_else(unreadable)?;
            let [k0, k1, f0, f1] = types.to_ne_bytes();
            each(u16::from_ne_bytes([k0, k1]), u16::from_ne_bytes([f0, f1]), sequence, body)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What an acknowledgement says.
fn acknowledged(step: &str, flags: u16, body: &[u8]) -> Result<(), NetlinkError> {
    let unreadable = || NetlinkError::Answer(step.to_owned());
    let code = body.get(..4).and_then(|code| code.try_into().ok()).ok_or_else(unreadable)?;
    let code = i32::from_ne_bytes(code);
    if code == 0 {
        return Ok(());
    }
    let message = if flags & ACK_HAS_ATTRIBUTES == 0 {
        None
    } else {
        // The request's header follows the code; its body was left out, as asked.
        Attributes(body.get(4 + HEADER..).unwrap_or_default()).text(ACK_MESSAGE)
    };
    Err(NetlinkError::Refused {
        step: step.to_owned(),
        source: io::Error::from_raw_os_error(code.saturating_neg()),
        message: message.unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_in_what_was_built() {
        let message = Message::new("test", 1, 0, &[7; 4])
            .text(3, "eth0")
            .nest(5, |inner| inner.number(1, 42).attribute(2, &[1, 2, 3]))
            .number(9, 7);
        let reply = Reply { bytes: message.bytes[HEADER..].to_vec() };
        let attributes = reply.attributes(4);
        assert_eq!(attributes.text(3), Some("eth0"));
        let inner = Attributes::of(attributes.get(5).unwrap());
        assert_eq!((inner.number(1), inner.get(2)), (Some(42), Some(&[1, 2, 3][..])));
        assert_eq!(attributes.number(9), Some(7));
        assert_eq!(attributes.get(10), None);
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        for bytes in [&[][..], &[4], &[0, 0, 1, 0], &[3, 0, 1, 0], &[200, 0, 1, 0, 5, 5]] {
            assert_eq!(Attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn a_refusal_names_the_step_and_spares_the_rest() {
        let mut socket = Socket::open().unwrap();
        let bad = Message::new("remove link 2147483000", libc::RTM_DELLINK, 0, &{
            let mut header = [0; 16];
            header[4..8].copy_from_slice(&2_147_483_000_u32.to_ne_bytes());
            header
        });
        let error = socket.batch([bad.clone(), bad]).unwrap_err();
        assert!(error.errno().is_some());
        assert!(error.to_string().starts_with("remove link 2147483000: "), "{error}");
        let links = Message::new("list links", libc::RTM_GETLINK, 0, &[0; 16]);
        assert!(!socket.dump(links).unwrap().is_empty(), "the socket still works");
    }
}
