//! A socket to which everything leads that connects to the pod's localhost on the node's side: containerd does,
//! for `kubectl port-forward`, and what should answer is in the guest.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns};

/// The socket. Whoever connects to a loopback address of the namespace, whatever the port, is connected to it
/// for as long as this lives; the port is that of the connection's own end.
#[derive(Debug)]
pub(crate) struct Loopback {
    pub(crate) listener: TcpListener,
    _link: OwnedFd,
}

impl Loopback {
    /// Opens it in the network namespace at this path, which is entered by a thread that ends with this.
    pub(crate) fn open(netns: &Path) -> io::Result<Self> {
        let netns = File::open(netns)?;
        let make = move || {
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            // Both families', unless there is but one.
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
                .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
            listener.set_nonblocking(true)?;
            let link = joey_ebpf::lookup::attach(netns.as_fd(), listener.as_fd())?;
            Ok(Self { listener, _link: link })
        };
        std::thread::spawn(make)
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    }
}
