//! A logger program (`binary://`), started as containerd's own shim does.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio as Null;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::{StdioError, sys};

const READY: Duration = Duration::from_secs(10);
/// How long a logger may go on after the end of its input.
const FINISH: Duration = Duration::from_secs(12);

/// A logger that runs.
#[derive(Debug)]
pub(super) struct Logger(Child);

impl Logger {
    /// Lets it come to its end, which its input has reached, and ends it if it does not.
    pub(super) fn finish(mut self) {
        tokio::spawn(async move {
            if timeout(FINISH, self.0.wait()).await.is_err() {
                let _ = self.0.kill().await;
            }
        });
    }
}

/// Starts it and waits until it is ready: the writing ends for stdout and stderr.
pub(super) async fn start(
    program: PathBuf,
    args: &[OsString],
    container: &str,
    namespace: &str,
) -> Result<(Logger, pipe::Sender, pipe::Sender), StdioError> {
    let failed = |source: io::Error| StdioError::Logger { program: program.clone(), source };
    let new_pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|error| failed(error.into()));
    let (out_reader, out) = new_pipe()?;
    let (error_reader, error) = new_pipe()?;
    let (ready, ready_writer) = new_pipe()?;
    let mut command = Command::new(&program);
    command.args(args).env_clear();
    command.env("CONTAINER_ID", container).env("CONTAINER_NAMESPACE", namespace);
    command.stdin(Null::null()).stdout(Null::null()).stderr(Null::null());
    sys::pass_from_3(&mut command, [out_reader, error_reader, ready_writer]).map_err(failed)?;
    let child = command.spawn().map_err(failed)?;
    // The command holds the child's ends; here they would hide its death.
    drop(command);
    let mut logger = Logger(child);
    let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
    // A byte or the end of file, as containerd reads it.
    match timeout(READY, ready.read(&mut [0; 1])).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(failed(error)),
        Err(_) => {
            let _ = logger.0.kill().await;
            return Err(StdioError::LoggerNotReady { program, seconds: READY.as_secs() });
        }
    }
    let sender = |fd| pipe::Sender::from_owned_fd(fd).map_err(failed);
    Ok((logger, sender(out)?, sender(error)?))
}
