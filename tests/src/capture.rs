//! What passes a device of a pod's network namespace, captured there.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, setsockopt,
    socket,
};
use nix::sys::time::TimeVal;

use crate::node::Node;
use crate::{frames, sys};

/// `PACKET_OUTGOING`.
const OUTGOING: u8 = 4;

/// Frames and their bytes.
pub type Amount = (u64, u64);

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// What the pod has sent.
    pub sent: Amount,
    /// What was sent to it.
    pub received: Amount,
}

#[derive(Default)]
struct Counts {
    /// Packets and bytes that the pod has sent, then those that were sent to it.
    numbers: [AtomicU64; 4],
    /// UDP datagrams to the port that is looked for, in the same order.
    datagrams: [AtomicU64; 2],
    lost: AtomicU64,
    over: AtomicBool,
}

/// A capture, until it is dropped.
pub struct Capture {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Begins at a device of a network namespace of the node: of a tap, what the VM sends comes in, and what it is
    /// sent goes out.
    pub fn start(node: &Node, netns: &str, device: &str) -> Result<Self> {
        Self::of_port(node, netns, device, 0)
    }

    /// The same, counting datagrams to a port besides.
    pub fn of_port(node: &Node, netns: &str, device: &str, port: u16) -> Result<Self> {
        let root = format!("/proc/{}/root", node.holder());
        // /var/run leads out of the node.
        let netns = netns.trim_start_matches("/var").trim_start_matches('/');
        let netns = File::open(Path::new(&root).join(netns))?;
        let open = || -> Result<_> {
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            let protocol = SockProtocol::EthAll;
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
            setsockopt(&socket, RcvBufForce, &(64 << 20))?;
            setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000))?;
            let mut links =
                nix::ifaddrs::getifaddrs()?.filter(|link| link.interface_name == device);
            let link = links.find_map(|link| link.address?.as_link_addr().copied());
            let link = link.with_context(|| format!("no device {device}"))?;
            bind(socket.as_raw_fd(), &link)?;
            Ok((socket, link.ifindex()))
        };
        // A thread of its own: it stays in that namespace.
        let (socket, index) = std::thread::scope(|scope| scope.spawn(open).join())
            .unwrap_or_else(|_| bail!("the thread panicked"))?;
        let counts = Arc::new(Counts::default());
        let shared = counts.clone();
        let thread = std::thread::spawn(move || {
            while !shared.over.load(Ordering::Relaxed) {
                let mut head = [0; frames::HEADERS];
                let mut part = [IoSliceMut::new(&mut head)];
                let (raw, whole) = (socket.as_raw_fd(), MsgFlags::MSG_TRUNC);
                let frame = recvmsg::<LinkAddr>(raw, &mut part, None, whole);
                let frame = frame.ok().and_then(|frame| Some((frame.bytes, frame.address?)));
                // What came between making the socket and binding it was of any device.
                if let Some((length, from)) = frame.filter(|(_, from)| from.ifindex() == index) {
                    let place = if from.pkttype() == OUTGOING { 2 } else { 0 };
                    shared.numbers[place].fetch_add(1, Ordering::Relaxed);
                    shared.numbers[place + 1].fetch_add(length as u64, Ordering::Relaxed);
                    if port != 0 && frames::udp_port(&head[..length.min(head.len())]) == Some(port)
                    {
                        shared.datagrams[place / 2].fetch_add(1, Ordering::Relaxed);
                    }
                }
                let lost = sys::packet_losses(&socket).unwrap_or(1);
                shared.lost.fetch_add(lost, Ordering::Relaxed);
            }
        });
        Ok(Self { counts, thread: Some(thread) })
    }

    /// What was seen until now.
    pub fn seen(&self) -> Seen {
        let [a, b, c, d] =
            [0, 1, 2, 3].map(|n: usize| self.counts.numbers[n].load(Ordering::Relaxed));
        Seen { sent: (a, b), received: (c, d) }
    }

    /// Datagrams to the port that is looked for: what the pod has sent, and what was sent to it.
    pub fn datagrams(&self) -> [u64; 2] {
        [0, 1].map(|n: usize| self.counts.datagrams[n].load(Ordering::Relaxed))
    }

    /// Frames that came too fast.
    pub fn lost(&self) -> u64 {
        self.counts.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.counts.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
