//! Output arrives whole and in order.

use std::time::{Duration, Instant};

use anyhow::Result;
use joey_tests::pod::{self, SOON};
use sha2::{Digest, Sha256};

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[
    Test { name: "io::eight_mib_then_exit", run: eight_mib_then_exit },
    Test { name: "io::exec_carries_ten_mib", run: exec_carries_ten_mib },
    Test { name: "io::twenty_mib_through_log", run: twenty_mib_through_log },
    Test { name: "io::exec_carries_hundred_mib", run: exec_carries_hundred_mib },
    Test { name: "io::exec_leaves_a_writer", run: exec_leaves_a_writer },
    Test { name: "io::exec_with_stdin", run: exec_with_stdin },
    Test { name: "io::exec_with_terminal", run: exec_with_terminal },
    Test { name: "io::attach", run: attach },
    Test { name: "io::input_ends_with_the_attach", run: input_ends_with_the_attach },
    Test { name: "io::terminal", run: terminal },
    Test { name: "io::no_stdin_reads_as_end", run: no_stdin },
    Test { name: "io::silent_reader_of_one_stream_blocks_no_other", run: both_streams },
];

fn eight_mib_then_exit(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("output")?;
    let count = 8 * 1024;
    let config = pod::script(
        "c",
        "yes 012345678901234567890123456789012345678901234567890123456789012 | head -c 8388608",
    );
    let container = pod.start(&config)?;
    container.wait(SOON)?;
    let expected = count * 1024;
    let end = Instant::now() + SOON;
    while container.logs()?.0.len() < expected && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    let (stdout, _) = container.logs()?;
    same("bytes", stdout.len(), expected)?;
    let line = b"012345678901234567890123456789012345678901234567890123456789012\n";
    same("every line", stdout.chunks(64).all(|chunk| chunk == line), true)?;
    pod.remove()
}

fn exec_carries_ten_mib(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("execbulk")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    container.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=10 2>/dev/null")?;
    let digest = container.sh("sha256sum /tmp/data | cut -d' ' -f1")?.text();
    let start = Instant::now();
    let output = container.exec(&["cat", "/tmp/data"])?;
    let rate = 10.0 / start.elapsed().as_secs_f64();
    println!("        10 MiB through exec at {rate:.0} MiB/s");
    same("digest", hex(&output.stdout), digest)?;
    pod.remove()
}

fn twenty_mib_through_log(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("bulk")?;
    // Lines, as the log is made of lines; the count shows that none is lost or doubled.
    let start = Instant::now();
    let container = pod.start(&pod::script("c", "yes 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | head -c 20971520; echo; echo done"))?;
    let status = container.wait(Duration::from_secs(120))?;
    same("exit code", status.exit_code, 0)?;
    container.wait_output("\ndone", SOON)?;
    let rate = 20.0 / start.elapsed().as_secs_f64();
    println!("        20 MiB through the log at {rate:.0} MiB/s");
    same("bytes", container.logs()?.0.len(), 20_971_520 + 6)?;
    pod.remove()
}

fn exec_carries_hundred_mib(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("execlive")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    // One random MiB, a hundred times: made quickly, and each checked against the digest made inside.
    let make = "cd /tmp; dd if=/dev/urandom of=one bs=1M count=1 2>/dev/null; \
        for i in $(seq 100); do cat one; done > data; sha256sum one | cut -d' ' -f1";
    let digest = container.sh(make)?.text();
    let start = Instant::now();
    let output = container.exec_live(&["cat", "/tmp/data"], false)?.finish()?;
    let rate = 100.0 / start.elapsed().as_secs_f64();
    println!("        100 MiB through exec at {rate:.0} MiB/s");
    same("bytes", output.stdout.len(), 100 << 20)?;
    let whole = output.stdout.chunks(1 << 20).all(|piece| hex(piece) == digest);
    same("every MiB as it was", whole, true)?;
    pod.remove()
}

/// As with runc: who execs is told of the end when the output has ended, and gets all of it.
fn exec_leaves_a_writer(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("execlate")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let output = container.sh("(sleep 4; echo late) & echo done")?;
    same("output", output.text().as_str(), "done\nlate")?;
    pod.remove()
}

fn exec_with_stdin(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("execstdin")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let text = "read a; echo got $a; echo bad >&2; read b; echo got $b; exit 9";
    let mut session = container.exec_live(&["sh", "-c", text], false)?;
    session.send(b"one\n")?;
    session.wait_for("got one")?;
    session.send(b"two\n")?;
    let output = session.finish()?;
    same("stdout", output.text(), "got one\ngot two")?;
    same("stderr", output.stderr.as_slice(), b"bad\n")?;
    same("exit code", output.code, 9)?;
    pod.remove()
}

fn exec_with_terminal(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("exectty")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let mut session = container.exec_live(&["sh"], true)?;
    session.resize(93, 31)?;
    session.send(b"tty; sleep 0.3; stty size\n")?;
    session.wait_for("/dev/pts/")?;
    session.wait_for("31 93")?;
    session.send(b"sleep 1000\n")?;
    std::thread::sleep(Duration::from_millis(300));
    session.send(b"\x03")?;
    session.send(b"exit 4\n")?;
    same("exit code", session.finish()?.code, 4)?;
    pod.remove()
}

fn attach(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("attach")?;
    let mut config = pod::script("c", "while read line; do echo got $line; done; echo ended");
    config.stdin = true;
    let container = pod.start(&config)?;
    let mut session = container.attach(false)?;
    session.send(b"one\n")?;
    session.wait_for("got one")?;
    session.send(b"two\n")?;
    session.wait_for("got two")?;
    container.wait_output("got two", SOON)?;
    drop(session);
    same("lives on", container.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

/// As `kubectl run -i` asks for it.
fn input_ends_with_the_attach(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("attachonce")?;
    let mut config = pod::script("c", "echo up; cat; echo ended; exit 3");
    config.stdin = true;
    config.stdin_once = true;
    let container = pod.start(&config)?;
    container.wait_output("up", SOON)?;
    let mut session = container.attach(false)?;
    session.send(b"one\n")?;
    session.wait_for("one")?;
    drop(session);
    same("exit code", container.wait(SOON)?.exit_code, 3)?;
    container.wait_output("one\nended", SOON)?;
    pod.remove()
}

fn terminal(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("tty")?;
    let mut config = pod::script("c", "test -t 0 && test -t 1 && echo yes; tty; sleep 1000");
    config.tty = true;
    config.stdin = true;
    let container = pod.start(&config)?;
    container.wait_output("yes", SOON)?;
    container.wait_output("/dev/pts/", SOON)?;
    pod.remove()
}

fn no_stdin(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("stdin")?;
    same("read", pod.script("cat; echo ended")?.text(), "ended")?;
    pod.remove()
}

fn both_streams(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("streams")?;
    let output =
        pod.script("yes | head -c 1000000 >&2; yes | head -c 1000000; echo >&2; echo end")?;
    same("stderr", output.stderr.len(), 1_000_001)?;
    same("stdout", output.stdout.len(), 1_000_004)?;
    pod.remove()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
