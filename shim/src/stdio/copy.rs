//! The tasks that copy between files of the host and streams of the channel.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use joey_protocol::mux::MuxStream;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::logger::Logger;

/// How long output may stand still after its process ended before nobody waits for it any more: a
/// grandchild may keep the other end open for ever.
pub const DRAIN: Duration = Duration::from_secs(2);

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    Pipe(pipe::Sender),
    File(File),
}

impl Sink {
    async fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(data).await,
            // The page cache takes it; a thread for this would cost more than it saves.
            Self::File(file) => file.write(data),
        }
    }
}

/// The copying of one process. Dropping it ends all of it.
#[derive(Debug)]
pub struct Copies {
    tasks: Vec<AbortHandle>,
    close: Option<Arc<Notify>>,
    outputs: Arc<watch::Sender<usize>>,
    moved: Arc<AtomicU64>,
    first: Arc<watch::Sender<bool>>,
    /// Whether the process has ended.
    over: watch::Sender<bool>,
    logger: Option<Logger>,
}

impl Copies {
    pub(super) fn new(logger: Option<Logger>) -> Self {
        Self {
            tasks: Vec::new(),
            close: None,
            outputs: Arc::new(watch::Sender::new(0)),
            moved: Arc::default(),
            first: Arc::new(watch::Sender::new(false)),
            over: watch::Sender::new(false),
            logger,
        }
    }

    pub(super) fn add_input(&mut self, fifo: pipe::Receiver, stream: MuxStream) {
        let close = Arc::new(Notify::new());
        self.close = Some(close.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = input(fifo, stream, &close).await
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                tracing::warn!("copying stdin: {error}");
            }
        });
        self.tasks.push(task.abort_handle());
    }

    pub(super) fn add_output(&mut self, stream: MuxStream, sink: Sink) {
        self.outputs.send_modify(|count| *count += 1);
        let outputs = self.outputs.clone();
        let (moved, first) = (self.moved.clone(), self.first.clone());
        let over = self.over.subscribe();
        let task = tokio::spawn(async move {
            if let Err(error) = output(stream, sink, over, &moved, &first).await {
                tracing::warn!("copying output: {error}");
            }
            outputs.send_modify(|count| *count -= 1);
        });
        self.tasks.push(task.abort_handle());
    }

    /// A future that waits for the first output: whether there was any.
    pub fn first_byte(&self) -> impl Future<Output = bool> + Send + use<> {
        let mut first = self.first.subscribe();
        async move { first.wait_for(|came| *came).await.is_ok() }
    }

    /// Ends the process's stdin after what is in the FIFO now (CloseIO). Further calls do nothing.
    pub fn close_stdin(&self) {
        if let Some(close) = &self.close {
            // Kept until the task looks: it may be writing.
            close.notify_one();
        }
    }

    /// The process has ended: output that from now on brings nothing for [`DRAIN`] is closed, although
    /// a grandchild keeps its other end open, for containerd deletes no process before its output's
    /// end. What a slow reader has not taken yet is no silence: nothing is lost.
    pub fn process_ended(&self) {
        self.over.send_replace(true);
    }

    /// A future that waits until all output has been passed on, or nothing moved for `idle`
    /// ([`DRAIN`]): whether all was passed on. Independent of this value's life.
    pub fn drained(&self, idle: Duration) -> impl Future<Output = bool> + Send + use<> {
        let mut outputs = self.outputs.subscribe();
        let counter = self.moved.clone();
        async move {
            let mut moved = counter.load(Ordering::Relaxed);
            loop {
                if timeout(idle, outputs.wait_for(|count| *count == 0)).await.is_ok() {
                    return *outputs.borrow() == 0;
                }
                let now = counter.load(Ordering::Relaxed);
                if now == moved {
                    return false;
                }
                moved = now;
            }
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        if let Some(logger) = self.logger.take() {
            logger.finish();
        }
    }
}

async fn output(
    mut stream: MuxStream,
    mut sink: Sink,
    mut over: watch::Receiver<bool>,
    moved: &AtomicU64,
    first: &watch::Sender<bool>,
) -> io::Result<()> {
    loop {
        let data = tokio::select! {
            biased;
            data = stream.fill_buf() => data?,
            () = silence(&mut over) => {
                tracing::info!("output is still open after the exit; nobody waits for more");
                return Ok(());
            }
        };
        if data.is_empty() {
            return Ok(());
        }
        let count = sink.write(data).await?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        stream.consume(count);
        if moved.fetch_add(count as u64, Ordering::Relaxed) == 0 {
            first.send_replace(true);
        }
    }
}

/// Until [`DRAIN`] has passed since the process's end, or since now if that was before.
async fn silence(over: &mut watch::Receiver<bool>) {
    if over.wait_for(|over| *over).await.is_err() {
        // Whoever drops the copies ends this task.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(DRAIN).await;
}

async fn input(fifo: pipe::Receiver, mut stream: MuxStream, close: &Notify) -> io::Result<()> {
    let mut closing = false;
    loop {
        stream.writable().await?;
        // The runtime may not yet know of what is in the FIFO; the last look asks the kernel.
        let read = |buffer: &mut [u8]| match closing {
            false => fifo.try_read(buffer),
            true => Ok(nix::unistd::read(&fifo, buffer)?),
        };
        match stream.write_with(read) {
            // The last writer is gone.
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if closing {
                    break;
                }
                tokio::select! {
                    ready = fifo.readable() => ready?,
                    () = close.notified() => closing = true,
                }
            }
            Err(error) => return Err(error),
        }
    }
    stream.shutdown().await
}
