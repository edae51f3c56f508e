use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use joey_protocol::mux::Mux;
use nix::sys::stat::Mode;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

use super::*;

struct Rig {
    dir: TempDir,
    host: Mux,
    guest: Mux,
}

fn rig() -> Rig {
    let (a, b) = duplex(64 * 1024);
    let (host, driver) = Mux::connect(a);
    tokio::spawn(driver);
    let (guest, driver) = Mux::new(b);
    tokio::spawn(driver);
    Rig { dir: tempfile::tempdir().unwrap(), host, guest }
}

impl Rig {
    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn run(&self, request: Request<'_>) -> (api::Stdio, Copies) {
        let mut next = 15;
        Stdio::open(request)
            .await
            .unwrap()
            .attach(|| {
                next += 1;
                self.host.open(next)
            })
            .unwrap()
    }
}

fn request<'a>(stdin: &'a str, stdout: &'a str, stderr: &'a str) -> Request<'a> {
    Request {
        namespace: "k8s.io",
        container: "web",
        stdin,
        stdout,
        stderr,
        terminal: false,
        stdin_end: StdinEnd::CloseIo,
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap()
}

#[tokio::test]
async fn output_survives_a_reader_that_comes_back() {
    let rig = rig();
    let path = rig.fifo("out");
    let (message, copies) = rig.run(request("", &path, "")).await;
    assert_eq!((message.stdin, message.stdout, message.stderr), (0, 16, 0));
    let mut process = rig.guest.open(16).unwrap();
    let mut got = [0; 3];
    for text in [b"one", b"two"] {
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        process.write_all(text).await.unwrap();
        soon(reader.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, text);
    }
    assert!(!copies.drained(Duration::from_millis(50)).await, "the process still has it open");
    drop(process);
    assert!(soon(copies.drained(DRAIN)).await);
}

#[tokio::test]
async fn silent_output_of_an_ended_process_is_closed_but_not_what_its_reader_has_yet_to_take() {
    let rig = rig();
    let path = rig.fifo("out");
    let (_, copies) = rig.run(request("", &path, "")).await;
    let mut process = rig.guest.open(16).unwrap();
    let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    // More than the FIFO takes, and a grandchild that keeps its end open.
    let sent = vec![b'x'; 100_000];
    process.write_all(&sent).await.unwrap();
    copies.process_ended();
    tokio::time::sleep(DRAIN + Duration::from_millis(500)).await;
    let mut got = vec![0; sent.len()];
    soon(reader.read_exact(&mut got)).await.unwrap();
    assert!(got == sent);
    assert_eq!(soon(reader.read(&mut got)).await.unwrap(), 0, "the end");
    assert!(soon(copies.drained(DRAIN)).await);
}

#[tokio::test]
async fn eight_mebibytes_and_exit_arrive_whole() {
    let rig = rig();
    let path = rig.fifo("out");
    let (_, copies) = rig.run(request("", &path, "")).await;
    let mut process = rig.guest.open(16).unwrap();
    let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let sent: Vec<u8> = (0..8 << 20).map(|n: u32| (n >> 8 ^ n) as u8).collect();
    let expected = sent.clone();
    tokio::spawn(async move { process.write_all(&sent).await });
    let mut got = vec![0; expected.len()];
    soon(reader.read_exact(&mut got)).await.unwrap();
    assert!(got == expected);
    assert!(soon(copies.drained(DRAIN)).await);
    drop(copies);
    assert_eq!(soon(reader.read(&mut got)).await.unwrap(), 0);
}

#[tokio::test]
async fn only_close_io_ends_stdin() {
    let rig = rig();
    let path = rig.fifo("in");
    let (message, copies) = rig.run(request(&path, "", "")).await;
    let mut process = rig.guest.open(message.stdin).unwrap();
    let mut got = [0; 3];
    for text in [b"one", b"two"] {
        let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
        writer.write_all(text).await.unwrap();
        drop(writer);
        soon(process.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, text);
    }
    let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
    writer.write_all(b"end").await.unwrap();
    copies.close_stdin();
    let mut rest = String::new();
    soon(process.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "end");
}

#[tokio::test]
async fn the_last_writer_ends_stdin_where_chosen() {
    let rig = rig();
    let path = rig.fifo("in");
    let stdin = Request { stdin_end: StdinEnd::LastWriter, ..request(&path, "", "") };
    let (message, _copies) = rig.run(stdin).await;
    let mut process = rig.guest.open(message.stdin).unwrap();
    let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
    writer.write_all(b"all").await.unwrap();
    drop(writer);
    let mut got = String::new();
    soon(process.read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "all");
}

#[tokio::test]
async fn both_outputs_may_share_a_file() {
    let rig = rig();
    let path = rig.dir.path().join("log with space");
    fs::write(&path, "old\n").unwrap();
    let uri = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    let (message, copies) = rig.run(request("", &uri, &uri)).await;
    for (id, text) in [(message.stdout, "out\n"), (message.stderr, "err\n")] {
        rig.guest.open(id).unwrap().write_all(text.as_bytes()).await.unwrap();
    }
    assert!(soon(copies.drained(DRAIN)).await);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text == "old\nout\nerr\n" || text == "old\nerr\nout\n", "{text}");
}

fn script(path: &Path, body: &str) -> String {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_logger_gets_both_outputs_its_arguments_and_the_names() {
    let rig = rig();
    let seen = rig.dir.path().join("seen");
    let program = script(
        &rig.dir.path().join("logger"),
        r#"exec 5>&-; /bin/cat <&3 >"$2"; /bin/cat <&4 >>"$2"; echo "$CONTAINER_NAMESPACE/$CONTAINER_ID" >>"$2"; echo done >"$2.done""#,
    );
    let uri = format!("binary://{program}?to={}", seen.to_str().unwrap());
    let (message, copies) = soon(rig.run(request("", &uri, &uri))).await;
    for (id, text) in [(message.stdout, "out\n"), (message.stderr, "err\n")] {
        rig.guest.open(id).unwrap().write_all(text.as_bytes()).await.unwrap();
    }
    assert!(soon(copies.drained(DRAIN)).await);
    let done = rig.dir.path().join("seen.done");
    soon(async {
        while !done.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(fs::read_to_string(&seen).unwrap(), "out\nerr\nk8s.io/web\n");
}

#[tokio::test]
async fn what_is_not_supported_is_refused_by_name() {
    for (stdin, stdout, words) in [
        ("", "npipe:///x", "stdout \"npipe:///x\" is not supported"),
        ("", "relative", "stdout \"relative\" does not name an absolute path"),
        ("file:///etc/passwd", "", "stdin \"file:///etc/passwd\" is not supported"),
        ("", "/nonexistent/fifo", "opening stdout \"/nonexistent/fifo\""),
        ("", "binary:///nonexistent", "starting the logger \"/nonexistent\""),
    ] {
        let error = Stdio::open(request(stdin, stdout, "")).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
