//! exec, attach and port-forward with live streams, over the WebSocket of containerd's streaming server.
//!
//! Protocol `v4.channel.k8s.io`: each binary message starts with its channel: 0 stdin, 1 stdout, 2 stderr,
//! 3 the outcome as JSON, 4 terminal size. For a forwarded port: 0 what is said, 1 errors; the server's first
//! message on each is the port.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use crate::cri::Output;
use crate::node::Node;

const LIMIT: Duration = Duration::from_secs(60);

/// An open exec or attach.
pub struct Session {
    socket: WebSocket<TcpStream>,
    /// What arrived so far; the code is known at the end.
    pub output: Output,
    ended: bool,
}

impl Session {
    /// Connects to the URL that containerd gave.
    pub fn open(node: &Node, url: &str) -> Result<Self> {
        let output = Output { stdout: Vec::new(), stderr: Vec::new(), code: 0 };
        Ok(Self { socket: connect(node, url)?, output, ended: false })
    }

    /// Sends to the process's standard input.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let mut message = vec![0];
        message.extend_from_slice(bytes);
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Changes the terminal's size.
    pub fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let size = format!("\u{4}{{\"Width\":{width},\"Height\":{height}}}");
        Ok(self.socket.send(Message::binary(size.into_bytes()))?)
    }

    /// Reads until standard output holds `text`.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.output.stdout).contains(text) {
            if self.ended {
                bail!("ended without {text:?}: {:?}", self.output);
            }
            self.step()?;
        }
        Ok(())
    }

    /// Reads to the end.
    pub fn finish(mut self) -> Result<Output> {
        while !self.ended {
            self.step()?;
        }
        Ok(self.output)
    }

    fn step(&mut self) -> Result<()> {
        let message = match self.socket.read() {
            Ok(message) => message,
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                self.ended = true;
                return Ok(());
            }
            Err(error) => return Err(error).context("read from the streaming server"),
        };
        if message.is_close() {
            self.ended = true;
        }
        let data = match message {
            Message::Binary(data) => data.to_vec(),
            Message::Text(text) => text.as_bytes().to_vec(),
            _ => return Ok(()),
        };
        match data.split_first() {
            Some((1, bytes)) => self.output.stdout.extend_from_slice(bytes),
            Some((2, bytes)) => self.output.stderr.extend_from_slice(bytes),
            Some((3, bytes)) => self.output.code = exit_code(bytes)?,
            _ => {}
        }
        Ok(())
    }
}

fn connect(node: &Node, url: &str) -> Result<WebSocket<TcpStream>> {
    let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
    let protocol = HeaderValue::from_static("v4.channel.k8s.io");
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
    let authority = request.uri().authority().context("URL without a host")?.to_string();
    let stream = node.in_network(|| TcpStream::connect(&authority))?;
    let stream = stream.with_context(|| format!("connect to {authority}"))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    let (socket, _) = tungstenite::client(request, stream)
        .map_err(|error| anyhow::anyhow!("WebSocket handshake with {url}: {error}"))?;
    Ok(socket)
}

/// A connection to a forwarded port.
pub struct Forwarded {
    socket: WebSocket<TcpStream>,
    /// What the server said of what went wrong.
    pub errors: String,
    greeted: [bool; 2],
}

impl Forwarded {
    /// Connects to the URL that containerd gave.
    pub fn open(node: &Node, url: &str) -> Result<Self> {
        Ok(Self { socket: connect(node, url)?, errors: String::new(), greeted: [false; 2] })
    }

    /// Sends.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let mut message = vec![0];
        message.extend_from_slice(bytes);
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// What comes next; empty at the end.
    pub fn receive(&mut self) -> Result<Vec<u8>> {
        loop {
            let data = match self.socket.read() {
                Ok(Message::Binary(data)) => data.to_vec(),
                Ok(message) if !message.is_close() => continue,
                Ok(_)
                | Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                    return Ok(Vec::new());
                }
                Err(error) => return Err(error).context("read from the streaming server"),
            };
            let Some((channel, bytes)) = data.split_first() else { continue };
            let Some(greeted) = self.greeted.get_mut(usize::from(*channel)) else { continue };
            if !std::mem::replace(greeted, true) {
                continue;
            }
            match channel {
                0 if !bytes.is_empty() => return Ok(bytes.to_vec()),
                1 => {
                    self.errors += &String::from_utf8_lossy(bytes);
                    return Ok(Vec::new());
                }
                _ => {}
            }
        }
    }
}

/// The outcome's exit code: 0 for success, else the cause's `ExitCode`.
fn exit_code(json: &[u8]) -> Result<i32> {
    let outcome: serde_json::Value = serde_json::from_slice(json).context("outcome's JSON")?;
    if outcome["status"] == "Success" {
        return Ok(0);
    }
    let causes = outcome["details"]["causes"].as_array().cloned().unwrap_or_default();
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    let code = code.and_then(|cause| cause["message"].as_str()?.parse().ok());
    code.with_context(|| format!("no exit code in {outcome}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read() {
        assert_eq!(exit_code(br#"{"status":"Success"}"#).unwrap(), 0);
        let failed = br#"{"status":"Failure","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(exit_code(failed).unwrap(), 7);
        assert!(exit_code(br#"{"status":"Failure","message":"x"}"#).is_err());
    }
}
