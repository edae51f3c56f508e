//! What the daemon has done, as Prometheus' text format (version 0.0.4) on a Unix socket.
//!
//! Any HTTP request is answered so, one after the other: whoever may connect is the host's own.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use joey_image::layer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::store::Store;

/// Longest request.
const MAX_REQUEST: usize = 8 << 10;
/// Longest that a request may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds the microseconds since then.
    pub fn add_since(&self, begin: Instant) {
        self.add(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters, since the daemon's start.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Layers applied.
    pub applies: Counter,
    /// Layers that were not taken.
    pub applies_refused: Counter,
    /// Microseconds that applying took, with waiting for a turn.
    pub apply_time: Counter,
    /// Uncompressed bytes of layers applied.
    pub applied_bytes: Counter,
    /// Disks made.
    pub disks: Counter,
    /// Disks that could not be made.
    pub disks_refused: Counter,
    /// Microseconds that making disks took, with waiting for a turn.
    pub disk_time: Counter,
    /// Layers and disks removed because no snapshot needed them.
    pub collected: Counter,
}

fn seconds(counter: &Counter) -> f64 {
    Duration::from_micros(counter.get()).as_secs_f64()
}

/// Blobs in a folder of the store: how many, and bytes on disk.
fn blobs(folder: &Path) -> (u64, u64) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .fold((0, 0), |(count, bytes), entry| (count + 1, bytes + layer::disk_bytes(&entry.path())))
}

/// The text for Prometheus.
pub fn text(store: &Store) -> String {
    let (layers, layer_bytes) = blobs(&store.root().join("layers"));
    let (disks, disk_bytes) = blobs(&store.root().join("disks"));
    let metrics = &store.metrics;
    let mut text = String::new();
    let mut one = |name: &str, kind: &str, help: &str, values: &[(&str, f64)]| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "# HELP joey_snapshotter_{name} {help}");
        let _ = writeln!(text, "# TYPE joey_snapshotter_{name} {kind}");
        for (label, value) in values {
            let _ = writeln!(text, "joey_snapshotter_{name}{label} {value}");
        }
    };
    let count = |counter: &Counter| counter.get() as f64;
    one(
        "blobs",
        "gauge",
        "Layers and disks in the store.",
        &[(r#"{kind="layer"}"#, layers as f64), (r#"{kind="disk"}"#, disks as f64)],
    );
    one(
        "blob_bytes",
        "gauge",
        "Bytes on disk of the store's layers and disks.",
        &[(r#"{kind="layer"}"#, layer_bytes as f64), (r#"{kind="disk"}"#, disk_bytes as f64)],
    );
    one(
        "applies_total",
        "counter",
        "Layers that were applied, or not taken.",
        &[
            (r#"{result="ok"}"#, count(&metrics.applies)),
            (r#"{result="refused"}"#, count(&metrics.applies_refused)),
        ],
    );
    one(
        "apply_seconds_total",
        "counter",
        "Time that applying layers took.",
        &[("", seconds(&metrics.apply_time))],
    );
    one(
        "applied_bytes_total",
        "counter",
        "Uncompressed bytes of the layers applied.",
        &[("", count(&metrics.applied_bytes))],
    );
    one(
        "disks_total",
        "counter",
        "Disks of images that were made, or could not be.",
        &[
            (r#"{result="ok"}"#, count(&metrics.disks)),
            (r#"{result="refused"}"#, count(&metrics.disks_refused)),
        ],
    );
    one(
        "disk_seconds_total",
        "counter",
        "Time that making disks took.",
        &[("", seconds(&metrics.disk_time))],
    );
    one(
        "collected_total",
        "counter",
        "Layers and disks removed since no snapshot needs them.",
        &[("", count(&metrics.collected))],
    );
    text
}

/// Answers requests until the socket fails.
pub async fn serve(listener: UnixListener, store: Arc<Store>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let answered = tokio::time::timeout(PATIENCE, answer(stream, &store)).await;
                if let Ok(Err(error)) = answered {
                    tracing::debug!(%error, "a request for metrics was broken off");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "metrics: no connection accepted");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, store: &Arc<Store>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let store = Arc::clone(store);
    let body = tokio::task::spawn_blocking(move || text(&store)).await?;
    let length = body.len();
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_answered_with_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("store")).unwrap());
        store.prepare("x", "", crate::store::Kind::View, Default::default()).unwrap();
        store.disk("").unwrap();
        let path = dir.path().join("metrics");
        let server = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), store));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        server.abort();
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
        for line in [
            "# TYPE joey_snapshotter_disks_total counter",
            r#"joey_snapshotter_disks_total{result="ok"} 1"#,
            r#"joey_snapshotter_blobs{kind="disk"} 1"#,
            r#"joey_snapshotter_applies_total{result="refused"} 0"#,
        ] {
            assert!(answer.lines().any(|other| other == line), "{line}: {answer}");
        }
    }
}
