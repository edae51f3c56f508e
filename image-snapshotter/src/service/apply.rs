//! A layer's way in: containerd's content store → decompression and digest → tar → store.
//!
//! ```text
//! task: Content.Read ──► thread: decompress, SHA-256 of the stream ──► thread: layer::write
//! ```
//! The pieces are bounded and few, so memory does not grow with the layer; [`crate::memory`] says how
//! many layers go this way at once.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use bytes::Bytes;
use joey_image::layer;
use joey_image::tar::Archive;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use super::api::services::content::v1::ReadContentRequest;
use super::api::services::content::v1::content_client::ContentClient;
use crate::memory::{self, Share, Shares};
use crate::store::{Store, StoreError};

/// Bytes that go from thread to thread at once.
const PIECE: usize = 256 << 10;
/// Pieces on their way from thread to thread.
const PIECES: usize = 8;
/// Messages of containerd's on their way, of up to 1 MiB.
const MESSAGES: usize = 2;

/// Largest window that a zstd stream may ask for, as a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// The format's recommended limit for decoders (RFC 8878), 8 MiB.
    Usual = 23,
    /// What image builders use at most (`zstd --ultra`), 128 MiB.
    Wide = 27,
}

/// What zstd says of a stream that wants a larger window.
const TOO_WIDE: &str = "requires too much memory";

/// How a layer's stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    /// By the first bytes, as containerd does: media types are not always right.
    pub fn of(begin: &[u8]) -> Self {
        match begin {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame (RFC 8878, 3.1.2), as eStargz's and zstd:chunked's begin with.
            [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Bytes from a channel, of which none are the end mark; an error in it is the stream's.
struct Incoming {
    pieces: mpsc::Receiver<Result<Bytes, Status>>,
    current: Bytes,
    ended: bool,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            let piece = self.pieces.blocking_recv();
            let piece = piece.ok_or_else(|| io::Error::other("containerd wants it no more"))?;
            self.current = piece.map_err(|status| io::Error::other(status.to_string()))?;
            self.ended = self.current.is_empty();
        }
        let count = self.current.len().min(buffer.len());
        if let (Some(to), from) = (buffer.get_mut(..count), self.current.split_to(count)) {
            to.copy_from_slice(&from);
        }
        Ok(count)
    }
}

/// The task that reads; it ends with whoever wanted it.
struct Reading(tokio::task::JoinHandle<()>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Bytes from another thread; the sender's end without an end mark is a failure.
struct Decompressed {
    pieces: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    position: usize,
    ended: bool,
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.current.len() && !self.ended {
            let piece = self.pieces.recv().map_err(|_| io::ErrorKind::UnexpectedEof)??;
            self.ended = piece.is_empty();
            (self.current, self.position) = (piece, 0);
        }
        let rest = self.current.get(self.position..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.position += count;
        Ok(count)
    }
}

/// How decompressing has ended.
#[derive(Debug, PartialEq, Eq)]
enum Passed {
    /// With the stream: digest and length of what came out.
    Whole(String, u64),
    /// It needs a larger window.
    TooWide,
    /// Damaged, or nobody wants more.
    Broken,
}

/// Reads `input` to its end and passes it on decompressed.
fn decompress(
    mut input: impl Read,
    output: &SyncSender<io::Result<Vec<u8>>>,
    most: u64,
    window: Window,
) -> Passed {
    let mut begin = Vec::new();
    let read = (&mut input).take(4).read_to_end(&mut begin);
    let compression = Compression::of(&begin);
    let input = io::BufReader::with_capacity(PIECE, io::Cursor::new(begin).chain(input));
    let reader: io::Result<Box<dyn Read>> = read.and_then(|_| {
        let reader: Box<dyn Read> = match compression {
            Compression::None => Box::new(input),
            // Several members, one after the other, are one stream.
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(window as u32)?;
                Box::new(decoder)
            }
        };
        Ok(reader)
    });
    let pass = |reader: io::Result<Box<dyn Read>>| -> io::Result<Option<(Sha256, u64)>> {
        let (mut reader, mut hash, mut total) = (reader?, Sha256::new(), 0_u64);
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let count = (&mut reader).take(PIECE as u64).read_to_end(&mut piece)?;
            hash.update(&piece);
            total += count as u64;
            if total > most {
                let error = format!("the stream has more than {most} bytes (max_layer_bytes)");
                return Err(io::Error::other(error));
            }
            // Nobody there: the other side has failed and says why.
            if output.send(Ok(piece)).is_err() {
                return Ok(None);
            }
            if count == 0 {
                return Ok(Some((hash, total)));
            }
        }
    };
    match pass(reader) {
        Ok(None) => Passed::Broken,
        Ok(Some((hash, total))) => {
            let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            Passed::Whole(format!("sha256:{hex}"), total)
        }
        Err(error) => {
            let wide = compression == Compression::Zstd && error.to_string().contains(TOO_WIDE);
            let _ = output.send(Err(error));
            if wide { Passed::TooWide } else { Passed::Broken }
        }
    }
}

