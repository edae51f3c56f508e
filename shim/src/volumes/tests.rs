//! What a guest is sent of volumes that the kubelet changes.

use std::os::unix::fs::symlink;
use std::time::Duration;

use async_trait::async_trait;
use joey_protocol::limits::{STREAM_EVENTS, STREAM_RPC};
use joey_protocol::mux::{Mux, MuxStream};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;

use super::*;
use crate::guest::GuestChannel;

/// Tells the paths that each call names, and refuses as many calls as `1` says.
struct FakeAgent(mpsc::UnboundedSender<Vec<String>>, Mutex<u32>);

#[async_trait]
impl api::Agent for FakeAgent {
    async fn copy_in(
        &self,
        _: &TtrpcContext,
        request: api::CopyInRequest,
    ) -> ttrpc::Result<api::Empty> {
        let mut refuse = self.1.lock().unwrap();
        if *refuse > 0 {
            *refuse -= 1;
            let status = ttrpc::get_status(ttrpc::Code::INTERNAL, "no room");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let mark = |it: api::FileEntry| if it.remove { format!("-{}", it.path) } else { it.path };
        let mut paths: Vec<_> = request.entries.into_iter().map(mark).collect();
        paths.sort();
        let _ = self.0.send(paths);
        Ok(api::Empty::new())
    }
}

struct Rig {
    client: Client,
    agent: Arc<FakeAgent>,
    sent: mpsc::UnboundedReceiver<Vec<String>>,
    volumes: Volumes,
    volume: Volume,
    source: tempfile::TempDir,
    _guest: (ttrpc::r#async::Server, MuxStream, GuestChannel),
}

/// A guest, and a volume with one key as the kubelet publishes it.
async fn rig() -> Rig {
    let (host, io) = UnixStream::pair().unwrap();
    let (mux, driver) = Mux::new(io);
    tokio::spawn(async move { drop(driver.await) });
    let calls = mux.open(STREAM_RPC).unwrap();
    let events = mux.open(STREAM_EVENTS).unwrap();
    let once = futures::stream::iter([Ok(calls)]);
    let listener = Listener::new(futures::StreamExt::chain(once, futures::stream::pending()));
    let (sender, sent) = mpsc::unbounded_channel();
    let agent = Arc::new(FakeAgent(sender, Mutex::default()));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(api::create_agent(agent.clone()));
    server.start().await.unwrap();
    let channel = GuestChannel::connect(host).unwrap();
    let source = tempfile::tempdir().unwrap();
    publish(source.path(), "..1");
    symlink("..data/key", source.path().join("key")).unwrap();
    let volume = Volume {
        id: "v".to_owned(),
        source: Source::Host(source.path().to_owned()),
        destination: PathBuf::from("/config"),
    };
    let client = channel.client.clone();
    let _guest = (server, events, channel);
    Rig { client, agent, sent, volumes: Volumes::default(), volume, source, _guest }
}

/// The kubelet's swap, without the end of the old folder.
fn publish(root: &Path, folder: &str) {
    fs::create_dir(root.join(folder)).unwrap();
    fs::write(root.join(folder).join("key"), folder).unwrap();
    symlink(folder, root.join("..data_tmp")).unwrap();
    fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
}

impl Rig {
    async fn container(&self) {
        let volumes = std::slice::from_ref(&self.volume);
        self.volumes.copy_in(&self.client, volumes).await.unwrap();
    }

