use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use joey_protocol::api;
use joey_protocol::limits::{MAX_EVENT, PROTOCOL_VERSION, deadline};
use joey_protocol::mux::{Mux, MuxStream};
use protobuf::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;

use super::*;

struct FakeAgent(u32);

#[async_trait]
impl api::Agent for FakeAgent {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: api::HelloRequest,
    ) -> ttrpc::Result<api::HelloResponse> {
        let mut reply = api::HelloResponse::new();
        reply.protocol_version = self.0;
        reply.kernel_release = "6.12".to_owned();
        Ok(reply)
    }

    async fn delete(&self, _: &TtrpcContext, _: api::ProcessRequest) -> ttrpc::Result<api::Empty> {
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
            ttrpc::Code::NOT_FOUND,
            "no container \"x\"\nhere",
        )))
    }

    async fn pause(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        std::future::pending().await
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: api::ContainerRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let mut reply = api::StatsResponse::new();
        reply.memory_stat = (0..1000).map(|n| (n.to_string(), n)).collect::<HashMap<_, _>>();
        Ok(reply)
    }
}

struct FakeGuest {
    mux: Mux,
    events: MuxStream,
    _server: ttrpc::r#async::Server,
    task: tokio::task::JoinHandle<()>,
}

async fn guest(version: u32) -> (GuestChannel, FakeGuest) {
    let (host, io) = UnixStream::pair().unwrap();
    let (mux, driver) = Mux::new(io);
    let task = tokio::spawn(async move { drop(driver.await) });
    let calls = mux.open(STREAM_RPC).unwrap();
    let events = mux.open(STREAM_EVENTS).unwrap();
    let once = futures::stream::iter([Ok(calls)]);
    let listener = Listener::new(futures::StreamExt::chain(once, futures::stream::pending()));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(api::create_agent(Arc::new(FakeAgent(version))));
    server.start().await.unwrap();
    let channel = GuestChannel::connect(host).unwrap();
    (channel, FakeGuest { mux, events, _server: server, task })
}

async fn send(guest: &mut FakeGuest, event: &api::Event) {
    let bytes = event.write_to_bytes().unwrap();
    guest.events.write_u32_le(bytes.len() as u32).await.unwrap();
    guest.events.write_all(&bytes).await.unwrap();
}

fn exit(container: &str, status: u32) -> api::Event {
    let mut exit = api::ExitEvent::new();
    exit.container_id = container.to_owned();
    exit.status = status;
    exit.exited_at_ns = 1_000_000_000;
    let mut event = api::Event::new();
    event.set_exit(exit);
    event
}

#[tokio::test]
async fn calls_are_answered_and_errors_keep_their_kind() {
    let (channel, _guest) = guest(PROTOCOL_VERSION).await;
    let hello = channel.client.hello(deadline::HELLO).await.unwrap();
    assert_eq!(hello.kernel_release, "6.12");
    let error = channel.client.delete(&api::ProcessRequest::new()).await.unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), "delete failed in the guest: no container \"x\" here");
}

#[tokio::test]
async fn replies_out_of_bounds_are_refused() {
    let (channel, _guest) = guest(PROTOCOL_VERSION + 1).await;
    let error = channel.client.hello(deadline::HELLO).await.unwrap_err().to_string();
    let other = format!("protocol version {}", PROTOCOL_VERSION + 1);
    assert!(error.contains(&other), "{error}");
    let error = channel.client.stats(&api::ContainerRequest::new()).await.unwrap_err().to_string();
    assert!(error.contains("1000 counters"), "{error}");
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_given_up() {
    let (channel, guest) = guest(PROTOCOL_VERSION).await;
    let request = api::ContainerRequest::new();
    let wait = channel.client.pause(&request);
    tokio::time::pause();
    let error = wait.await.unwrap_err();
    assert!(matches!(error, GuestError::Timeout { call: "pause", .. }), "{error}");
    drop(guest);
}

#[tokio::test]
async fn events_come_in_order_and_the_last_ones_after_the_loss() {
    let (mut channel, mut guest) = guest(PROTOCOL_VERSION).await;
    for status in 0..3 {
        send(&mut guest, &exit("web", status)).await;
    }
    guest.events.flush().await.unwrap();
    guest.task.abort();
    assert_eq!(&*channel.lost.wait().await, "the peer closed the channel");
    for status in 0..3 {
        let Some(Event::Exit(exit)) = channel.events.recv().await else { panic!() };
        assert_eq!((exit.container.as_str(), exit.status, exit.exec), ("web", status, None));
    }
    assert_eq!(channel.events.recv().await, None);
    let error = channel.client.hello(deadline::HELLO).await.unwrap_err().to_string();
    assert!(error.contains("the peer closed the channel"), "{error}");
}

#[tokio::test]
async fn bad_events_end_the_channel_with_the_reason() {
    let cases = [
        (exit("../etc", 0), "container id \"../etc\""),
        (exit("web", 256), "status 256"),
        (api::Event::new(), "no known kind"),
    ];
    for (event, words) in cases {
        let (mut channel, mut guest) = guest(PROTOCOL_VERSION).await;
        send(&mut guest, &event).await;
        let reason = channel.lost.wait().await;
        assert!(reason.contains(words), "{reason}");
        guest.task.await.unwrap();
    }
    let (mut channel, mut guest) = guest(PROTOCOL_VERSION).await;
    guest.events.write_u32_le(MAX_EVENT as u32 + 1).await.unwrap();
    let reason = channel.lost.wait().await;
    assert!(reason.contains("4097 bytes"), "{reason}");
}

#[tokio::test]
async fn streams_have_new_numbers_and_the_last_handle_ends_the_channel() {
    let (channel, guest) = guest(PROTOCOL_VERSION).await;
    let (mut first, second) = (channel.streams.open().unwrap(), channel.streams.open().unwrap());
    assert_eq!((first.id(), second.id()), (16, 17));
    let mut far = guest.mux.open(16).unwrap();
    far.write_all(b"out").await.unwrap();
    let mut got = [0; 3];
    first.read_exact(&mut got).await.unwrap();
    let GuestChannel { client, streams, mut lost, .. } = channel;
    drop(streams);
    assert!(lost.reason().is_none());
    drop(client);
    assert_eq!(&*lost.wait().await, "this side closed the channel");
    tokio::time::timeout(Duration::from_secs(5), guest.task).await.unwrap().unwrap();
}
