//! Files of the host that containers see live: a FUSE mount whose messages the host answers.
//!
//! The agent only carries them, between `/dev/fuse` and a stream of the channel; it never looks at such a
//! mount itself, or it would wait for an answer that nobody carries.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use joey_protocol::ids::{FORGET, VolumeId};
use joey_protocol::limits::STREAM_FIRST_STDIO;
use joey_protocol::mux::{Mux, MuxStream, OpenError};
use nix::mount::{MsFlags, mount};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;

use crate::apart::apart;
use crate::fd_io::FdIo;
use crate::log::warning;
use crate::reap::Reaper;

/// Where shares are mounted.
pub(crate) const SHARES: &str = "/run/joey/shares";
/// Longest message, of either side: 1 MiB of content, which is what FUSE's servers offer, and a header.
const MESSAGE: usize = (1 << 20) + 4096;
/// Shortest answer: `struct fuse_out_header`.
const HEADER: usize = 16;

/// Why files are not shared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// A stream's number is one of the channel's own.
    #[error("share {volume}: stream {stream} is not for shares")]
    Reserved { volume: VolumeId, stream: u32 },
    /// The stream does not open.
    #[error("share {volume}: {source}")]
    Stream { volume: VolumeId, source: OpenError },
    /// The kernel refused.
    #[error("share {volume}: {source}")]
    Mount { volume: VolumeId, source: io::Error },
}

/// Mounts what is asked for on this stream.
pub(crate) fn mount_share(
    mux: &Mux,
    reaper: &Reaper,
    volume: &VolumeId,
    stream: u32,
) -> Result<(), ShareError> {
    let volume = volume.clone();
    if stream < STREAM_FIRST_STDIO {
        return Err(ShareError::Reserved { volume, stream });
    }
    let stream = match mux.open(stream) {
        Ok(stream) => stream,
        Err(source) => return Err(ShareError::Stream { volume, source }),
    };
    match mount_fuse(&volume) {
        Ok(device) => {
            let reaper = reaper.clone();
            tokio::spawn(async move {
                if let Err(error) = carry(stream, device, &reaper).await {
                    warning!("share {volume}: {error}");
                }
            });
            Ok(())
        }
        Err(source) => Err(ShareError::Mount { volume, source }),
    }
}

/// The device that answers go to. Who may do what is decided here, as for any of the guest's file systems.
fn mount_fuse(volume: &VolumeId) -> io::Result<FdIo> {
    let place = Path::new(SHARES).join(volume.as_str());
    fs::create_dir_all(SHARES)?;
    fs::create_dir(&place)?;
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    mount(Some("host"), &place, Some("fuse"), MsFlags::MS_NODEV, Some(options.as_str()))?;
    FdIo::new(OwnedFd::from(device))
}

/// Carries messages until the host's end closes: from then on the mount answers `ENOTCONN`.
async fn carry(stream: MuxStream, device: FdIo, reaper: &Reaper) -> io::Result<()> {
    let crowded = Notify::new();
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let (mut questions, mut answers) = tokio::io::split(device);
    let asking = async {
        let mut message = Vec::with_capacity(MESSAGE);
        loop {
            message.clear();
            match questions.read_buf(&mut message).await {
                Ok(0) => return Ok(()),
                Ok(_) => to_host.write_all(&message).await?,
                // The question was taken back, or the file system is unmounted.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    let answering = async {
        let mut message = Vec::new();
        while let Ok(length) = from_host.read_u32_le().await {
            let size = length as usize;
            if !(HEADER..=MESSAGE).contains(&size) {
                return Err(io::Error::other(format!("the host answers in {size} bytes")));
            }
            message.clear();
            message.extend_from_slice(&length.to_le_bytes());
            message.resize(size, 0);
            from_host.read_exact(message.get_mut(size_of::<u32>()..).unwrap_or_default()).await?;
            if message == FORGET {
                crowded.notify_one();
                continue;
            }
            match answers.write(&message).await {
                // Nobody waits for it any more.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                written => drop(written?),
            }
        }
        Err(io::Error::other("the host does not serve it any more"))
    };
    tokio::select! {
        ended = asking => ended,
        ended = answering => ended,
        ended = forget(&crowded, reaper) => ended,
    }
}

/// Makes the kernel forget files that nobody has open, whenever the host has too many open for it.
async fn forget(crowded: &Notify, reaper: &Reaper) -> io::Result<()> {
    /// With what is known of names goes what is known of a share's files: FUSE keeps those no longer.
    const NAMES: &[u8] = b"2";
    loop {
        crowded.notified().await;
        let forgotten = apart(reaper, || {
            fs::write("/proc/sys/vm/drop_caches", NAMES).map_err(|error| error.to_string())
        });
        if let Ok(Err(error)) | Err(error) = forgotten.await.map_err(|error| error.to_string()) {
            warning!("files of shares are not forgotten: {error}");
        }
    }
}
