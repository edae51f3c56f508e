//! Events from the guest: length, then protobuf; checked before anyone sees them.

use std::io;
use std::time::{Duration, SystemTime};

use joey_protocol::api;
use joey_protocol::ids::{ContainerId, ExecId, IdError};
use joey_protocol::limits::MAX_EVENT;
use joey_protocol::mux::MuxStream;
use protobuf::Message as _;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;

use crate::mesh::connections::Told;

/// Something that happened in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process ended.
    Exit(Exit),
    /// The kernel killed a process of the container for want of memory.
    Oom {
        /// Which container.
        container: ContainerId,
    },
    /// Connections of containers.
    Connections {
        /// Some of them.
        connections: Vec<Told>,
        /// Those that were lost since the sandbox's start.
        lost: u64,
    },
    /// What a disk has in this block of 4096 bytes is not what was once written there.
    Damage {
        /// The disk's slot.
        slot: u32,
        /// The block, from the disk's beginning.
        block: u64,
    },
}

/// The end of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its container.
    pub container: ContainerId,
    /// `None`: the container's init process.
    pub exec: Option<ExecId>,
    /// Its number in the guest.
    pub pid: u32,
    /// Exit code, or 128 + signal.
    pub status: u8,
    /// By the guest's clock.
    pub exited_at: SystemTime,
    /// The kernel killed a process of the container for want of memory.
    pub oom_killed: bool,
}

/// Why the channel ended in the events.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// Too long.
    #[error("the guest announced an event of {0} bytes, at most {MAX_EVENT} are allowed")]
    TooLong(u32),
    /// Not an event.
    #[error("the guest sent an event that does not decode: {0}")]
    Malformed(#[from] protobuf::Error),
    /// No kind that this side knows.
    #[error("the guest sent an event of no known kind")]
    Unknown,
    /// A bad name.
    #[error("the guest sent an event with a bad name: {0}")]
    Name(#[from] IdError),
    /// A number out of range.
    #[error("the guest sent an exit with {what} {value}, which cannot be")]
    Range {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: i64,
    },
    /// A connection that cannot be.
    #[error("the guest sent a connection with {what} {value}, which cannot be")]
    Connection {
        /// What of it.
        what: &'static str,
        /// Its value.
        value: i64,
    },
    /// The stream ended or failed.
    #[error("the guest ended its events: {0}")]
    Ended(#[from] io::Error),
}

/// Reads until something is wrong; the end of the stream is that, too.
pub(super) async fn read(mut stream: MuxStream, events: mpsc::Sender<Event>) -> EventError {
    let mut buffer = Vec::new();
    loop {
        match next(&mut stream, &mut buffer).await {
            // A sandbox that takes no more events is being ended: they go nowhere.
            Ok(event) => drop(events.send(event).await),
            Err(error) => return error,
        }
    }
}

async fn next(stream: &mut MuxStream, buffer: &mut Vec<u8>) -> Result<Event, EventError> {
    let length = stream.read_u32_le().await?;
    if length as usize > MAX_EVENT {
        return Err(EventError::TooLong(length));
    }
    buffer.resize(length as usize, 0);
    stream.read_exact(buffer).await?;
    check(api::Event::parse_from_bytes(buffer)?)
}

fn check(event: api::Event) -> Result<Event, EventError> {
    use joey_protocol::api::event::Event as Kind;
    match event.event {
        Some(Kind::Exit(exit)) => Ok(Event::Exit(check_exit(&exit)?)),
        Some(Kind::Oom(oom)) => Ok(Event::Oom { container: ContainerId::new(&oom.container_id)? }),
        Some(Kind::Damage(damage)) => Ok(Event::Damage { slot: damage.slot, block: damage.block }),
        Some(Kind::Connections(event)) => {
            let connections =
                event.connections.iter().map(Told::check).collect::<Result<_, _>>()?;
            Ok(Event::Connections { connections, lost: event.lost })
        }
        _ => Err(EventError::Unknown),
    }
}

fn check_exit(exit: &api::ExitEvent) -> Result<Exit, EventError> {
    let range = |what, value| EventError::Range { what, value };
    let status = exit.status;
    let status = u8::try_from(status).map_err(|_| range("status", status.into()))?;
    let time = exit.exited_at_ns;
    let time = u64::try_from(time).map_err(|_| range("time", time))?;
    let exec = match exit.exec_id.as_str() {
        "" => None,
        id => Some(ExecId::new(id)?),
    };
    Ok(Exit {
        container: ContainerId::new(&exit.container_id)?,
        exec,
        pid: exit.pid,
        status,
        exited_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(time),
        oom_killed: exit.oom_killed,
    })
}
