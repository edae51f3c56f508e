//! The daemon's socket: JSON lines. `{"replace": …}` or `{"put": …, "remove": …}` change identities and are
//! answered by `{"epoch": …}` or `{"error": …}`; `{"services": {…}}` with the same within changes services and is
//! answered by `{"generation": …}`; `{"flows": {…}}` is answered by records, a line each, and is the
//! last request of its connection. A follower that reads too slowly is told `{"lost": n}`; nobody waits for it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use super::book::Book;
use super::record::{Filter, Record};
use crate::policy::{Change, Entry, Namespace, Request};
use crate::services::document::Request as ServicesRequest;

/// Longest line: an identity table of some 300,000 pods.
pub const MAX_LINE: u64 = 64 << 20;
/// Connections at a time.
pub const MAX_CLIENTS: usize = 64;
/// Records that wait for a follower.
pub const BACKLOG: usize = 4096;
/// Changes of a kind that wait.
const QUEUE: usize = 256;
/// How long a client may take to send a line that it has begun, or to take what it asked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Puts a change of identities in force and returns its epoch, or says why not.
pub type Apply = Arc<dyn Fn(Change) -> Result<u32, String> + Send + Sync>;
/// The same of services, and their generation.
pub type ApplyServices = Arc<dyn Fn(ServicesRequest) -> Result<u32, String> + Send + Sync>;
type Reply = oneshot::Sender<Result<u32, String>>;
type Changes<R> = mpsc::Sender<(R, Reply)>;

/// What the connections share.
#[derive(Debug, Clone)]
pub struct Hub {
    book: Arc<Mutex<Book>>,
    records: broadcast::Sender<Arc<Record>>,
    identities: Changes<Request>,
    services: Changes<ServicesRequest>,
    longest: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    flows: Option<Filter>,
    replace: Option<Vec<Entry>>,
    put: Option<Vec<Entry>>,
    remove: Option<Vec<std::net::IpAddr>>,
    namespaces: Option<Vec<Namespace>>,
    services: Option<ServicesRequest>,
}

impl Hub {
    /// Around a book. Starts the tasks that change identities and services, one change after the other.
    #[must_use]
    pub fn new(
        book: Arc<Mutex<Book>>,
        longest: u64,
        identities: Apply,
        services: ApplyServices,
    ) -> Self {
        let apply = move |request: Request| {
            let change = Change::try_from(request).map_err(str::to_owned)?;
            identities(change)
        };
        let (identities, services) = (in_turn(Arc::new(apply)), in_turn(services));
        Self { book, records: broadcast::channel(BACKLOG).0, identities, services, longest }
    }

