//! The socket: garbage, too much, too many, too slow.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{EventKind, SECOND, book, event, flow, key};
use crate::flows::server::{BACKLOG, Hub, MAX_CLIENTS};
use crate::services::{self, keeper::Keeper};

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
    let directory = dir.path().to_owned();
    let keeper = Mutex::new(Keeper::new(&directory.join("run"), &directory.join("state")));
    let services = Arc::new(move |request| {
        let applied = keeper.lock().unwrap().apply(&services::keeper::Change::Services(request));
        applied.map(|applied| applied.generation).map_err(|error| error.to_string())
    });
    let hub = Hub::new(Arc::new(Mutex::new(book(64))), 4096, apply, services);
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
        "{\"services\":7}\n",
        "{\"services\":{}}\n",
        "{\"services\":{\"puts\":[]}}\n",
        "{\"services\":{\"replace\":[]},\"put\":[]}\n",
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

/// A service of one address, as it is written.
fn service(name: &str, address: &str) -> String {
    format!(r#"{{"namespace":"a","name":"{name}","addresses":["{address}"],"ports":[]}}"#)
}

#[tokio::test]
async fn services_are_changed_by_their_names_and_what_is_refused_takes_nothing_with_it() {
    let daemon = daemon();
    let ports = |address| service("x", address).replace("[]}", r#"[{"port":80}]}"#);
    let one = ask(
        &daemon,
        format!("{{\"services\":{{\"replace\":[{}]}}}}\n", ports("10.96.0.1")).as_bytes(),
    )
    .await;
    assert_eq!(one, "{\"generation\":1}\n");
    let two = ports("10.96.0.1").replace("\"x\"", "\"y\"");
    let answer = ask(&daemon, format!("{{\"services\":{{\"put\":[{two}]}}}}\n").as_bytes()).await;
    assert!(
        answer.contains("error") && answer.contains("a/y") && answer.contains("10.96.0.1"),
        "{answer}"
    );
    // Many at once, of which one is refused: the others are done.
    let lines: Vec<String> = (2..10)
        .map(|n| service(&format!("s{n}"), &format!("10.96.0.{n}")))
        .map(|service| format!("{{\"services\":{{\"put\":[{service}]}}}}\n"))
        .chain([format!("{{\"services\":{{\"put\":[{two}]}}}}\n")])
        .collect();
    let mut asked = tokio::task::JoinSet::new();
    for line in lines {
        let path = daemon.path.clone();
        asked.spawn(async move {
            let mut stream = UnixStream::connect(path).await.unwrap();
            stream.write_all(line.as_bytes()).await.unwrap();
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer).await.unwrap();
            answer
        });
    }
    let answers = asked.join_all().await;
    let refused = answers.iter().filter(|answer| answer.contains("error")).count();
    assert_eq!((answers.len(), refused), (9, 1), "{answers:?}");
    let state = daemon.path.with_file_name("state");
    assert_eq!(services::keeper::stored(&state).unwrap().content.len(), 9);
}
