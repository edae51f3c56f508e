//! Keeps the guest's wall clock with the host's. It is set once at the start; after that it runs by itself,
//! and stands while the machine stands.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Guest;
use crate::guest::{Client, GuestError, Lost};

/// How often a guest's clock is looked at.
const EVERY: Duration = Duration::from_secs(60);
/// Two clocks that differ by less are taken for equal.
const EQUAL: Duration = Duration::from_millis(5);

/// Sees to the clock for as long as there is a guest.
pub(super) fn follow(guest: &Guest, mut lost: Lost) {
    let client = guest.client.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = lost.wait() => return,
                () = tokio::time::sleep(EVERY) => compare(&client).await,
            }
        }
    });
}

/// Sees to the clock now, beside whatever else is done.
pub(super) fn look(guest: &Guest) {
    let client = guest.client.clone();
    tokio::spawn(async move { compare(&client).await });
}

async fn compare(client: &Client) {
    if let Err(error) = correct(client).await {
        tracing::debug!(%error, "the guest's clock not compared");
    }
}

async fn correct(client: &Client) -> Result<(), GuestError> {
    let (asked, start) = (SystemTime::now(), Instant::now());
    let told = client.adjust_clock(0).await?;
    let behind = behind(asked, start.elapsed(), told);
    if behind != 0 {
        client.adjust_clock(behind).await?;
        tracing::debug!(nanoseconds = behind, "the guest's clock moved");
    }
    Ok(())
}

/// By how much a clock that told `told` is behind that which told `asked` when it was asked; 0 if that is
/// less than can be known: it may have been read at any time until its answer came, after `took`.
fn behind(asked: SystemTime, took: Duration, told: i64) -> i64 {
    let unsure = took / 2;
    let read = asked.duration_since(UNIX_EPOCH).unwrap_or_default() + unsure;
    let read = i64::try_from(read.as_nanos()).unwrap_or(i64::MAX);
    let behind = read.saturating_sub(told);
    let known = u128::from(behind.unsigned_abs()) > unsure.max(EQUAL).as_nanos();
    if known { behind } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_moved_by_what_can_be_known_of_it() {
        const MS: i64 = 1_000_000;
        let asked = UNIX_EPOCH + Duration::from_secs(1000);
        let at = |ms: i64| 1_000_000 * MS + ms * MS;
        let took = Duration::from_millis;
        assert_eq!(behind(asked, took(2), at(1)), 0);
        assert_eq!(behind(asked, took(2), at(-3)), 0, "too little");
        assert_eq!(behind(asked, took(2), at(-5000)), 5001 * MS);
        assert_eq!(behind(asked, took(2), at(5001)), -5000 * MS);
        assert_eq!(behind(asked, took(400), at(50)), 0, "the answer took longer than that");
        assert_eq!(behind(asked, took(0), i64::MIN), i64::MAX);
    }
}
