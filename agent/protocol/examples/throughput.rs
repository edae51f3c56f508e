//! Measures the multiplexer: one bulk stream over a socket pair, both ends in one thread, with the
//! latency of a small message beside it. `cargo run --release -p joey-protocol --example throughput`

use std::io::Write as _;
use std::time::Instant;

use joey_protocol::mux::Mux;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

const TOTAL: usize = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let (a, b) = UnixStream::pair()?;
    let (host, driver) = Mux::connect(a);
    tokio::spawn(driver);
    let (guest, driver) = Mux::new(b);
    tokio::spawn(driver);
    let (mut near, mut far) = (host.open(16)?, guest.open(16)?);
    let (mut call, mut served) = (host.open(0)?, guest.open(0)?);
    tokio::spawn(async move {
        while let Ok(byte) = served.read_u8().await {
            served.write_u8(byte).await?;
        }
        std::io::Result::Ok(())
    });
    let pings = tokio::spawn(async move {
        let mut worst = std::time::Duration::ZERO;
        let mut count = 0_u32;
        let begin = Instant::now();
        loop {
            let at = Instant::now();
            let answered = async {
                call.write_u8(1).await?;
                call.read_u8().await
            };
            if answered.await.is_err() || count == 10_000 {
                break;
            }
            count += 1;
            worst = worst.max(at.elapsed());
        }
        (begin.elapsed() / count.max(1), worst)
    });
    tokio::spawn(async move {
        let mut sent = 0;
        while sent < TOTAL {
            far.writable().await?;
            sent += far.write_with(|buffer| Ok(buffer.len().min(TOTAL - sent)))?;
        }
        std::io::Result::Ok(())
    });
    let begin = Instant::now();
    let mut got = 0;
    loop {
        let count = near.fill_buf().await?.len();
        if count == 0 {
            break;
        }
        got += count;
        near.consume(count);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let (mean, worst) = pings.await?;
    let mebibytes = got as f64 / f64::from(1 << 20);
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{mebibytes} MiB: {:.0} MiB/s; calls {mean:?}, worst {worst:?}",
        mebibytes / seconds
    )
}