    /// Does something with the book, then tells the followers what is new in it.
    pub fn with<T>(&self, act: impl FnOnce(&mut Book) -> T) -> T {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut book);
        for record in book.take_told() {
            // Nobody may follow.
            let _ = self.records.send(record);
        }
        result
    }

    /// Serves connections. Never ends.
    pub async fn serve(self, listener: UnixListener) {
        let room = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (hub, place) = (self.clone(), Arc::clone(&room).try_acquire_owned());
                    tokio::spawn(async move {
                        let done = match place {
                            Ok(_place) => hub.converse(stream).await,
                            Err(_) => refuse(stream).await,
                        };
                        if let Err(error) = done {
                            tracing::debug!(%error, "a client was broken off");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection accepted");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        loop {
            if reader.fill_buf().await?.is_empty() {
                return Ok(());
            }
            let mut line = Vec::new();
            let mut bounded = (&mut reader).take(self.longest);
            tokio::time::timeout(PATIENCE, bounded.read_until(b'\n', &mut line)).await??;
            if line.last() != Some(&b'\n') && line.len() as u64 >= self.longest {
                let error = format!("a line of more than {} bytes", self.longest - 1);
                return say(&mut writer, &json!({ "error": error })).await;
            }
            let parsed = serde_json::from_slice::<Line>(&line);
            drop(line);
            let (what, answer) = match parsed {
                Ok(Line {
                    flows: Some(filter),
                    replace: None,
                    put: None,
                    remove: None,
                    namespaces: None,
                    services: None,
                }) => {
                    return self.flows(&filter, reader, writer).await;
                }
                Ok(Line { flows: Some(_), .. }) => ("", Err("flows goes alone".to_owned())),
                Ok(Line {
                    services: Some(request),
                    replace: None,
                    put: None,
                    remove: None,
                    namespaces: None,
                    ..
                }) => ("generation", ask(&self.services, request).await),
                Ok(Line { services: Some(_), .. }) => ("", Err("services goes alone".to_owned())),
                Ok(Line { replace, put, remove, namespaces, .. }) => {
                    let (put, remove) = (put.unwrap_or_default(), remove.unwrap_or_default());
                    let namespaces = namespaces.unwrap_or_default();
                    let request = Request { replace, put, remove, namespaces };
                    ("epoch", ask(&self.identities, request).await)
                }
                Err(error) => ("", Err(error.to_string())),
            };
            let answer = match answer {
                Ok(number) => json!({ what: number }),
                Err(error) => json!({ "error": error }),
            };
            say(&mut writer, &answer).await?;
        }
    }

    async fn flows(
        &self,
        filter: &Filter,
        mut reader: BufReader<OwnedReadHalf>,
        mut writer: OwnedWriteHalf,
    ) -> io::Result<()> {
        // Under one lock: nothing is told twice or not at all.
        let (past, mut records) = self.with(|book| (book.select(filter), self.records.subscribe()));
        for record in past {
            say(&mut writer, &*record).await?;
        }
        if !filter.follow {
            return writer.shutdown().await;
        }
        let mut ignored = [0; 64];
        loop {
            let next = tokio::select! {
                next = records.recv() => next,
                read = reader.read(&mut ignored) => match read? {
                    0 => return Ok(()),
                    _ => continue,
                },
            };
            match next {
                Ok(record) if filter.fits(&record) => say(&mut writer, &*record).await?,
                Ok(_) => {}
                Err(RecvError::Lagged(lost)) => say(&mut writer, &json!({ "lost": lost })).await?,
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }
}

async fn say(writer: &mut OwnedWriteHalf, value: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    tokio::time::timeout(PATIENCE, writer.write_all(&line)).await?
}

async fn refuse(stream: UnixStream) -> io::Result<()> {
    let error = format!("more than {MAX_CLIENTS} clients; try again later");
    say(&mut stream.into_split().1, &json!({ "error": error })).await
}

/// Has a change made, and waits for its number.
async fn ask<R>(changes: &Changes<R>, request: R) -> Result<u32, String> {
    let ended = || "the daemon ends".to_owned();
    let (reply, answer) = oneshot::channel();
    changes.send((request, reply)).await.map_err(|_| ended())?;
    answer.await.map_err(|_| ended())?
}

/// A request that several of can be one change.
trait Joins: Clone + Send + 'static {
    /// Adds a later one, if both can be made at once.
    fn join(&mut self, later: &Self) -> bool;
}

impl Joins for ServicesRequest {
    fn join(&mut self, later: &Self) -> bool {
        Self::join(self, later)
    }
}

impl Joins for Request {
    fn join(&mut self, later: &Self) -> bool {
        // Of one alone nothing is known yet: it may be refused.
        Change::try_from(later.clone()).is_ok() && join(self, later)
    }
}

/// Adds a later change to an earlier one, so that both are compiled at once. A whole table stands alone.
fn join(earlier: &mut Request, later: &Request) -> bool {
    if earlier.replace.is_some() || later.replace.is_some() {
        return false;
    }
    let put = |ip: &std::net::IpAddr| later.put.iter().any(|entry| entry.address == *ip);
    earlier.put.retain(|entry| !later.remove.contains(&entry.address) && !put(&entry.address));
    earlier.remove.retain(|ip| !put(ip));
    let named = |name: &str| later.namespaces.iter().any(|space| space.name == name);
    earlier.namespaces.retain(|space| !named(&space.name));
    earlier.put.extend(later.put.iter().cloned());
    earlier.remove.extend(later.remove.iter().copied());
    earlier.namespaces.extend(later.namespaces.iter().cloned());
    true
}

type Make<R> = Arc<dyn Fn(R) -> Result<u32, String> + Send + Sync>;

/// Starts a task that makes changes one after the other.
fn in_turn<R: Joins>(make: Make<R>) -> Changes<R> {
    let (changes, queue) = mpsc::channel(QUEUE);
    tokio::spawn(change(queue, make));
    changes
}

/// What is asked while a change is compiled is one change after it, or several if one of them is refused.
async fn change<R: Joins>(mut queue: mpsc::Receiver<(R, Reply)>, make: Make<R>) {
    let mut held = None;
    loop {
        let first = match held.take() {
            Some(first) => first,
            None => match queue.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let mut joined = first.0.clone();
        let mut all = vec![first];
        while let Ok(next) = queue.try_recv() {
            if joined.join(&next.0) {
                all.push(next);
            } else {
                held = Some(next);
                break;
            }
        }
        let result = put(&make, joined).await;
        if result.is_err() && all.len() > 1 {
            for (request, reply) in all {
                // The client may be gone.
                let _ = reply.send(put(&make, request).await);
            }
            continue;
        }
        for (_, reply) in all {
            let _ = reply.send(result.clone());
        }
    }
}

async fn put<R: Joins>(make: &Make<R>, request: R) -> Result<u32, String> {
    let make = Arc::clone(make);
    let applied = tokio::task::spawn_blocking(move || make(request)).await;
    applied.map_err(|error| format!("the change ended badly: {error}"))?
}