/// Where layers come from and go to.
#[derive(Debug, Clone)]
pub struct Applier {
    store: Arc<Store>,
    content: Channel,
    max_bytes: u64,
}

impl Applier {
    /// `containerd` is its socket, which need not be there yet.
    ///
    /// # Errors
    /// The socket's path cannot be one.
    pub fn new(store: Arc<Store>, containerd: PathBuf, max_bytes: u64) -> Result<Self, Status> {
        let endpoint = format!("unix://{}", containerd.display());
        let endpoint = Endpoint::from_shared(endpoint)
            .map_err(|error| Status::invalid_argument(format!("containerd: {error}")))?;
        let content = endpoint
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .connect_lazy();
        Ok(Self { store, content, max_bytes })
    }

    /// Reads `digest` from containerd's content store and applies it to the active snapshot `key`.
    /// Gives digest and length of the uncompressed stream.
    ///
    /// # Errors
    /// containerd does not give it, or it is not a layer; the message names layer and entry.
    pub async fn apply(
        &self,
        namespace: MetadataValue<tonic::metadata::Ascii>,
        digest: String,
        key: String,
    ) -> Result<(String, u64), Status> {
        let begin = Instant::now();
        let mut window = Window::Usual;
        let applied = loop {
            let input = (namespace.clone(), digest.clone());
            match self.once(input, key.clone(), window).await {
                Ok(None) if window == Window::Usual => window = Window::Wide,
                Ok(None) => {
                    let problem = format!("its zstd stream {TOO_WIDE}: a window of over 128 MiB");
                    break Err(Status::failed_precondition(format!("joey-snapshotter: {problem}")));
                }
                Ok(Some(done)) => break Ok(done),
                Err(status) => break Err(status),
            }
        };
        let metrics = &self.store.metrics;
        metrics.apply_time.add_since(begin);
        match &applied {
            Ok((_, bytes)) => {
                metrics.applies.add(1);
                metrics.applied_bytes.add(*bytes);
            }
            Err(_) => metrics.applies_refused.add(1),
        }
        applied.map_err(|status| {
            tracing::warn!(layer = digest, error = status.message(), "layer not applied");
            Status::new(status.code(), format!("layer {digest}: {}", status.message()))
        })
    }

