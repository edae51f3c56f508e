//! One container's life in a machine that is nobody's, by the same calls that a pod's container takes.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use joey_protocol::api;
use joey_protocol::ids::REHEARSAL;
use joey_protocol::mux::MuxStream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::guest::{Event, Events};
use crate::rootfs::{FileSystem, Image};
use crate::sandbox::Guest;

/// A container as CRI asks for one, as the guest is given it.
const SPEC: &[u8] = include_bytes!("rehearsal.json");
/// Its exec.
const EXEC: &str = "exec";
/// What the program says when it runs.
const READY: &[u8] = b"ready\n";

/// Runs the container and an exec in it to their ends. Nothing of them is left.
pub(super) async fn rehearse(guest: &Guest, events: &mut Events, guest_dir: &Path) -> Result<()> {
    let path = guest_dir.join("rehearsal");
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let image = Image {
        file: file.into(),
        file_system: FileSystem::Erofs,
        writable: false,
        key: REHEARSAL.to_owned(),
        lock: None,
    };
    let slot = guest.disks.attach(guest.vm.as_ref(), image).await?;
    let played = play(guest, events, slot).await;
    guest.disks.release(guest.vm.as_ref(), slot).await;
    played.context("rehearsing a container's start")
}

async fn play(guest: &Guest, events: &mut Events, slot: u32) -> Result<()> {
    let layer = api::Disk { slot, file_system: "erofs".to_owned(), ..Default::default() };
    let (first, stdio) = Stage::open(guest)?;
    let request = api::CreateContainerRequest {
        container_id: REHEARSAL.to_owned(),
        spec: SPEC.to_vec(),
        rootfs: Some(api::Rootfs { layers: vec![layer], ..Default::default() }).into(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    guest.client.create_container(&request).await?;
    let first = first.run(guest, "").await?;
    let (second, stdio) = Stage::open(guest)?;
    let spec: serde_json::Value = serde_json::from_slice(SPEC)?;
    let request = api::CreateExecRequest {
        container_id: REHEARSAL.to_owned(),
        exec_id: EXEC.to_owned(),
        process: serde_json::to_vec(&spec["process"])?,
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    guest.client.create_exec(&request).await?;
    let second = second.run(guest, EXEC).await?;
    for (stage, exec) in [(second, EXEC), (first, "")] {
        stage.end(events, exec).await?;
        guest.client.delete(&process(exec)).await?;
    }
    Ok(())
}

fn process(exec: &str) -> api::ProcessRequest {
    api::ProcessRequest {
        container_id: REHEARSAL.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

/// The standard streams of one process.
struct Stage {
    input: MuxStream,
    output: MuxStream,
    errors: MuxStream,
}

impl Stage {
    fn open(guest: &Guest) -> Result<(Self, api::Stdio)> {
        let open = || guest.streams.open();
        let stage = Self { input: open()?, output: open()?, errors: open()? };
        let stdio = api::Stdio {
            stdin: stage.input.id(),
            stdout: stage.output.id(),
            stderr: stage.errors.id(),
            ..Default::default()
        };
        Ok((stage, stdio))
    }

    /// Starts the created process and waits until it says that it runs.
    async fn run(mut self, guest: &Guest, exec: &str) -> Result<Self> {
        guest.client.start(&process(exec)).await?;
        let mut said = [0; READY.len()];
        self.output.read_exact(&mut said).await?;
        if said != READY {
            bail!("it said {:?}", String::from_utf8_lossy(&said));
        }
        Ok(self)
    }

    /// Closes its input, upon which it ends.
    async fn end(mut self, events: &mut Events, exec: &str) -> Result<()> {
        self.input.shutdown().await?;
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).await?;
        self.errors.read_to_end(&mut rest).await?;
        match events.recv().await {
            Some(Event::Exit(exit)) if exit.exec.as_ref().map_or("", AsRef::as_ref) == exec => {
                if exit.status != 0 {
                    bail!("it ended with {}: {}", exit.status, String::from_utf8_lossy(&rest));
                }
                Ok(())
            }
            other => bail!("its end was expected, not {other:?}"),
        }
    }
}
