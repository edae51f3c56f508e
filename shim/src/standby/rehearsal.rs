//! A sandbox's start and one container's life in a machine that is nobody's, by the same calls that a
//! pod takes. Nothing of it is left.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use joey_protocol::api;
use joey_protocol::ids::REHEARSAL;
use joey_protocol::limits::{ENTROPY_BYTES, MACHINE_ID_BYTES, POD_DISK, PROTOCOL_VERSION};
use joey_protocol::mux::MuxStream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::config::Config;
use crate::guest::{Event, Events, GuestChannel};
use crate::mesh::sidecar;
use crate::rootfs::{FileSystem, described};
use crate::sandbox::{Guest, PodDisk};
use crate::sizing;
use crate::vmm::Vm;

/// A container as CRI asks for one, as the guest is given it.
const SPEC: &[u8] = include_bytes!("rehearsal.json");
/// Its exec.
const EXEC: &str = "exec";
/// What the program says when it runs.
const READY: &[u8] = b"ready\n";

/// How long the guest gets to let go of the disk. What it puts off for longer it does while QEMU comes to
/// rest.
const REST: Duration = Duration::from_secs(2);

/// Rehearses in a machine of which a template's checkpoint will be taken. Nothing of it is left.
///
/// # Errors
/// What went wrong: such a machine is not to be multiplied.
pub async fn rehearse_for_template(
    config: &Config,
    vm: Arc<dyn Vm>,
    channel: UnixStream,
) -> Result<()> {
    let mut channel = GuestChannel::connect(channel)?;
    let guest = Guest::nobodys(vm, &channel);
    let disk = rehearse(config, &guest, &mut channel.events).await?;
    tokio::time::sleep(REST).await;
    disk.rehearse(&guest.client).await.context("closing the disk")?;
    guest.vm.detach_disk(POD_DISK).await?;
    Ok(())
}

/// Runs the container and an exec in it to their ends. Nothing of them is left but the pod's disk, empty.
pub(super) async fn rehearse(
    config: &Config,
    guest: &Guest,
    events: &mut Events,
) -> Result<PodDisk> {
    // A disk as joey-snapshotter describes them, so that all of its way is rehearsed.
    let image = described::open(&config.guest_dir().join("rehearsal.json"))?;
    let verity = image.verity.as_ref().map(api::Verity::from);
    guest.client.rehearse_sandbox(&identity()?).await.context("rehearsing a sandbox's start")?;
    let mib = sizing::disk_mib(config, &HashMap::new())?;
    let pod_disk = PodDisk::attach(guest, &config.disk_dir(), mib, None).await?;
    pod_disk.open(&guest.client).await?;
    let slot = guest.disks.attach(guest.vm.as_ref(), image).await?;
    let disk = api::Disk {
        slot,
        file_system: FileSystem::Erofs.name().to_owned(),
        verity: verity.into(),
        ..Default::default()
    };
    let played = play(guest, events, disk).await;
    guest.disks.release(guest.vm.as_ref(), slot).await;
    played.context("rehearsing a container's start")?;
    Ok(pod_disk)
}

/// What a pod with an address of each kind is told, in ranges that are nobody's (RFC 5737, RFC 3849).
fn identity() -> Result<api::StartSandboxRequest> {
    let mut secret = [0; ENTROPY_BYTES + MACHINE_ID_BYTES];
    crate::sys::random(&mut secret)?;
    let (entropy, machine_id) = secret.split_at(ENTROPY_BYTES);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let (v4, gateway4) = (vec![192, 0, 2, 2], vec![192, 0, 2, 1]);
    let [v6, gateway6] =
        [2, 1].map(|last| [&[0x20, 0x01, 0x0d, 0xb8][..], &[0; 11], &[last]].concat());
    let mac = vec![0x02, 0, 0, 0, 0, 0x02];
    let name = "eth0".to_owned();
    let address =
        |ip: &Vec<u8>, prefix| api::Address { ip: ip.clone(), prefix, ..Default::default() };
    let route = |prefix: u32, destination: &[u8], gateway: &[u8], ipv6: bool| api::Route {
        destination: destination.to_vec(),
        prefix,
        gateway: gateway.to_vec(),
        interface: name.clone(),
        ipv6,
        scope: if gateway.is_empty() && !ipv6 { libc::RT_SCOPE_LINK.into() } else { 0 },
        ..Default::default()
    };
    let neighbour = |ip: &Vec<u8>| api::Neighbour {
        ip: ip.clone(),
        mac: mac.clone(),
        interface: name.clone(),
        ..Default::default()
    };
    let network = api::Network {
        interfaces: vec![api::Interface {
            name: name.clone(),
            mac: mac.clone(),
            mtu: 1500,
            addresses: vec![address(&v4, 24), address(&v6, 64)],
            ..Default::default()
        }],
        routes: vec![
            route(24, &[192, 0, 2, 0], &[], false),
            route(64, &[&v6[..8], &[0; 8]].concat(), &[], true),
            route(0, &[], &gateway4, false),
            route(0, &[], &gateway6, true),
        ],
        neighbours: vec![neighbour(&gateway4), neighbour(&gateway6)],
        ..Default::default()
    };
    Ok(api::StartSandboxRequest {
        protocol_version: PROTOCOL_VERSION,
        sandbox_id: REHEARSAL.to_owned(),
        hostname: REHEARSAL.to_owned(),
        wall_clock_ns: i64::try_from(now.as_nanos())?,
        entropy: entropy.to_vec(),
        machine_id: machine_id.to_vec(),
        network: Some(network).into(),
        mesh: Some(sidecar::of(&HashMap::new(), true)?).into(),
        ..Default::default()
    })
}

/// /etc/hosts, as every pod has one.
fn file() -> api::CopyInRequest {
    let entry = api::FileEntry {
        mode: libc::S_IFREG | 0o644,
        data: b"127.0.0.1 localhost\n".to_vec(),
        ..Default::default()
    };
    api::CopyInRequest {
        volume_id: REHEARSAL.to_owned(),
        entries: vec![entry],
        ..Default::default()
    }
}

async fn play(guest: &Guest, events: &mut Events, layer: api::Disk) -> Result<()> {
    guest.client.copy_in(&file()).await?;
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
