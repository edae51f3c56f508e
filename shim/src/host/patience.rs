//! Questions to file systems of the host that may never answer.

use std::io;
use std::time::Duration;

use tokio::sync::oneshot;

/// How long a file system may take. Whatever is mounted and reachable answers at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `act` beside the runtime, whose one thread serves the whole pod: an NFS or CSI mount whose
/// server is gone holds a caller for as long as that lasts. Such a thread stays behind; it is one of
/// `std`'s, not of the runtime's, which would wait for it when the shim ends.
///
/// # Errors
/// It takes longer than `limit`, or there is no thread.
pub(crate) async fn within<T: Send + 'static>(
    limit: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, answer) = oneshot::channel();
    std::thread::Builder::new()
        .name("host-files".to_owned())
        .spawn(move || drop(done.send(act())))?;
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(io::Error::other("the question was not put to its end")),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {limit:?}; is its server reachable?"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_answer_is_left_behind() {
        assert_eq!(within(PATIENCE, || 7).await.unwrap(), 7);
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let error = within(Duration::from_millis(50), move || held.recv()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("50ms"), "{error}");
        drop(hold);
    }
}
