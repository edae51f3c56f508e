//! The daemon's memory, bounded whatever images are: large work takes turns.
//!
//! | who | how many at once | bytes each |
//! | --- | --- | --- |
//! | layer being applied | [`APPLIES`] | about 16 MiB: pieces on their way and a zstd window of 8 MiB; 28 for a file of 64 GiB of holes |
//! | disk being made, up to [`SMALL`] | [`DISKS`] | [`SMALL`] |
//! | greater disk, or layer with a greater window | 1 | [`LARGE`] |
//!
//! Whoever needs more than the small share gives it back, waits for the large one and begins anew: how
//! much an image takes is known only when it is read. All together, with the daemon itself, stay below
//! 256 MiB.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Layers that are applied at once.
pub const APPLIES: usize = 3;
/// Small disks that are made at once.
pub const DISKS: usize = 2;
/// Memory of a small disk's tree.
pub const SMALL: usize = 8 << 20;
/// Memory of any other one's; beyond it an image is refused.
pub const LARGE: usize = 144 << 20;

/// A number of shares, for whose end others wait.
#[derive(Debug)]
pub struct Shares {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A share that is held.
#[derive(Debug)]
pub struct Share(Arc<Shares>);

impl Shares {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(count), freed: Condvar::new() })
    }

    /// Waits for a share.
    pub fn take(self: &Arc<Self>) -> Share {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_while(free, |free| *free == 0);
        *waited.unwrap_or_else(PoisonError::into_inner) -= 1;
        Share(Arc::clone(self))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// All shares.
#[derive(Debug)]
pub struct Memory {
    /// For a layer.
    pub applies: Arc<Shares>,
    /// For a small disk.
    pub disks: Arc<Shares>,
    /// For what is large.
    pub large: Arc<Shares>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { applies: Shares::new(APPLIES), disks: Shares::new(DISKS), large: Shares::new(1) }
    }
}

/// Has the C library keep little of what is freed, whoever used it: otherwise each of the many threads
/// that do the work keeps some, and vectors of megabytes leave holes between what stays.
#[allow(unsafe_code)]
pub fn bound() {
    // SAFETY: they set the allocator's own parameters, and there is but one thread yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 << 20);
    }
}

/// Gives freed memory back to the kernel. The C library keeps it for the thread that used it, and
/// the next large work is another thread's.
#[allow(unsafe_code)]
pub fn trim() {
    // SAFETY: it takes no pointer and changes nothing that a program sees.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_gets_the_share_that_is_given_back() {
        let shares = Shares::new(1);
        let first = shares.take();
        let other = Arc::clone(&shares);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let share = other.take();
            let _ = sender.send(());
            drop(share);
        });
        let soon = std::time::Duration::from_millis(50);
        assert!(receiver.recv_timeout(soon).is_err(), "two had the one share");
        drop(first);
        assert!(receiver.recv_timeout(std::time::Duration::from_secs(10)).is_ok());
    }
}
