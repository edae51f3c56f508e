//! A shell that waits for a line is continued more than once.
#![allow(clippy::unwrap_used)]

use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Descriptors of a shell: its standard ones.
const PASSED: i32 = 3;

/// Closes what it inherited, and knows things, of which a signal handler, before it waits.
const SCRIPT: &str =
    "for fd in /proc/self/fd/*; do fd=${fd##*/}; [ $fd -lt 3 ] || eval \"exec $fd>&-\"; done
known=before; trap 'echo $known $line; exit 7' USR1; read line; kill -USR1 $BASHPID; sleep 9";

#[test]
fn a_process_goes_on_from_where_it_was_each_time() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root may ask for the filters of system calls");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("process");
    let mut shell = Command::new("bash")
        .args(["-c", SCRIPT])
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let file = File::create(&path).unwrap();
    super::take(shell.id().cast_signed(), PASSED, &file).unwrap();
    file.set_permissions(Permissions::from_mode(0o700)).unwrap();
    drop(file);
    shell.kill().unwrap();
    shell.wait().unwrap();
    for said in ["one", "two"] {
        let image = File::open(&path).unwrap();
        // The program finds its own file under the number after its own descriptors.
        let script = format!(
            "exec {} {PASSED}</proc/{}/fd/{}",
            path.display(),
            std::process::id(),
            image.as_raw_fd()
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(format!("{said}\n").as_bytes()).unwrap();
        let mut heard = String::new();
        child.stdout.take().unwrap().read_to_string(&mut heard).unwrap();
        assert_eq!(heard, format!("before {said}\n"));
        child.wait().unwrap();
    }
}
