//! Observe mode on the host: the last connections that a sandbox's guest has told of, and who waits for more.
//!
//! The guest's word, which is checked for form and costs nothing but this ring. Its shim answers for it, to root, on
//! the socket that containerd uses: service [`SERVICE`], a request and an answer in JSON.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim::protos::ttrpc::{Code, Error, Request, Response, Result, get_status};
use joey_protocol::api;
use joey_protocol::limits::MAX_COMMAND;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::guest::EventError;
use crate::sandbox::Handle;

/// The service's name.
pub const SERVICE: &str = "joey.shim.v1.Connections";
/// Its only method.
pub const METHOD: &str = "List";
/// Connections that are remembered.
const MOST: usize = 4096;
/// Connections in one answer.
const PAGE: usize = 1024;
/// How long a request waits at most for what it asks for.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked for.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// From this one on, as an earlier answer said; else from the oldest one that is known.
    pub from: Option<u64>,
    /// If there is none yet, wait for one.
    pub wait: bool,
}

/// What is answered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Page {
    /// Oldest first.
    pub connections: Vec<Told>,
    /// Where the next answer begins.
    pub next: u64,
    /// Lost in the guest, which had more than it may tell, since its start.
    pub lost: u64,
    /// Forgotten here since `from`.
    pub skipped: u64,
}

/// What happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// It was made; of UDP: a socket has a partner that it had not before.
    Opened,
    /// It could not be made.
    Failed,
    /// Both sides have ended it.
    Closed,
    /// One side has broken it off, or is not heard of any more.
    Reset,
}

/// One event of a connection, as the guest tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// When, by the guest's clock, in nanoseconds since 1970.
    pub at_ns: u64,
    /// What happened.
    pub what: What,
    /// containerd's id of the container; empty where it is not known.
    pub container: String,
    /// The process's number in the guest.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its command, at most 16 bytes of it. Anything can be in there.
    pub command: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `in` if the other end has opened it, else `out`.
    pub direction: String,
    /// The pod's end; port 0 where it is not known.
    pub local_ip: IpAddr,
    /// Its port.
    pub local_port: u16,
    /// The other end.
    pub remote_ip: IpAddr,
    /// Its port.
    pub remote_port: u16,
    /// The same number at a connection's beginning and end.
    pub socket: u64,
    /// Bytes of payload sent, at the end of a TCP connection.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
}

impl Told {
    /// Checks what a guest says.
    ///
    /// # Errors
    /// What cannot be.
    pub(crate) fn check(it: &api::Connection) -> std::result::Result<Self, EventError> {
        let range = |what, value: i64| EventError::Connection { what, value };
        let ip = |bytes: &[u8]| -> std::result::Result<IpAddr, EventError> {
            let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
            v4.or_else(|_| v6()).map_err(|_| range("an address of this length", bytes.len() as i64))
        };
        let port = |port: u32| u16::try_from(port).map_err(|_| range("port", port.into()));
        if it.command.len() > MAX_COMMAND {
            return Err(range("a command of this length", it.command.len() as i64));
        }
        let what = match it.what.enum_value() {
            Ok(api::What::OPENED) => What::Opened,
            Ok(api::What::FAILED) => What::Failed,
            Ok(api::What::CLOSED) => What::Closed,
            Ok(api::What::RESET) => What::Reset,
            Err(number) => return Err(range("kind", number.into())),
        };
        Ok(Self {
            at_ns: u64::try_from(it.at_ns).map_err(|_| range("time", it.at_ns))?,
            what,
            container: match it.container_id.as_str() {
                "" => String::new(),
                id => joey_protocol::ids::ContainerId::new(id)?.to_string(),
            },
            pid: it.process,
            uid: it.user,
            command: String::from_utf8_lossy(&it.command).into_owned(),
            protocol: match it.protocol {
                6 => "tcp".to_owned(),
                17 => "udp".to_owned(),
                other => return Err(range("protocol", other.into())),
            },
            direction: if it.inbound { "in" } else { "out" }.to_owned(),
            local_ip: ip(&it.local_ip)?,
            local_port: port(it.local_port)?,
            remote_ip: ip(&it.remote_ip)?,
            remote_port: port(it.remote_port)?,
            socket: it.socket,
            sent: it.sent,
            received: it.received,
        })
    }
}

#[derive(Debug, Default)]
struct Ring {
    last: VecDeque<Told>,
    /// The number of the next one.
    next: u64,
    /// Lost in the guest, in all.
    lost: u64,
}

/// The last connections of a sandbox.
#[derive(Debug)]
pub struct Book {
    ring: Mutex<Ring>,
    /// The number of the next one, for who waits.
    next: watch::Sender<u64>,
}

impl Default for Book {
    fn default() -> Self {
        Self { ring: Mutex::default(), next: watch::Sender::new(0) }
    }
}

