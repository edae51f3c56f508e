//! `joey-snapshotter`: images as block data for containerd, one daemon per node.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use joey_snapshotter::config::Config;
use joey_snapshotter::service::api::services::diff::v1::diff_server::DiffServer;
use joey_snapshotter::service::api::services::snapshots::v1::snapshots_server::SnapshotsServer;
use joey_snapshotter::service::apply::Applier;
use joey_snapshotter::service::diff::Differ;
use joey_snapshotter::service::snapshots::Service;
use joey_snapshotter::store::Store;
use joey_snapshotter::{memory, metrics};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// Keeps images as block data for sandboxes: a proxy plugin of containerd's, snapshotter and differ.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (else /etc/joey/snapshotter.toml, if there is one).
    #[arg(long)]
    config: Option<PathBuf>,
    /// Folder of the store, instead of the configured one.
    #[arg(long)]
    root: Option<PathBuf>,
    /// Unix socket for containerd, instead of the configured one.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// containerd's socket, instead of the configured one.
    #[arg(long)]
    containerd: Option<PathBuf>,
}

fn main() -> ExitCode {
    use std::io::Write as _;
    memory::bound();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let run = || -> anyhow::Result<()> {
        let arguments = Arguments::parse();
        let mut config =
            Config::load(arguments.config.as_deref()).map_err(|text| anyhow::anyhow!(text))?;
        let given = [
            (arguments.root, &mut config.root),
            (arguments.socket, &mut config.socket),
            (arguments.containerd, &mut config.containerd),
        ];
        for (given, setting) in given {
            if let Some(path) = given {
                *setting = path;
            }
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(serve(config))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done about a closed standard error.
            let _ = writeln!(std::io::stderr(), "joey-snapshotter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Listens on a socket for root, in place of what is there.
fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)
        .map_err(|error| anyhow::anyhow!("listen on {}: {error}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // The store's lock comes first: whoever has it owns the socket.
    let store = Arc::new(Store::open(&config.root)?);
    let applier = Applier::new(Arc::clone(&store), config.containerd, config.max_layer_bytes)?;
    let listener = listen(&config.socket)?;
    if let Some(socket) = &config.metrics {
        tokio::spawn(metrics::serve(listen(socket)?, Arc::clone(&store)));
    }
    tracing::info!(socket = %config.socket.display(), root = %config.root.display(), "serving");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending");
    };
    Server::builder()
        .add_service(SnapshotsServer::new(Service { store, run_dir: config.run_dir }))
        .add_service(DiffServer::new(Differ { applier }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), end)
        .await?;
    Ok(())
}
