//! The socket: garbage, too much, too many, too slow.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{EventKind, SECOND, book, event, flow, key};
use crate::flows::server::{BACKLOG, Hub, MAX_CLIENTS};

struct Daemon {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    hub: Hub,
    applied: Arc<AtomicUsize>,
}

fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let applied = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&applied);
    let apply = Arc::new(move |_| {
        std::thread::sleep(Duration::from_millis(20));
        Ok(count.fetch_add(1, Ordering::SeqCst) as u32 + 1)
    });
    let hub = Hub::new(Arc::new(Mutex::new(book(64))), 4096, apply);
    tokio::spawn(hub.clone().serve(UnixListener::bind(&path).unwrap()));
    Daemon { _dir: dir, path, hub, applied }
}

async fn ask(daemon: &Daemon, line: &[u8]) -> String {
    let mut stream = UnixStream::connect(&daemon.path).await.unwrap();
    // What is too long is not read to its end.
    let _ = stream.write_all(line).await;
    let mut answer = String::new();
    let _ = BufReader::new(stream).read_line(&mut answer).await;
    answer
}

#[tokio::test]
async fn garbage_changes_nothing() {
    let daemon = daemon();
    for line in [
        "x\n",
        "{}\n",
        "[]\n",
        "{\"puts\":[]}\n",
        "{\"flows\":{\"x\":1}}\n",
        "\u{0}\n",
        "{\"put\":[\n",
    ] {
        let answer = ask(&daemon, line.as_bytes()).await;
        assert!(answer.contains("error"), "{line}: {answer}");
    }
    let answer = ask(&daemon, &[b'a'; 5000]).await;
    assert!(answer.is_empty() || answer.contains("4095 bytes"), "{answer}");
    assert_eq!(daemon.applied.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_burst_is_few_changes() {
    let daemon = daemon();
    let lines: Vec<String> =
        (0..40).map(|n| format!("{{\"remove\":[\"10.0.0.{n}\"]}}\n")).collect();
    let answers =
        futures::future::join_all(lines.iter().map(|line| ask(&daemon, line.as_bytes()))).await;
    assert!(answers.iter().all(|answer| answer.contains("epoch")), "{answers:?}");
    assert!(daemon.applied.load(Ordering::SeqCst) < 20);
}

#[tokio::test]
async fn one_client_too_many_is_told_so() {
    let daemon = daemon();
    let mut held = Vec::new();
    for _ in 0..MAX_CLIENTS {
        held.push(UnixStream::connect(&daemon.path).await.unwrap());
    }
    let answer = ask(&daemon, b"").await;
    assert!(answer.contains("clients"), "{answer}");
}

#[tokio::test]
async fn a_slow_follower_loses_records_and_is_told() {
    let daemon = daemon();
    let mut stream = UnixStream::connect(&daemon.path).await.unwrap();
    stream.write_all(b"{\"flows\":{\"follow\":true}}\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    // More than the socket and the backlog hold, without a turn for anybody.
    for n in 0..3 * BACKLOG as u64 {
        let opened = event(EventKind::Opened, key(1), flow(2 * SECOND + n, 2 * SECOND + n));
        daemon.hub.with(|book| book.note(&opened, 0));
    }
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next_line().await.unwrap().unwrap();
    assert!(first.contains("lost"), "{first}");
    let next = lines.next_line().await.unwrap().unwrap();
    assert!(next.contains("red/a"), "{next}");
}
