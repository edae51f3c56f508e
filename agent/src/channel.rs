//! The virtio-serial port to the host: finding it, and waiting until the host listens.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// Name of the port, as the VMM gives it.
pub(crate) const PORT_NAME: &str = "joey.channel";
const PORTS: &str = "/sys/class/virtio-ports";
/// How long the kernel may take to announce the port.
const PORT_DEADLINE_SECONDS: i64 = 30;

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The machine has no such port.
    #[error(
        "no virtio-serial port named {PORT_NAME} appeared within {PORT_DEADLINE_SECONDS} s: \
         the VMM's command line does not fit this agent"
    )]
    NoPort,
    /// The port is there but does not open.
    #[error("opening {path}: {source}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Listening for the kernel's device events failed.
    #[error("waiting for the port: {0}")]
    Wait(#[from] nix::Error),
}

/// Waits for the port to appear, opens it, and waits until the host has its end open.
///
/// Blocks; the agent calls it before its event loop runs.
pub(crate) fn open() -> Result<OwnedFd, ChannelError> {
    // The socket is opened before the first look, so no announcement can fall between.
    let events = uevents()?;
    let path = loop {
        if let Some(path) = find_port(Path::new(PORTS)) {
            break path;
        }
        let mut message = [0_u8; 4096];
        match recv(events.as_raw_fd(), &mut message, nix::sys::socket::MsgFlags::empty()) {
            Ok(_) | Err(nix::Error::EINTR | nix::Error::ENOBUFS) => {}
            Err(nix::Error::EAGAIN) => return Err(ChannelError::NoPort),
            Err(error) => return Err(error.into()),
        }
    };
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|source| ChannelError::Open { path, source })?;
    wait_for_host(&port)?;
    Ok(port.into())
}

fn uevents() -> nix::Result<OwnedFd> {
    let events = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    setsockopt(&events, sockopt::ReceiveTimeout, &TimeVal::new(PORT_DEADLINE_SECONDS, 0))?;
    Ok(events)
}

fn find_port(ports: &Path) -> Option<PathBuf> {
    for entry in fs::read_dir(ports).ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// A port whose host end is closed reads as end of file, which later means that the host is gone;
/// so the first connection is waited for here. Edge-triggered: a level would spin on the hang-up.
fn wait_for_host(port: &File) -> nix::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll.add(port.as_fd(), EpollEvent::new(interest, 0))?;
    loop {
        let mut events = [EpollEvent::empty()];
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error),
        }
        if !events[0].events().contains(EpollFlags::EPOLLHUP) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_port_by_name() {
        let root = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p0", "console\n"), ("vport1p1", "joey.channel\n")] {
            fs::create_dir(root.path().join(port)).unwrap();
            fs::write(root.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find_port(root.path()), Some(PathBuf::from("/dev/vport1p1")));
        fs::remove_dir_all(root.path().join("vport1p1")).unwrap();
        assert_eq!(find_port(root.path()), None);
    }
}
