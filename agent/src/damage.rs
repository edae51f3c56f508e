//! Blocks of images that are not what they were: dm-verity tells of them by a notice of the kernel's
//! (a uevent, `NETLINK_KOBJECT_UEVENT`) with `DM_VERITY_ERR_BLOCK_NR=type,block`.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};
use tokio::io::AsyncReadExt as _;

use crate::events::Events;
use crate::fd_io::FdIo;

/// The kernel's own notices.
const KERNEL: u32 = 1;
/// A notice is at most this long (`UEVENT_BUFFER_SIZE`, and its path).
const NOTICE: usize = 4096;

/// Listens from now on.
pub(crate) fn listen() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &NetlinkAddr::new(0, KERNEL))?;
    Ok(listener)
}

/// Tells the host of each damaged block, once.
pub(crate) async fn watch(listener: OwnedFd, events: Events) -> io::Result<()> {
    let mut listener = FdIo::new(listener)?;
    let mut notice = Vec::with_capacity(NOTICE);
    let mut told = HashSet::new();
    loop {
        notice.clear();
        match listener.read_buf(&mut notice).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // Some were lost: the reader gets its error, and another read another notice.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
            Err(error) => return Err(error),
        }
        if let Some((slot, block)) = parse(&notice).filter(|found| told.insert(*found)) {
            events.damage(slot, block);
        }
    }
}

/// The disk slot whose device it is about, and the block.
fn parse(notice: &[u8]) -> Option<(u32, u64)> {
    let field = |name: &str| {
        let fields = notice.split(|byte| *byte == 0).filter_map(|it| std::str::from_utf8(it).ok());
        fields.filter_map(|field| field.strip_prefix(name)).next()
    };
    let (_, block) = field("DM_VERITY_ERR_BLOCK_NR=")?.split_once(',')?;
    let slot = field("DEVNAME=")?.strip_prefix("dm-")?;
    Some((slot.parse().ok()?, block.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_of_dm_verity_are_told_from_others() {
        let notice = b"change@/devices/virtual/block/dm-3\0ACTION=change\0DEVNAME=dm-3\0\
            DM_VERITY_ERR_BLOCK_NR=0,4711\0SEQNUM=9\0";
        assert_eq!(parse(notice), Some((3, 4711)));
        assert_eq!(parse(b"change@/devices/virtual/block/dm-3\0DEVNAME=dm-3\0"), None);
        assert_eq!(parse(b"DEVNAME=vda\0DM_VERITY_ERR_BLOCK_NR=0,1\0"), None);
    }
}
