//! Client of QEMU's control socket: one command at a time, bounded lines, events kept apart.
//!
//! Invariants: a command's answer is the line with the command's number, which QEMU repeats (`id`): one
//! that came too late for its own command answers no other;
//! a line is at most [`MAX_LINE`]; at most [`MAX_EVENTS`] events wait, older ones are dropped; once a
//! command could not be sent whole the client refuses further use.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest line that QEMU may send.
const MAX_LINE: usize = 1024 * 1024;
/// Events that wait for someone to look.
const MAX_EVENTS: usize = 64;
/// How long QEMU may take for one command: none of ours waits for anything.
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);

/// A failed exchange with QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused a command.
    #[error("QEMU refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's reason.
        reason: String,
    },
    /// The socket failed.
    #[error("QEMU's control socket, during `{command}`: {source}")]
    Socket {
        /// The command.
        command: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// QEMU closed the socket: it ended.
    #[error("QEMU closed its control socket during `{command}`")]
    Closed {
        /// The command.
        command: String,
    },
    /// QEMU did not answer in time.
    #[error("QEMU did not answer `{command}` within {COMMAND_DEADLINE:?}")]
    Deadline {
        /// The command.
        command: String,
    },
    /// QEMU sent something that is no answer.
    #[error("QEMU's control socket, during `{command}`: {what}")]
    Malformed {
        /// The command.
        command: String,
        /// What is wrong.
        what: &'static str,
    },
}

/// The client's end of the socket.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    /// The last command's number.
    number: u64,
    /// Whether a command may have been sent in part.
    torn: bool,
}

/// Something QEMU told without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, as `STOP` or `MIGRATION`.
    pub name: String,
    /// What goes with it.
    pub data: Value,
}

impl Qmp {
    /// Goes on where another client stopped, whose QEMU was continued from a checkpoint.
    pub fn resume(socket: UnixStream) -> Self {
        Self {
            socket,
            buffer: Vec::with_capacity(1024),
            events: VecDeque::new(),
            number: 0,
            torn: false,
        }
    }

