use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::frame::{Header, Kind};
use super::*;
use crate::limits::{FIRST_WINDOW, MAX_FRAME, MAX_STREAMS, MAX_WINDOW, SEND_QUEUE};

type Running = JoinHandle<Result<(), MuxError>>;

/// A pipe of an odd size cuts frames everywhere.
fn pair() -> (Mux, Mux, Running, Running) {
    let (a, b) = duplex(7001);
    let (host, host_driver) = Mux::connect(a);
    let (guest, guest_driver) = Mux::new(b);
    (host, guest, tokio::spawn(host_driver), tokio::spawn(guest_driver))
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.unwrap()
}

/// Bytes that depend on their place and on the stream.
fn pattern(seed: u32, length: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let step = |_| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as u8
    };
    (0..length).map(step).collect()
}

#[tokio::test]
async fn streams_do_not_mix() {
    let (host, guest, _a, _b) = pair();
    let mut tasks = Vec::new();
    for id in 16..40_u32 {
        let length = 1 + (id as usize * 7919) % 300_000;
        let (mut near, mut far) = (host.open(id).unwrap(), guest.open(id).unwrap());
        let sent = pattern(id, length);
        let expected = sent.clone();
        tasks.push(tokio::spawn(async move {
            let mut rest = &sent[..];
            let mut piece = 1;
            while !rest.is_empty() {
                let take = rest.len().min(piece);
                far.write_all(&rest[..take]).await.unwrap();
                rest = &rest[take..];
                piece = (piece * 3) % 70_001 + 1;
            }
            far.shutdown().await.unwrap();
            let mut back = Vec::new();
            far.read_to_end(&mut back).await.unwrap();
            assert_eq!(back, b"thanks");
        }));
        tasks.push(tokio::spawn(async move {
            let mut got = Vec::new();
            near.read_to_end(&mut got).await.unwrap();
            assert!(got == expected, "stream {id}: {} of {length} bytes", got.len());
            near.write_all(b"thanks").await.unwrap();
        }));
    }
    for task in tasks {
        soon(task).await.unwrap();
    }
}

#[tokio::test]
async fn a_stalled_reader_stops_its_writer_and_nobody_else() {
    let (host, guest, _a, _b) = pair();
    let (mut stalled, mut writer) = (host.open(16).unwrap(), guest.open(16).unwrap());
    let block = vec![7; 8192];
    let mut total = 0;
    while let Ok(done) = timeout(Duration::from_millis(100), writer.write(&block)).await {
        total += done.unwrap();
        assert!(total <= SEND_QUEUE + FIRST_WINDOW as usize, "no back-pressure");
    }
    assert_eq!(total, FIRST_WINDOW as usize);
    let (mut near, mut far) = (host.open(17).unwrap(), guest.open(17).unwrap());
    let sender = tokio::spawn(async move {
        far.write_all(&vec![1; 3_000_000]).await.unwrap();
    });
    let mut got = Vec::new();
    soon(near.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got.len(), 3_000_000);
    soon(sender).await.unwrap();
    // And the stalled one goes on where it stopped.
    let sender = tokio::spawn(async move { writer.write_all(&block).await });
    let mut first = vec![0; total + 8192];
    soon(stalled.read_exact(&mut first)).await.unwrap();
    soon(sender).await.unwrap().unwrap();
}

