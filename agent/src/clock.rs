//! The guest's wall clock follows the host's: a machine that was stopped for a while has lost that time,
//! and no clock runs as fast as another.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::log::info;
use crate::sys;

/// What is no more than this is made up for by a clock that runs faster or slower for a while: half a
/// millisecond a second (adjtimex(2)), so 30 ms from one minute to the next.
const SLEWED_NS: i64 = 100_000_000;

/// Moves the clock by so much and gives what it is then, in nanoseconds since 1970.
pub(crate) fn adjust(nanoseconds: i64) -> io::Result<i64> {
    if is_slewed(nanoseconds) {
        sys::slew_clock(nanoseconds / 1000)?;
    } else {
        info!("the clock is moved by {} ms, as the host asks", nanoseconds / 1_000_000);
        sys::step_clock(nanoseconds)?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(i64::try_from(now.as_nanos()).unwrap_or(i64::MAX))
}

fn is_slewed(nanoseconds: i64) -> bool {
    nanoseconds.unsigned_abs() <= SLEWED_NS.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_little_is_slewed() {
        assert!(is_slewed(0) && is_slewed(-SLEWED_NS) && is_slewed(SLEWED_NS));
        assert!(!is_slewed(SLEWED_NS + 1) && !is_slewed(i64::MIN));
    }
}