    async fn next(&mut self) -> Vec<String> {
        tokio::time::timeout(Duration::from_secs(20), self.sent.recv()).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_further_container_writes_nothing_anew() {
    let mut rig = rig().await;
    rig.container().await;
    assert_eq!(rig.next().await, ["", "..1", "..1/key", "..data", "key"]);
    rig.container().await;
    assert!(rig.sent.try_recv().is_err());
    // What was published just now is there when the next container comes.
    publish(rig.source.path(), "..2");
    rig.container().await;
    assert_eq!(rig.sent.try_recv().unwrap(), ["-..1", "..2", "..2/key", "..data"]);
}

#[tokio::test]
async fn a_refusal_of_the_guest_is_not_the_end() {
    let mut rig = rig().await;
    rig.container().await;
    rig.next().await;
    *rig.agent.1.lock().unwrap() = 1;
    publish(rig.source.path(), "..2");
    assert_eq!(rig.next().await, ["-..1", "..2", "..2/key", "..data"]);
    publish(rig.source.path(), "..3");
    assert_eq!(rig.next().await, ["-..2", "..3", "..3/key", "..data"]);
}

#[tokio::test]
async fn files_are_limited_by_their_bytes_not_their_number() {
    let mut rig = rig().await;
    for number in 0..12_000 {
        fs::write(rig.source.path().join(number.to_string()), "").unwrap();
    }
    rig.container().await;
    assert_eq!(rig.next().await.len(), 12_005);
    let source = tempfile::tempdir().unwrap();
    let file = File::create(source.path().join("big")).unwrap();
    file.set_len(MAX_BYTES + 1).unwrap();
    rig.volume.id = "w".to_owned();
    rig.volume.source = Source::Host(source.path().to_owned());
    let volumes = std::slice::from_ref(&rig.volume);
    let error = rig.volumes.copy_in(&rig.client, volumes).await.unwrap_err();
    assert!(matches!(error, VolumeError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn another_version_of_a_part_leaves_nothing_of_the_one_before() {
    let mut rig = rig().await;
    let part = tempfile::tempdir().unwrap();
    rig.volume.source = Source::Host(part.path().to_owned());
    let write = |name: &str| {
        fs::create_dir_all(part.path().join(name).parent().unwrap()).unwrap();
        fs::write(part.path().join(name), name).unwrap();
    };
    ["a", "b", "deep/a", "deep/b", "other"].into_iter().for_each(write);
    rig.container().await;
    assert_eq!(rig.next().await, ["", "a", "b", "deep", "deep/a", "deep/b", "other"]);
    for gone in ["b", "deep/b", "other"] {
        fs::remove_file(part.path().join(gone)).unwrap();
    }
    write("other/a");
    rig.container().await;
    let again = ["", "-b", "-deep", "-other", "a", "deep", "deep/a", "other", "other/a"];
    assert_eq!(rig.next().await, again);
    fs::remove_file(part.path().join("a")).unwrap();
    rig.container().await;
    assert_eq!(rig.next().await, ["", "-a", "deep", "deep/a", "other", "other/a"]);
}

#[tokio::test]
async fn half_of_a_folder_goes_with_the_next_swap() {
    let mut rig = rig().await;
    rig.container().await;
    rig.next().await;
    // More than a message, and then something that cannot be read to its end.
    let begun = rig.source.path().join("..2");
    fs::create_dir(&begun).unwrap();
    for number in 0..5 {
        File::create(begun.join(number.to_string())).unwrap().set_len(1 << 20).unwrap();
    }
    let file = File::create(begun.join("big")).unwrap();
    file.set_len(MAX_BYTES + 1).unwrap();
    symlink("..2", rig.source.path().join("..data_tmp")).unwrap();
    fs::rename(rig.source.path().join("..data_tmp"), rig.source.path().join("..data")).unwrap();
    assert!(rig.next().await.iter().any(|path| path.starts_with("..2")));
    while tokio::time::timeout(Duration::from_secs(3), rig.sent.recv()).await.is_ok() {}
    publish(rig.source.path(), "..3");
    assert_eq!(rig.next().await, ["-..1", "-..2", "..3", "..3/key", "..data"]);
}

#[tokio::test]
async fn containers_at_once_copy_once() {
    let mut rig = rig().await;
    futures::future::join(rig.container(), rig.container()).await;
    assert_eq!(rig.next().await, ["", "..1", "..1/key", "..data", "key"]);
    assert!(rig.sent.try_recv().is_err());
}

#[tokio::test]
async fn a_swap_between_listing_and_copy_leaves_no_folder() {
    let mut rig = rig().await;
    let listed = Published::watch(rig.source.path(), &rig.volumes.watches).unwrap();
    let (mut published, _watch) = listed.unwrap();
    publish(rig.source.path(), "..2");
    let copied = [("..2", libc::S_IFDIR), ("..2/deep", libc::S_IFDIR), ("late", libc::S_IFLNK)];
    published.has(copied.map(|(path, kind)| (path.into(), kind)).into());
    publish(rig.source.path(), "..3");
    published.refresh(&rig.client, &rig.volume).await.unwrap();
    assert_eq!(rig.next().await, ["-..2", "-late", "..3", "..3/key", "..data"]);
}