impl Book {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the guest tells; `lost` is its count since its start.
    pub fn note(&self, connections: Vec<Told>, lost: u64) {
        let next = {
            let mut ring = self.ring();
            ring.next += connections.len() as u64;
            ring.lost = lost;
            ring.last.extend(connections);
            let surplus = ring.last.len().saturating_sub(MOST);
            ring.last.drain(..surplus);
            ring.next
        };
        self.next.send_replace(next);
    }

    /// What is known from a number on.
    #[must_use]
    pub fn page(&self, from: Option<u64>) -> Page {
        let ring = self.ring();
        let oldest = ring.next - ring.last.len() as u64;
        let from = from.unwrap_or(oldest).min(ring.next);
        let begin = from.max(oldest);
        let skipped = usize::try_from(begin - oldest).unwrap_or(usize::MAX);
        let connections: Vec<Told> = ring.last.iter().skip(skipped).take(PAGE).cloned().collect();
        let next = begin + connections.len() as u64;
        Page { connections, next, lost: ring.lost, skipped: begin - from }
    }

    async fn answer(&self, query: &Query) -> Page {
        let page = self.page(query.from);
        if !query.wait || !page.connections.is_empty() {
            return page;
        }
        let mut next = self.next.subscribe();
        let more = next.wait_for(|next| *next > page.next);
        // Too late is as good as nothing new.
        let _ = tokio::time::timeout(PATIENCE, more).await;
        self.page(Some(page.next))
    }
}

struct List(Handle);

#[async_trait]
impl MethodHandler for List {
    async fn handler(&self, _: TtrpcContext, request: Request) -> Result<Response> {
        let refuse = |code, text: String| Error::RpcStatus(get_status(code, text));
        let query: Query = serde_json::from_slice(&request.payload)
            .map_err(|error| refuse(Code::INVALID_ARGUMENT, format!("query: {error}")))?;
        let page = self.0.connections().answer(&query).await;
        let payload =
            serde_json::to_vec(&page).map_err(|error| refuse(Code::INTERNAL, error.to_string()))?;
        let mut response = Response::new();
        response.set_status(get_status(Code::OK, String::new()));
        response.payload = payload;
        Ok(response)
    }
}

/// The service, to be registered beside containerd's.
#[must_use]
pub fn services(sandbox: &Handle) -> HashMap<String, Service> {
    let list: Box<dyn MethodHandler + Send + Sync> = Box::new(List(sandbox.clone()));
    let methods = HashMap::from([(METHOD.to_owned(), list)]);
    HashMap::from([(SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> api::Connection {
        api::Connection {
            at_ns: 1,
            what: api::What::OPENED.into(),
            command: b"sh".to_vec(),
            protocol: 6,
            local_ip: vec![10, 0, 0, 1],
            remote_ip: vec![0; 16],
            remote_port: 80,
            ..Default::default()
        }
    }

    #[test]
    fn what_a_guest_says_is_checked() {
        let told = Told::check(&connection()).unwrap();
        assert_eq!((told.protocol.as_str(), told.remote_port), ("tcp", 80));
        let faults: [fn(&mut api::Connection); 7] = [
            |it| it.at_ns = -1,
            |it| it.protocol = 1,
            |it| it.local_port = 65536,
            |it| it.remote_ip.truncate(5),
            |it| it.command = vec![b'x'; 17],
            |it| it.container_id = "../x".to_owned(),
            |it| it.what = protobuf::EnumOrUnknown::from_i32(9),
        ];
        for (index, fault) in faults.iter().enumerate() {
            let mut it = connection();
            fault(&mut it);
            assert!(Told::check(&it).is_err(), "fault {index}");
        }
    }

    #[tokio::test]
    async fn the_last_are_kept_and_the_lost_counted() {
        let book = Book::default();
        let told = Told::check(&connection()).unwrap();
        book.note(vec![told.clone(); 10], 0);
        let page = book.page(None);
        assert_eq!((page.connections.len(), page.next, page.lost), (10, 10, 0));
        for _ in 0..10 {
            book.note(vec![told.clone(); 500], 7);
        }
        let page = book.page(Some(page.next));
        // 5010 in all, of which 4096 are kept: those from 914 on.
        assert_eq!((page.connections.len(), page.next), (PAGE, 914 + 1024));
        assert_eq!((page.lost, page.skipped), (7, 904));
        let end = book.page(Some(9999));
        assert_eq!((end.connections.len(), end.next), (0, 5010));
        let query = Query { from: Some(5010), wait: true };
        let (page, ()) = tokio::join!(book.answer(&query), async {
            tokio::task::yield_now().await;
            book.note(vec![told.clone()], 7);
        });
        assert_eq!((page.connections.len(), page.next), (1, 5011));
    }
}