    /// Reads the greeting and enables commands.
    pub async fn connect(socket: UnixStream) -> Result<Self, QmpError> {
        let mut client = Self::resume(socket);
        let greeting = client.line("greeting").await?;
        if greeting.get("QMP").is_none() {
            return Err(malformed("greeting", "no greeting of QEMU"));
        }
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Runs a command and gives its result.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None).await
    }

    /// Runs a command that takes a descriptor along.
    pub async fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        if self.torn {
            return Err(malformed(command, "an earlier command was sent in part only"));
        }
        self.number += 1;
        let exchange = async {
            let id = self.number;
            let mut text =
                json!({"execute": command, "arguments": arguments, "id": id}).to_string();
            text.push('\n');
            self.torn = true;
            self.send(command, text.as_bytes(), fd).await?;
            self.torn = false;
            self.answer(command).await
        };
        timeout(COMMAND_DEADLINE, exchange)
            .await
            .unwrap_or_else(|_| Err(QmpError::Deadline { command: command.to_owned() }))
    }

    /// The next event, of those that wait or that QEMU sends next.
    pub async fn event(&mut self) -> Result<Event, QmpError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let line = self.line("event").await?;
            self.keep_event(&line);
        }
    }

    async fn answer(&mut self, command: &str) -> Result<Value, QmpError> {
        loop {
            let mut line = self.line(command).await?;
            if self.keep_event(&line) || self.is_late(&line) {
                continue;
            }
            if let Some(result) = line.get_mut("return") {
                return Ok(result.take());
            }
            let Some(reason) = line.pointer("/error/desc").and_then(Value::as_str) else {
                return Err(malformed(command, "neither result, error nor event"));
            };
            return Err(QmpError::Refused {
                command: command.to_owned(),
                reason: reason.chars().take(500).collect(),
            });
        }
    }

    /// Whether this answers a command that nobody waits for any more. What QEMU cannot even read as a
    /// command it answers without a number: it is taken for an answer to the last one.
    fn is_late(&self, line: &Value) -> bool {
        line.get("id").and_then(Value::as_u64).is_some_and(|id| id != self.number)
    }

    fn keep_event(&mut self, line: &Value) -> bool {
        let Some(name) = line.get("event").and_then(Value::as_str) else {
            return false;
        };
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event {
            name: name.to_owned(),
            data: line.get("data").cloned().unwrap_or(Value::Null),
        });
        true
    }

    /// The next line. Dropping the future loses nothing: what was read stays in the buffer.
    async fn line(&mut self, command: &str) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|_| malformed(command, "a line that is no JSON"));
            }
            if self.buffer.len() > MAX_LINE {
                return Err(malformed(command, "a line without end"));
            }
            match self.socket.read_buf(&mut self.buffer).await {
                Ok(0) => {
                    return Err(QmpError::Closed { command: command.to_owned() });
                }
                Ok(_) => {}
                Err(source) if source.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed { command: command.to_owned() });
                }
                Err(source) => return Err(failed(command, source)),
            }
        }
    }

    async fn send(
        &self,
        command: &str,
        mut bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        let raw = fd.map(|fd| [fd.as_raw_fd()]);
        let mut rights: Vec<ControlMessage<'_>> = Vec::new();
        if let Some(raw) = &raw {
            rights.push(ControlMessage::ScmRights(raw));
        }
        while !bytes.is_empty() {
            let sent = self
                .socket
                .async_io(Interest::WRITABLE, || {
                    let parts = [io::IoSlice::new(bytes)];
                    sendmsg::<()>(
                        self.socket.as_raw_fd(),
                        &parts,
                        &rights,
                        MsgFlags::MSG_NOSIGNAL,
                        None,
                    )
                    .map_err(io::Error::from)
                })
                .await
                .map_err(|source| match source.kind() {
                    io::ErrorKind::BrokenPipe => QmpError::Closed { command: command.to_owned() },
                    _ => failed(command, source),
                })?;
            rights.clear();
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

fn malformed(command: &str, what: &'static str) -> QmpError {
    QmpError::Malformed { command: command.to_owned(), what }
}

fn failed(command: &str, source: io::Error) -> QmpError {
    QmpError::Socket { command: command.to_owned(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    async fn server(socket: UnixStream, answers: Vec<&'static str>) {
        let mut socket = BufReader::new(socket);
        socket.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        for answer in answers {
            let mut line = String::new();
            socket.read_line(&mut line).await.unwrap();
            assert!(line.contains("\"id\":"), "{line}");
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn events_do_not_answer_commands() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers = vec!["{\"return\": {}}\n", "{\"event\": \"STOP\"}\n{\"return\": 7}\n"];
        tokio::spawn(server(theirs, answers));
        let mut qmp = Qmp::connect(ours).await.unwrap();
        assert_eq!(qmp.execute("x", json!({})).await.unwrap(), json!(7));
        assert_eq!(qmp.event().await.unwrap().name, "STOP");
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_told_apart() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers = vec![
            "{\"return\": {}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n",
            "{}\n",
            "]\n",
        ];
        tokio::spawn(server(theirs, answers));
        let mut qmp = Qmp::connect(ours).await.unwrap();
        for expected in ["refused `x`: no", "neither", "no JSON", "closed"] {
            let error = qmp.execute("x", json!({})).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_comes_too_late_answers_no_other_command() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let late = "{\"return\": \"late\", \"id\": 2}\n{\"return\": \"own\", \"id\": 3}\n";
        tokio::spawn(server(theirs, vec!["{\"return\": {}, \"id\": 1}\n", "", late]));
        let mut qmp = Qmp::connect(ours).await.unwrap();
        let error = qmp.execute("x", json!({})).await.unwrap_err();
        assert!(matches!(error, QmpError::Deadline { .. }), "{error}");
        assert_eq!(qmp.execute("y", json!({})).await.unwrap(), json!("own"));
    }

    #[tokio::test]
    async fn a_command_that_was_sent_in_part_is_the_last() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(server(theirs, vec!["{\"return\": {}, \"id\": 1}\n"]));
        let mut qmp = Qmp::connect(ours).await.unwrap();
        let big = json!({"x": "x".repeat(8 << 20)});
        let cut = qmp.execute("x", big);
        let _ = timeout(Duration::from_millis(50), cut).await;
        let error = qmp.execute("y", json!({})).await.unwrap_err();
        assert!(!matches!(error, QmpError::Deadline { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let _ = theirs.write_all(&vec![b'x'; 2 * MAX_LINE]).await;
        });
        let error = Qmp::connect(ours).await.unwrap_err();
        assert!(error.to_string().contains("without end"), "{error}");
    }
}