#[tokio::test]
async fn written_data_survives_the_drop_and_then_comes_the_end() {
    let (host, guest, _a, _b) = pair();
    let mut near = host.open(16).unwrap();
    let mut far = guest.open(16).unwrap();
    soon(far.write_all(b"last words")).await.unwrap();
    drop(far);
    let mut got = String::new();
    soon(near.read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "last words");
    let error = soon(async {
        loop {
            if let Err(error) = near.write_all(b"anyone?").await {
                return error;
            }
        }
    });
    assert_eq!(error.await.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_stream_may_be_used_before_the_peer_opens_it() {
    let (host, guest, _a, _b) = pair();
    let mut near = host.open(16).unwrap();
    let writer = tokio::spawn(async move {
        near.write_all(b"early").await.unwrap();
        near.shutdown().await.unwrap();
        near
    });
    // The fixed streams carry data at once; it also shows that the grant above has arrived.
    let mut call = host.open(0).unwrap();
    call.write_all(b"!").await.unwrap();
    let mut served = guest.open(0).unwrap();
    soon(served.read_u8()).await.unwrap();
    let mut got = String::new();
    soon(guest.open(16).unwrap().read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "early");
    soon(writer).await.unwrap();
}

#[tokio::test]
async fn a_stream_that_only_one_end_opened_is_forgotten() {
    let (host, guest, _a, _b) = pair();
    let mut call = host.open(0).unwrap();
    let mut served = guest.open(0).unwrap();
    for id in 16..16 + 2 * MAX_STREAMS as u32 {
        drop(host.open(id).unwrap());
        // A round trip.
        call.write_all(b"?").await.unwrap();
        soon(served.read_u8()).await.unwrap();
        served.write_all(b"!").await.unwrap();
        soon(call.read_u8()).await.unwrap();
    }
    // Opened too late it is ended, not waiting.
    let mut late = guest.open(15 + 2 * MAX_STREAMS as u32).unwrap();
    assert_eq!(soon(late.read(&mut [0; 8])).await.unwrap(), 0);
    let error = soon(late.write(b"x")).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn fixed_streams_overtake_bulk() {
    let mut state = State::default();
    for id in [16, 17, 0] {
        state.open(id).unwrap();
        let credit = Header { stream: id, kind: Kind::Credit, length: 500_000 };
        state.header(credit).unwrap();
        state.write(id, &vec![0; 100_000]);
    }
    let mut order = Vec::new();
    while let Some((output, _)) = state.next_output(Vec::new()) {
        order.push(output[0]);
    }
    // One control buffer, then all of the call, then the others in turn.
    assert_eq!(order, [16, 0, 0, 0, 0, 16, 17, 16, 17, 16, 17, 16, 17]);
}

#[tokio::test]
async fn the_loss_of_the_channel_reaches_everybody() {
    let (host, guest, a, b) = pair();
    let mut near = host.open(16).unwrap();
    let mut far = guest.open(16).unwrap();
    soon(far.write_all(b"tail")).await.unwrap();
    let mut got = [0; 4];
    soon(near.read_exact(&mut got)).await.unwrap();
    b.abort();
    assert!(matches!(soon(a).await.unwrap(), Err(MuxError::Closed)));
    assert_eq!(soon(near.read(&mut got)).await.unwrap(), 0);
    assert_eq!(soon(near.write(b"x")).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(soon(far.write(b"x")).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let error = host.open(17).unwrap_err().to_string();
    assert!(error.contains("the peer closed the channel"), "{error}");
}

#[tokio::test]
async fn numbers_are_taken_once() {
    let (host, _guest, _a, _b) = pair();
    let _near = host.open(16).unwrap();
    assert!(matches!(host.open(16), Err(OpenError::InUse { stream: 16 })));
}

#[tokio::test]
async fn large_transfer_grows_the_window_and_arrives_whole() {
    let (host, guest, _a, _b) = pair();
    let mut near = host.open(16).unwrap();
    let mut far = guest.open(16).unwrap();
    let sent = pattern(3, 1 << 20);
    let expected = sent.clone();
    let sender = tokio::spawn(async move {
        for chunk in std::iter::repeat_n(sent, 16) {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                far.writable().await.unwrap();
                let fill = |buffer: &mut [u8]| {
                    let count = buffer.len().min(rest.len());
                    buffer[..count].copy_from_slice(&rest[..count]);
                    Ok(count)
                };
                let count = far.write_with(fill).unwrap();
                rest = &rest[count..];
            }
        }
    });
    let mut got = vec![0; 1 << 20];
    for _ in 0..16 {
        soon(near.read_exact(&mut got)).await.unwrap();
        assert!(got == expected);
    }
    soon(sender).await.unwrap();
    assert_eq!(soon(near.read(&mut got)).await.unwrap(), 0);
}

#[tokio::test]
async fn a_guest_takes_a_second_host_after_being_cloned() {
    let (mut a, b) = duplex(64 * 1024);
    let (guest, driver) = Mux::new(b);
    let _running = tokio::spawn(driver);
    let mut served = guest.open(0).unwrap();
    let echo = async |served: &mut MuxStream, host: &Mux| {
        let mut call = host.open(0).unwrap();
        call.write_all(&[9; 5000]).await.unwrap();
        let mut request = vec![0; 5000];
        served.read_exact(&mut request).await.unwrap();
        served.write_all(&request).await.unwrap();
        call.read_exact(&mut request).await.unwrap();
        assert_eq!(request, [9; 5000]);
        // Not closed: a template's builder goes away without a word.
        std::mem::forget(call);
    };
    for _ in 0..30 {
        let (host, driver) = Mux::connect(&mut a);
        tokio::select! {
            biased;
            end = driver => panic!("{end:?}"),
            () = soon(echo(&mut served, &host)) => {}
        }
    }
}

async fn hostile(frames: &[(Header, usize)]) -> MuxError {
    let (mut peer, io): (DuplexStream, DuplexStream) = duplex(1 << 20);
    let (mux, driver) = Mux::connect(io);
    let _open = mux.open(16).unwrap();
    let _calls = mux.open(0).unwrap();
    for (header, payload) in frames {
        peer.write_all(&header.encode()).await.unwrap();
        peer.write_all(&vec![0; *payload]).await.unwrap();
    }
    soon(driver).await.unwrap_err()
}

#[tokio::test]
async fn hostile_frames_end_the_channel_and_are_named() {
    let frame = |stream, kind, length| Header { stream, kind, length };
    let data = |stream, length: u32| (frame(stream, Kind::Data, length), length as usize);
    let window = FIRST_WINDOW;
    let cases = [
        (vec![data(16, window), data(16, 1)], "1 bytes on stream 16, of which 0 were granted"),
        (vec![data(99, 1)], "1 bytes on stream 99, of which 0 were granted"),
        (vec![data(0, window), data(0, 1)], "stream 0"),
        (vec![(frame(16, Kind::Credit, 0xff_ffff), 0); 2], "credit of 16777215 on stream 16"),
        (vec![(frame(16, Kind::Fin, 0), 0), data(16, 1)], "data on stream 16 after its end"),
        (vec![(frame(16, Kind::Fin, 0), 0); 2], "end of data on stream 16 after its end"),
        (vec![(frame(16, Kind::Stop, 0), 0); 2], "end of reading on stream 16 after its end"),
        (vec![(frame(0, Kind::Start, 0), 0)], "start frame"),
        (vec![(frame(16, Kind::Data, MAX_FRAME as u32 + 1), 0)], "length 65537"),
        (
            (100..101 + MAX_STREAMS as u32).map(|id| (frame(id, Kind::Credit, 1), 0)).collect(),
            "one more than 2048",
        ),
    ];
    for (frames, words) in cases {
        let error = hostile(&frames).await.to_string();
        assert!(error.contains(words), "{error} lacks {words:?}");
    }
}

#[tokio::test]
async fn arbitrary_bytes_never_panic_nor_hang() {
    for seed in 0..200 {
        let (mut peer, io) = duplex(1 << 20);
        let (mux, driver) = Mux::new(io);
        let _open = mux.open(16).unwrap();
        let mut bytes = pattern(seed, 4000);
        // Plausible kinds and small numbers get further into the state.
        for header in bytes.chunks_exact_mut(8) {
            header[0] %= 20;
            header[1..4].fill(0);
            header[4] %= 6;
            header[6..8].fill(0);
        }
        peer.write_all(&bytes).await.unwrap();
        drop(peer);
        assert!(soon(driver).await.is_err());
    }
}

#[tokio::test]
async fn windows_beyond_the_first_share_one_pool() {
    let mut state = State::default();
    for id in 16..16 + 40 {
        state.open(id).unwrap();
        for _ in 0..8 {
            // The peer uses all it has; the reader takes all.
            let mut allowed = 0;
            while let Some((output, end)) = state.next_output(Vec::new()) {
                for header in output[..end].chunks_exact(8) {
                    let header = Header::decode(header.try_into().unwrap()).unwrap();
                    if header.kind == Kind::Credit && header.stream == id {
                        allowed += header.length;
                    }
                }
            }
            assert!(allowed <= MAX_WINDOW);
            let mut rest = allowed;
            while rest > 0 {
                let length = rest.min(MAX_FRAME as u32);
                state.header(Header { stream: id, kind: Kind::Data, length }).unwrap();
                rest -= length;
            }
            state.consumed(id, allowed);
        }
    }
    assert!(state.pool_used <= crate::limits::WINDOW_POOL, "{}", state.pool_used);
    for id in 16..16 + 40 {
        state.close(id);
    }
    assert_eq!(state.pool_used, 0);
}
