//! `bench mesh`: what a mesh's proxy costs a pod's connections.
//!
//! Subjects are `joey`, which is in no mesh, `joey+ambient`, whose connections go through a proxy in the pod's
//! network namespace, and `joey+sidecar`, where they go through one in the pod (`exempt`: of the proxy's user there);
//! by turns in one run. A server beyond the pod greets with a byte: `connect` is until the
//! connection is made, which is the proxy's where there is one, `first_byte` until the byte is there, which has come
//! from the server through it. With `lab_` before them they are a fake VM's in the lab ([`crate::lab`]), where nothing is
//! emulated.

mod lab;
mod pods;

pub(super) use pods::{GATEWAY, start};

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::Result;

use super::machine;
use super::stats::{Report, Samples};
use crate::node::Node;

/// Connections of a run, one after the other.
const CONNECTIONS: usize = 200;
/// In how many threads they are made at once, for the rate, and how many each makes.
const THREADS: usize = 4;
const EACH: usize = 200;

/// Measures and returns the report; `progress` is told what happens.
pub fn mesh(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut samples = Samples::default();
    lab::measure(runs, &mut samples, progress)?;
    pods::measure(node, runs, &mut samples, progress)?;
    Ok(samples.report(
        "mesh",
        &machine(),
        &[("joey+ambient", "joey"), ("joey+sidecar", "joey+sidecar exempt")],
    ))
}

/// Greets all who connect with a byte, for as long as the process is.
pub(super) fn greet(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.write_all(b"x");
        }
    });
}

/// Takes what it is sent; how much.
fn sink(listener: TcpListener) -> Arc<AtomicU64> {
    let received = Arc::new(AtomicU64::new(0));
    let count = received.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let count = count.clone();
            thread::spawn(move || {
                let mut piece = vec![0; 256 << 10];
                while let Ok(length @ 1..) = stream.read(&mut piece) {
                    count.fetch_add(length as u64, Ordering::Relaxed);
                }
            });
        }
    });
    received
}
