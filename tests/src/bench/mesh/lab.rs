//! A fake VM's connections to a host beyond the router.

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use joey_shim::mesh::{Mesh, Mode};

use super::super::stats::Samples;
use super::{CONNECTIONS, EACH, THREADS, greet};
use crate::lab::traffic::Load;
use crate::lab::{Join, Lab, PEER, Pod};
use crate::proxy::Proxy;

/// In which a stream's bytes are counted, after it has found its speed.
const WINDOW: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(500);

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let (mut plain, mut meshed) = (lab.pod(1)?, lab.pod(2)?);
    meshed.mesh = Mesh { mode: Mode::Ambient, ..Mesh::default() };
    for pod in [&mut plain, &mut meshed] {
        lab.plug(pod, Join::Policy)?;
    }
    lab.allow(&[&plain, &meshed])?;
    let _proxy = Proxy::start(&meshed.netns.path(), None, &[])?;
    let listener = lab.peer.inside(|| Ok(TcpListener::bind((PEER, 0))?))?;
    let to = listener.local_addr()?;
    greet(listener);
    let mut subjects = [("joey", &plain), ("joey+ambient", &meshed)];
    for run in 1..=runs {
        subjects.rotate_left(1);
        for (subject, pod) in subjects {
            let mut add = |metric, unit, value| samples.add(subject, metric, unit, value);
            for (connected, greeted) in pod.guest.inside(|| connects(to, CONNECTIONS))? {
                add("lab_connect", "µs", connected.as_secs_f64() * 1e6);
                add("lab_first_byte", "µs", greeted.as_secs_f64() * 1e6);
            }
            add("lab_connect_rate", "1/s", rate(pod, to)?);
            let load = Load::tcp(&pod.guest, &lab.peer, PEER.into(), 1)?;
            sleep(WARM_UP);
            let (before, begun) = (load.received(), Instant::now());
            sleep(WINDOW);
            let bytes = (load.received() - before) as f64;
            add("lab_tcp_out", "Gb/s", bytes * 8.0 / begun.elapsed().as_secs_f64() / 1e9);
        }
        progress(&format!("lab: {run} of {runs} runs"));
    }
    Ok(())
}

fn connects(to: SocketAddr, count: usize) -> Result<Vec<(Duration, Duration)>> {
    (0..count)
        .map(|_| {
            let begun = Instant::now();
            let mut stream = TcpStream::connect(to)?;
            let connected = begun.elapsed();
            stream.read_exact(&mut [0])?;
            Ok((connected, begun.elapsed()))
        })
        .collect()
}

fn rate(pod: &Pod, to: SocketAddr) -> Result<f64> {
    let begun = Instant::now();
    thread::scope(|scope| {
        let all: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| pod.guest.inside(|| connects(to, EACH).map(drop))))
            .collect();
        all.into_iter().try_for_each(|it| it.join().map_err(|_| anyhow!("panicked"))?)
    })?;
    Ok((THREADS * EACH) as f64 / begun.elapsed().as_secs_f64())
}
