//! Connections from the node to the pod's localhost (`kubectl port-forward`): the host asks for a port, and a
//! stream of the channel carries what is said.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use joey_protocol::limits::{STREAM_FIRST_STDIO, deadline};
use joey_protocol::mux::{Mux, OpenError};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    /// The port is none.
    #[error("forward: port {0} is not from 1 to 65535")]
    Port(u32),
    /// A stream's number is one of the channel's own.
    #[error("forward: stream {0} is not for connections")]
    Reserved(u32),
    /// The stream does not open.
    #[error("forward: {0}")]
    Stream(#[from] OpenError),
    /// Nothing listens there.
    #[error("localhost port {port} in the pod: {source}")]
    Connect {
        /// The port.
        port: u16,
        /// The kernel's answer, by IPv4.
        source: io::Error,
    },
}

/// Connects, and carries what is said until both sides have ended.
pub(crate) async fn forward(mux: &Mux, stream: u32, port: u32) -> Result<(), ForwardError> {
    let number = u16::try_from(port).ok().filter(|port| *port != 0);
    let port = number.ok_or(ForwardError::Port(port))?;
    if stream < STREAM_FIRST_STDIO {
        return Err(ForwardError::Reserved(stream));
    }
    let mut stream = mux.open(stream)?;
    let mut connection = match connect(Ipv4Addr::LOCALHOST.into(), port).await {
        Ok(connection) => connection,
        Err(source) => connect(Ipv6Addr::LOCALHOST.into(), port)
            .await
            .map_err(|_| ForwardError::Connect { port, source })?,
    };
    tokio::spawn(async move {
        // How it ends is a matter of those who speak.
        let _ = tokio::io::copy_bidirectional(&mut connection, &mut stream).await;
    });
    Ok(())
}

async fn connect(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let connecting = TcpStream::connect((address, port));
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let connection = timeout(deadline::FORWARD_CONNECT, connecting).await.map_err(|_| late())??;
    connection.set_nodelay(true)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_is_said_is_carried_both_ways() {
        let (near, far) = tokio::io::duplex(4096);
        let (host, driver) = Mux::connect(near);
        tokio::spawn(driver);
        let (guest, driver) = Mux::new(far);
        tokio::spawn(driver);
        // By IPv6 alone, if there is any here.
        let listener = match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
        };
        let port = listener.local_addr().unwrap().port();
        let mut stream = host.open(16).unwrap();
        forward(&guest, 16, port.into()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        stream.write_all(b"question").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = String::new();
        server.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "question");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        said.clear();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "answer");
    }

    #[tokio::test]
    async fn what_cannot_be_connected_is_told() {
        let (guest, _driver) = Mux::new(tokio::io::empty());
        let error = forward(&guest, 16, 70_000).await.unwrap_err();
        assert_eq!(error.to_string(), "forward: port 70000 is not from 1 to 65535");
        assert!(matches!(forward(&guest, 1, 80).await, Err(ForwardError::Reserved(1))));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = forward(&guest, 16, port.into()).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("localhost port {port} in the pod: ")), "{error}");
    }
}
