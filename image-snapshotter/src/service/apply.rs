//! A layer's way in: containerd's content store → decompression and digest → tar → store.
//!
//! ```text
//! task: Content.Read ──► thread: decompress, SHA-256 of the stream ──► thread: layer::write
//! ```
//! The pieces are bounded and few, so memory does not grow with the layer.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use super::api::services::content::v1::ReadContentRequest;
use super::api::services::content::v1::content_client::ContentClient;
use crate::layer;
use crate::store::{Store, StoreError};

/// Bytes that go from thread to thread at once.
const PIECE: usize = 256 << 10;
/// Pieces on their way.
const PIECES: usize = 8;
/// Largest window that a zstd stream may ask for, as a power of two (the format's recommended limit
/// for decoders is 8 MiB; image builders use up to 128 MiB).
const ZSTD_WINDOW: u32 = 27;

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

/// Bytes from a channel; an error in it is the stream's.
struct Incoming {
    pieces: mpsc::Receiver<Result<Bytes, Status>>,
    current: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => {
                    self.current = piece.map_err(|status| io::Error::other(status.to_string()))?;
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        if let (Some(to), from) = (buffer.get_mut(..count), self.current.split_to(count)) {
            to.copy_from_slice(&from);
        }
        Ok(count)
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

/// Reads `input` to its end and passes it on decompressed; gives digest and length of what came out.
fn decompress(
    mut input: impl Read,
    output: &SyncSender<io::Result<Vec<u8>>>,
    most: u64,
) -> Option<(String, u64)> {
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
                decoder.window_log_max(ZSTD_WINDOW)?;
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
        Ok(done) => done.map(|(hash, total)| {
            let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            (format!("sha256:{hex}"), total)
        }),
        Err(error) => {
            let _ = output.send(Err(error));
            None
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
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
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
        let (sender, pieces) = mpsc::channel(PIECES);
        let mut request = tonic::Request::new(ReadContentRequest {
            digest: digest.clone(),
            ..ReadContentRequest::default()
        });
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
                    Ok(Some(message)) => Ok(message.data),
                    Ok(None) => return,
                    Err(status) => Err(status),
                };
                let failed = piece.is_err();
                if sender.send(piece).await.is_err() || failed {
                    return;
                }
            }
        });
        let (store, max) = (Arc::clone(&self.store), self.max_bytes);
        let named = digest.clone();
        let applied = tokio::task::spawn_blocking(move || {
            let new = store.begin()?;
            let input = Incoming { pieces, current: Bytes::new() };
            let (sender, pieces) = sync_channel(PIECES);
            let (written, passed) = std::thread::scope(|scope| {
                let passed = scope.spawn(move || decompress(input, &sender, max));
                let stream =
                    Decompressed { pieces, current: Vec::new(), position: 0, ended: false };
                let mut stream = io::BufReader::with_capacity(PIECE, stream);
                let written = layer::write(&new.path, &mut stream, max);
                // The digest is of the whole stream, what comes after tar's end mark included.
                if written.is_ok() {
                    let _ = io::copy(&mut stream, &mut io::sink());
                }
                drop(stream);
                (written, passed.join())
            });
            let totals = written?;
            let Ok(Some((diff, bytes))) = passed else {
                let error = io::Error::other("its compressed stream is damaged or cut off");
                return Err(StoreError::Layer(layer::io_error("decompress", &new.path)(error)));
            };
            store.apply(&key, &diff, &new)?;
            tracing::info!(layer = digest, diff, bytes, entries = totals.entries, "layer applied");
            Ok((diff, bytes))
        });
        let applied = applied.await;
        reading.abort();
        match applied {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                tracing::warn!(layer = named, %error, "layer not applied");
                let status = Status::from(error);
                Err(Status::new(status.code(), format!("layer {named}: {}", status.message())))
            }
            Err(error) => Err(Status::internal(format!("layer {named}: {error}"))),
        }
    }
}