    /// One try; `None` if the stream needs a larger window.
    async fn once(
        &self,
        (namespace, digest): (MetadataValue<tonic::metadata::Ascii>, String),
        key: String,
        window: Window,
    ) -> Result<Option<(String, u64)>, Status> {
        let memory = &self.store.memory;
        let share = share(if window == Window::Usual { &memory.applies } else { &memory.large });
        let share = share.await?;
        let (pieces, reading) = self.read(namespace, digest.clone());
        let (store, max) = (Arc::clone(&self.store), self.max_bytes);
        let applied = tokio::task::spawn_blocking(move || {
            let input = Incoming { pieces, current: Bytes::new(), ended: false };
            let applied = write(&store, input, &key, max, window);
            drop(share);
            applied
        });
        // Whoever waits here may be gone before, and then what is read is cut off.
        let applied = applied.await;
        drop(reading);
        match applied {
            Ok(Ok(done)) => {
                if let Some((diff, bytes)) = &done {
                    tracing::info!(layer = digest, diff, bytes, "layer applied");
                }
                Ok(done)
            }
            Ok(Err(error)) => Err(Status::from(error)),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    /// Reads from containerd, until the receiver is dropped or the task ended.
    fn read(
        &self,
        namespace: MetadataValue<tonic::metadata::Ascii>,
        digest: String,
    ) -> (mpsc::Receiver<Result<Bytes, Status>>, Reading) {
        let (sender, pieces) = mpsc::channel(MESSAGES);
        let mut request =
            tonic::Request::new(ReadContentRequest { digest, ..ReadContentRequest::default() });
        request.metadata_mut().insert("containerd-namespace", namespace);
        let mut client =
            ContentClient::new(self.content.clone()).max_decoding_message_size(16 << 20);
        let reading = tokio::spawn(async move {
            let stream = client.read(request).await;
            let mut stream = match stream {
                Ok(stream) => stream.into_inner(),
                Err(status) => return drop(sender.send(Err(status)).await),
            };
            loop {
                let piece = match stream.message().await {
                    Ok(Some(message)) if message.data.is_empty() => continue,
                    Ok(message) => Ok(message.map_or_else(Bytes::new, |message| message.data)),
                    Err(status) => Err(status),
                };
                let last = piece.as_ref().map_or(true, Bytes::is_empty);
                if sender.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        (pieces, Reading(reading))
    }
}

/// Waits for a share of memory on a thread that may.
async fn share(shares: &Arc<Shares>) -> Result<Share, Status> {
    let shares = Arc::clone(shares);
    let taken = tokio::task::spawn_blocking(move || shares.take()).await;
    taken.map_err(|error| Status::internal(error.to_string()))
}

/// Makes a layer of a compressed stream and applies it; `None` if it needs a larger window.
pub(crate) fn write(
    store: &Store,
    input: impl Read + Send,
    key: &str,
    most: u64,
    window: Window,
) -> Result<Option<(String, u64)>, StoreError> {
    let new = store.begin()?;
    let (sender, pieces) = sync_channel(PIECES);
    let (written, passed) = std::thread::scope(|scope| {
        let passed = scope.spawn(move || decompress(input, &sender, most, window));
        let stream = Decompressed { pieces, current: Vec::new(), position: 0, ended: false };
        let mut stream = io::BufReader::with_capacity(PIECE, stream);
        let written = layer::write(&new.path, Archive::new(&mut stream), most).and_then(|_| {
            // The digest is of the whole stream, what comes after tar's end mark included.
            io::copy(&mut stream, &mut io::sink())
                .map_err(layer::io_error("read what comes after the entries of", &new.path))
        });
        drop(stream);
        (written, passed.join())
    });
    memory::trim();
    match passed {
        Ok(Passed::TooWide) => Ok(None),
        Ok(Passed::Whole(diff, bytes)) => {
            written?;
            store.apply(key, &diff, &new)?;
            Ok(Some((diff, bytes)))
        }
        _ => {
            written?;
            let error = io::Error::other("its compressed stream is damaged or cut off");
            Err(StoreError::Layer(layer::io_error("decompress", &new.path)(error)))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::Kind;

    /// A store with an active snapshot.
    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.prepare("key", "", Kind::Active, BTreeMap::new()).unwrap();
        (dir, store)
    }

    fn layer() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(3 << 20);
        builder.append_data(&mut header, "f", &*vec![7; 3 << 20]).unwrap();
        builder.into_inner().unwrap()
    }

    fn zstd(stream: &[u8], window: u32) -> Vec<u8> {
        use std::io::Write as _;
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window).unwrap();
        encoder.write_all(stream).unwrap();
        encoder.finish().unwrap()
    }

    /// Cut off by a cancelled request it must not look like a whole one: this ends between two entries.
    #[test]
    fn a_stream_that_nobody_reads_any_more_is_no_layer() {
        let (_dir, store) = store();
        let stream = Bytes::from(layer());
        for whole in [false, true] {
            let (sender, pieces) = mpsc::channel(MESSAGES);
            sender.blocking_send(Ok(stream.slice(..512 + (3 << 20)))).unwrap();
            if whole {
                sender.blocking_send(Ok(Bytes::new())).unwrap();
            }
            drop(sender);
            let input = Incoming { pieces, current: Bytes::new(), ended: false };
            let written = write(&store, input, "key", 1 << 30, Window::Usual);
            assert_eq!(written.is_ok(), whole, "{written:?}");
        }
    }

    #[test]
    fn zstd_streams_are_layers_and_wide_windows_are_told() {
        let stream = layer();
        let (_dir, store) = store();
        let take = |stream: &[u8], window| write(&store, stream, "key", 1 << 30, window).unwrap();
        let hash: String = Sha256::digest(&stream).iter().map(|b| format!("{b:02x}")).collect();
        let expected = Some((format!("sha256:{hash}"), stream.len() as u64));
        assert_eq!(take(&zstd(&stream, 20), Window::Usual), expected);
        assert_eq!(take(&zstd(&stream, 25), Window::Usual), None);
        assert_eq!(take(&zstd(&stream, 25), Window::Wide), expected);
        // A small frame first, as an attacker might hide the window.
        let two = [zstd(&stream[..1 << 20], 20), zstd(&stream[1 << 20..], 25)].concat();
        assert_eq!(take(&two, Window::Usual), None);
    }

    #[test]
    fn a_bomb_is_refused_by_its_limit_whatever_is_in_it() {
        use std::io::Write as _;
        let (dir, store) = store();
        let zeros = vec![0; 8 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&layer()).unwrap();
        // After tar's end mark, where nobody looks.
        for _ in 0..4 {
            gzip.write_all(&zeros).unwrap();
        }
        let gzip = gzip.finish().unwrap();
        assert!(gzip.len() < 1 << 20);
        let refused = |stream: &[u8], most| {
            write(&store, stream, "key", most, Window::Usual).unwrap_err().to_string()
        };
        let error = refused(&gzip, 16 << 20);
        assert!(
            error.contains("after the entries") && error.contains("max_layer_bytes"),
            "{error}"
        );
        let error = refused(&gzip, 2 << 20);
        assert!(error.contains("\"f\"") && error.contains("max_layer_bytes"), "{error}");
        let error = refused(&gzip[..gzip.len() / 2], 1 << 30);
        assert!(error.contains("incomplete"), "{error}");
        // Nothing of them is left.
        for folder in ["layers", "new"] {
            assert_eq!(std::fs::read_dir(dir.path().join(folder)).unwrap().count(), 0, "{folder}");
        }
    }
}
