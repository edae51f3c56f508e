//! A scriptable double of a machine, for tests of what is built on top.

use std::collections::BTreeMap;
#[cfg(test)]
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::{Disk, DiskLimits, Vm, VmmError};

/// What happened to a [`FakeVm`], and what it shall answer.
#[derive(Debug, Default)]
struct Script {
    calls: Vec<String>,
    disks: BTreeMap<u32, bool>,
    refuse: Option<&'static str>,
    channel: Option<UnixStream>,
}

/// A machine that only remembers.
#[derive(Debug, Clone)]
pub struct FakeVm {
    script: Arc<Mutex<Script>>,
    ended: watch::Sender<Option<String>>,
}

impl FakeVm {
    /// The machine, and the guest's end of its channel.
    pub fn new() -> std::io::Result<(Self, UnixStream)> {
        let (host, guest) = UnixStream::pair()?;
        let script = Script { channel: Some(host), ..Script::default() };
        let vm = Self { script: Arc::new(Mutex::new(script)), ended: watch::Sender::new(None) };
        Ok((vm, guest))
    }

    /// Everything it was asked, in order.
    pub fn calls(&self) -> Vec<String> {
        self.lock().calls.clone()
    }

    /// Slots with disks, and whether these are read-only.
    pub fn disks(&self) -> BTreeMap<u32, bool> {
        self.lock().disks.clone()
    }

    /// From now on, refuse disks for this reason.
    pub fn refuse_disks(&self, reason: &'static str) {
        self.lock().refuse = Some(reason);
    }

    /// The machine ends by itself.
    pub fn end(&self, how: &str) {
        self.ended.send_replace(Some(how.to_owned()));
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, call: String) {
        self.lock().calls.push(call);
    }
}

impl Vm for FakeVm {
    fn pid(&self) -> i32 {
        i32::MAX
    }

    fn take_channel(&self) -> Result<UnixStream, VmmError> {
        let channel = self.lock().channel.take();
        channel.ok_or_else(|| VmmError::ChannelTaken("fake".to_owned()))
    }

    fn attach_disk<'a>(
        &'a self,
        slot: u32,
        _disk: &'a Disk,
        read_only: bool,
    ) -> BoxFuture<'a, Result<(), VmmError>> {
        self.note(format!("attach {slot}"));
        let mut script = self.lock();
        let result = match script.refuse {
            Some(reason) => Err(VmmError::Slot { slot, reason }),
            None => {
                script.disks.insert(slot, read_only);
                Ok(())
            }
        };
        Box::pin(async { result })
    }

    fn detach_disk(&self, slot: u32) -> BoxFuture<'_, Result<(), VmmError>> {
        self.note(format!("detach {slot}"));
        self.lock().disks.remove(&slot);
        Box::pin(async { Ok(()) })
    }

    fn resize_disk(&self, slot: u32, bytes: u64) -> BoxFuture<'_, Result<(), VmmError>> {
        self.note(format!("resize {slot} {bytes}"));
        Box::pin(async { Ok(()) })
    }

    fn limit_disks(&self, limits: DiskLimits) -> BoxFuture<'_, Result<(), VmmError>> {
        self.note(format!("{limits:?}"));
        Box::pin(async { Ok(()) })
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        self.note("pause".to_owned());
        Box::pin(async { Ok(()) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        self.note("resume".to_owned());
        Box::pin(async { Ok(()) })
    }

    fn kill(&self) {
        self.note("kill".to_owned());
        self.end("killed");
    }

    fn exited(&self) -> BoxFuture<'_, String> {
        let mut ended = self.ended.subscribe();
        Box::pin(async move {
            match ended.wait_for(Option::is_some).await {
                Ok(how) => how.clone().unwrap_or_default(),
                Err(_) => "dropped".to_owned(),
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn remembers_and_refuses() {
        let (vm, _guest) = FakeVm::new().unwrap();
        let disk = Disk::from(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        vm.attach_disk(0, &disk, true).await.unwrap();
        vm.refuse_disks("no");
        assert!(vm.attach_disk(1, &disk, true).await.is_err());
        vm.kill();
        assert_eq!(vm.exited().await, "killed");
        assert_eq!(vm.calls(), ["attach 0", "attach 1", "kill"]);
        assert_eq!(vm.disks().len(), 1);
    }
}
