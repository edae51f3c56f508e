//! `kubectl port-forward`: containerd connects to the pod's localhost in the network namespace that the pod
//! has on the node, and each such connection is carried to the guest's.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use joey_protocol::api;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Guest;
use crate::guest::Lost;
use crate::host::loopback::Loopback;

/// A start has better things to do.
const LATER: Duration = Duration::from_millis(300);
/// Connections of one pod at a time.
const CONNECTIONS: usize = 128;
/// How long to wait when no connection can be taken, for want of descriptors say.
const PAUSE: Duration = Duration::from_secs(1);

/// Carries connections for as long as there is a guest.
pub(super) fn serve(id: &str, guest: &Guest, netns: &Path, mut lost: Lost) {
    let (id, guest, netns) = (id.to_owned(), guest.clone(), netns.to_owned());
    tokio::spawn(async move {
        let serving = async {
            tokio::time::sleep(LATER).await;
            let error = match open(&netns) {
                Ok((listener, _loopback)) => accept(&guest, &listener).await,
                Err(error) => error,
            };
            tracing::warn!(sandbox = %id, %error, "kubectl port-forward does not reach this pod");
        };
        tokio::select! {
            _ = lost.wait() => {}
            () = serving => {}
        }
    });
}

fn open(netns: &Path) -> io::Result<(TcpListener, Loopback)> {
    let loopback = Loopback::open(netns)?;
    Ok((TcpListener::from_std(loopback.listener.try_clone()?)?, loopback))
}

/// Takes connections, each carried by a task of its own.
async fn accept(guest: &Guest, listener: &TcpListener) -> io::Error {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return io::Error::other("no place for connections");
        };
        match listener.accept().await {
            Ok((connection, _)) => {
                let guest = guest.clone();
                tokio::spawn(async move {
                    if let Err(error) = carry(&guest, connection).await {
                        tracing::info!(%error, "connection to the pod's localhost");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "no connection to the pod's localhost taken");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn carry(guest: &Guest, mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let port = connection.local_addr()?.port();
    let mut stream = guest.streams.open().map_err(io::Error::other)?;
    let mut request = api::ForwardRequest::new();
    request.stream = stream.id();
    request.port = port.into();
    if let Err(error) = guest.client.forward(&request).await {
        // It cannot be refused any more: a reset is as near as one gets.
        let reset = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&connection, sockopt::Linger, &reset)?;
        return Err(io::Error::other(error));
    }
    // How it ends is a matter of those who speak.
    let _ = tokio::io::copy_bidirectional(&mut connection, &mut stream).await;
    Ok(())
}
