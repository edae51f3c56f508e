//! The VM's device: made in the pod's namespace, or taken there with a VM that has waited.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use joey_ebpf::netlink::{Message, Socket};
use joey_ebpf::route;
use nix::sched::{CloneFlags, unshare};

use super::NetError;
use crate::sys;

/// Name of the tap in the pod's namespace.
pub(super) const TAP: &str = "joey0";
/// The MTU that a tap is made with.
pub(super) const MTU: u32 = 1500;
/// A tap that a VM has before its pod is known, in a namespace of its own that goes with it.
#[derive(Debug)]
pub struct ParkedTap {
    tap: OwnedFd,
    /// Speaks to the kernel inside that namespace, and keeps it.
    place: Socket,
    index: u32,
}

impl ParkedTap {
    /// Makes the namespace and the tap.
    pub fn make() -> Result<Self, NetError> {
        let nowhere = Path::new("of a waiting VM");
        let fail = move |step| {
            move |source| NetError::Namespace { netns: nowhere.to_owned(), step, source }
        };
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| fail("make")(error.into()))?;
            let place = Socket::open()
                .map_err(|source| NetError::Netlink { netns: nowhere.to_owned(), source })?;
            let tap = make_tap(nowhere, None)?;
            let index = nix::net::if_::if_nametoindex(TAP)
                .map_err(|error| fail("look up its tap")(error.into()))?;
            Ok(Self { tap, place, index })
        };
        // Only the thread changes its namespace, and it ends here.
        std::thread::spawn(make)
            .join()
            .unwrap_or_else(|_| Err(fail("make")(io::Error::other("the thread panicked"))))
    }

    /// A descriptor of the tap, for the VMM.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }

    /// Moves the tap into the pod's namespace `file`, in which the calling thread is.
    pub(super) fn enter(
        mut self,
        netns: &Path,
        file: &File,
        index: Option<u32>,
    ) -> Result<OwnedFd, NetError> {
        let descriptor = u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX);
        let link = route::link("move the tap here", libc::RTM_NEWLINK, self.index, false)
            .number(route::LINK_NETNS_FD, descriptor);
        let link = index.into_iter().fold(link, |it, new| it.number(route::LINK_NEW_INDEX, new));
        self.place
            .request(link)
            .map_err(|source| NetError::Netlink { netns: netns.to_owned(), source })?;
        Ok(self.tap)
    }
}

/// Makes the tap.
pub(super) fn make_tap(netns: &Path, index: Option<u32>) -> Result<OwnedFd, NetError> {
    let fail = |step| move |source| NetError::Tap { netns: netns.to_owned(), step, source };
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(fail("open /dev/net/tun"))?;
    if let Some(index) = index {
        sys::set_tap_index(tun.as_fd(), index).map_err(fail("choose its index"))?;
    }
    sys::make_tap(tun.as_fd(), TAP).map_err(fail("create"))?;
    Ok(tun.into())
}

/// Keeps the host's own IPv6 off a tap that is down. Not by its `disable_ipv6`: who writes that while another has
/// the kernel's lock on network devices is sent to try again at once, and again, which takes a processor from
/// whoever has it.
pub(super) fn silence(tap: u32) -> Message {
    route::no_own_address("keep the host's own IPv6 off the tap", tap)
}
