//! A sandbox on a fake machine: what containerd is told, and in which order.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use joey_protocol::api;
use joey_protocol::limits::{STREAM_EVENTS, STREAM_RPC};
use joey_protocol::mux::{Mux, MuxStream};
use protobuf::Message as _;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc::UnboundedReceiver;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;

use super::containers::{Acquired, Exec};
use super::state::Status;
use super::*;
use crate::guest::GuestChannel;
use crate::vmm::fake::FakeVm;

/// An agent whose starts end as it is told; `None`: never. Its containers are never frozen.
struct FakeAgent {
    starts: Option<ttrpc::Code>,
    resumed: Arc<AtomicU32>,
}

#[async_trait]
impl api::Agent for FakeAgent {
    async fn start(
        &self,
        _: &TtrpcContext,
        _: api::ProcessRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        match self.starts {
            None => std::future::pending().await,
            Some(ttrpc::Code::OK) => Ok(api::StartResponse { pid: 7, ..Default::default() }),
            Some(code) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no"))),
        }
    }

    async fn delete(&self, _: &TtrpcContext, _: api::ProcessRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }

    async fn hello(
        &self,
        _: &TtrpcContext,
        _: api::HelloRequest,
    ) -> ttrpc::Result<api::HelloResponse> {
        Ok(api::HelloResponse::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let memory_current = if request.container_id.is_empty() { 3 } else { 1 };
        Ok(api::StatsResponse { memory_current, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        std::future::pending().await
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        _: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        match self.resumed.fetch_add(1, Ordering::Relaxed) {
            0 => std::future::pending().await,
            _ => Ok(api::Empty::new()),
        }
    }
}

struct Fake {
    handle: Handle,
    events: UnboundedReceiver<SandboxEvent>,
    guest: MuxStream,
    machine: JoinHandle<()>,
    resumed: Arc<AtomicU32>,
    _server: ttrpc::r#async::Server,
    _run_dir: tempfile::TempDir,
}

/// A sandbox with the created container `c`.
async fn sandbox(starts: Option<ttrpc::Code>) -> Fake {
    let run_dir = tempfile::tempdir().unwrap();
    let config = Config { run_dir: run_dir.path().into(), ..Config::default() };
    let boot = Boot {
        id: "pod".to_owned(),
        namespace: "k8s.io".to_owned(),
        bundle: PathBuf::new(),
        home: Vec::new(),
        since: Duration::ZERO,
        socket: PathBuf::new(),
        spec: None,
    };
    let (handle, events) = Handle::new(Arc::new(config), boot, None);
    let (vm, io) = FakeVm::new().unwrap();
    let (mux, driver) = Mux::new(io);
    let machine = tokio::spawn(async move { drop(driver.await) });
    let calls = mux.open(STREAM_RPC).unwrap();
    let guest = mux.open(STREAM_EVENTS).unwrap();
    let resumed = Arc::<AtomicU32>::default();
    let once = futures::stream::iter([Ok(calls)]);
    let listener = Listener::new(futures::StreamExt::chain(once, futures::stream::pending()));
    let mut server = ttrpc::r#async::Server::new().add_listener(listener).register_service(
        api::create_agent(Arc::new(FakeAgent { starts, resumed: resumed.clone() })),
    );
    server.start().await.unwrap();
    let channel = GuestChannel::connect(vm.take_channel().unwrap()).unwrap();
    let ready = Guest {
        client: channel.client,
        streams: channel.streams,
        vm: Arc::new(vm),
        disks: Arc::default(),
        pod_disk: Opening::done(),
        services: Opening::done(),
    };
    handle.watch(ready.clone(), channel.events, channel.lost);
    handle.0.progress.send_replace(Progress::Ready(ready));
    let mut process = Process::new();
    process.created(7);
    let container = Container {
        process,
        bundle: PathBuf::new(),
        stdio: StdioPaths::default(),
        copies: None,
        execs: HashMap::new(),
        acquired: Acquired::default(),
        deleting: false,
        oom_score: None,
        cpus: None,
        oom_told: None,
    };
    handle.table().containers.insert("c".to_owned(), container);
    Fake { handle, events, guest, machine, resumed, _server: server, _run_dir: run_dir }
}

impl Fake {
    /// A running exec of the container.
    fn add_exec(&self, exec: &str) {
        let mut process = Process::new();
        process.created(0);
        process.starting().unwrap();
        process.started(8);
        let exec_entry = Exec { process, stdio: StdioPaths::default(), copies: None };
        let mut table = self.handle.table();
        let container = table.containers.get_mut("c").unwrap();
        container.execs.insert(exec.to_owned(), exec_entry);
    }

    /// The guest tells of a memory kill.
    async fn oom(&mut self, id: &str) {
        let mut event = api::Event::new();
        event.set_oom(api::OomEvent { container_id: id.to_owned(), ..Default::default() });
        self.send(&event).await;
    }

    /// The guest tells of an exit.
    async fn exit(&mut self, exec: &str, status: u32) {
        let mut event = api::Event::new();
        event.set_exit(api::ExitEvent {
            container_id: "c".to_owned(),
            exec_id: exec.to_owned(),
            status,
            ..Default::default()
        });
        self.send(&event).await;
    }

    async fn send(&mut self, event: &api::Event) {
        let bytes = event.write_to_bytes().unwrap();
        self.guest.write_u32_le(u32::try_from(bytes.len()).unwrap()).await.unwrap();
        self.guest.write_all(&bytes).await.unwrap();
        self.guest.flush().await.unwrap();
    }

    /// What containerd was told since the last look.
    fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            told.push(match event {
                SandboxEvent::Started { id, .. } => format!("start {id}"),
                SandboxEvent::Exited { id, exec_id, exit, .. } => {
                    format!("exit {} {}", exec_id.unwrap_or(id), exit.status)
                }
                SandboxEvent::Deleted { id, deleted } => {
                    format!("delete {id} {}", deleted.status)
                }
                other => format!("{other:?}"),
            });
        }
        told
    }
}

#[tokio::test]
async fn what_cannot_be_executed_has_ended_with_127_and_was_never_announced() {
    let mut fake = sandbox(Some(ttrpc::Code::INTERNAL)).await;
    fake.handle.start("c", None).await.unwrap_err();
    // The process that was to execute it ends, too.
    fake.exit("", 1).await;
    assert_eq!(fake.handle.state("c", None).await.unwrap().status, Status::Stopped);
    assert_eq!(fake.handle.wait("c", None).await.unwrap().status, 127);
    assert_eq!(fake.handle.delete("c", None).await.unwrap().status, 127);
    assert_eq!(fake.told(), ["delete c 127"]);
}

#[tokio::test]
async fn a_sandbox_uses_what_its_containers_use_together_while_it_is_up() {
    let fake = sandbox(Some(ttrpc::Code::OK)).await;
    assert_eq!(fake.handle.stats("c").await.unwrap().memory_current, 1);
    assert_eq!(fake.handle.sandbox_stats().await.unwrap().memory_current, 3);
    fake.handle.0.progress.send_replace(Progress::Ended("enough".into()));
    let error = fake.handle.sandbox_stats().await.unwrap_err().to_string();
    assert_eq!(error, "sandbox pod has ended: enough");
}

#[tokio::test]
async fn a_start_that_fails_otherwise_leaves_a_created_process() {
    let mut fake = sandbox(Some(ttrpc::Code::FAILED_PRECONDITION)).await;
    fake.handle.start("c", None).await.unwrap_err();
    assert_eq!(fake.handle.state("c", None).await.unwrap().status, Status::Created);
    fake.exit("", 9).await;
    assert_eq!(fake.handle.wait("c", None).await.unwrap().status, 9);
    assert_eq!(fake.told(), ["exit c 9"]);
}

#[tokio::test]
async fn a_guest_that_is_lost_during_a_start_has_killed_the_process_not_refused_it() {
    let mut fake = sandbox(None).await;
    let handle = fake.handle.clone();
    let starting = tokio::spawn(async move { handle.start("c", None).await });
    tokio::task::yield_now().await;
    fake.machine.abort();
    assert_eq!(fake.handle.wait("c", None).await.unwrap().status, KILLED);
    starting.await.unwrap().unwrap_err();
    assert_eq!(fake.told(), ["exit c 137"]);
}

#[tokio::test]
async fn a_start_and_its_exit_are_told_in_this_order() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    fake.handle.start("c", None).await.unwrap();
    fake.exit("", 3).await;
    assert_eq!(fake.handle.wait("c", None).await.unwrap().status, 3);
    assert_eq!(fake.told(), ["start c", "exit c 3"]);
}

#[tokio::test]
async fn memory_kills_are_told_of_own_containers_alone_and_not_without_end() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    for id in ["another-pods", "c", "c", "pod", "c"] {
        fake.oom(id).await;
    }
    fake.exit("", 137).await;
    fake.handle.wait("c", None).await.unwrap();
    assert_eq!(fake.told(), ["Oom { id: \"c\" }", "exit c 137"]);
}

#[tokio::test]
async fn nobody_waits_for_the_end_of_a_sandbox_that_did_not_start() {
    let fake = sandbox(None).await;
    let handle = fake.handle.clone();
    let waiting = tokio::spawn(async move { handle.wait_sandbox().await });
    tokio::task::yield_now().await;
    fake.handle.0.progress.send_replace(Progress::Failed("no room".into()));
    let error = waiting.await.unwrap().unwrap_err().to_string();
    assert_eq!(error, "sandbox pod did not start: no room");
}

#[tokio::test]
async fn a_kill_of_all_is_no_error_when_the_first_process_has_ended() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    fake.handle.start("c", None).await.unwrap();
    fake.exit("", 3).await;
    fake.handle.wait("c", None).await.unwrap();
    fake.handle.kill("c", None, 9, false).await.unwrap_err();
    // The fake agent does not know the call: what is left is logged, not told.
    fake.handle.kill("c", None, 9, true).await.unwrap();
    fake.handle.kill("other", None, 9, true).await.unwrap_err();
}

#[tokio::test]
async fn a_guest_that_floods_with_exits_costs_no_more_than_one() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    fake.handle.start("c", None).await.unwrap();
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    for status in 0..2000 {
        fake.exit("", 3 + status % 200).await;
        fake.exit("no-such-exec", 1).await;
    }
    // Told after them, and so heard after them.
    fake.oom("c").await;
    loop {
        let told = fake.told();
        if told.iter().any(|told| told.starts_with("Oom")) {
            break;
        }
        tokio::task::yield_now().await;
    }
    let alive = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert!(alive <= before + 1, "{before} tasks before, {alive} after");
    assert_eq!(fake.handle.wait("c", None).await.unwrap().status, 3);
}

#[tokio::test(start_paused = true)]
async fn a_pause_without_an_answer_is_taken_back() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    fake.handle.start("c", None).await.unwrap();
    fake.handle.pause("c").await.unwrap_err();
    while fake.resumed.load(Ordering::Relaxed) < 2 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(fake.handle.state("c", None).await.unwrap().status, Status::Running);
    assert_eq!(fake.told(), ["start c"]);
}

#[tokio::test(start_paused = true)]
async fn the_execs_of_a_deleted_container_end_before_it_is_forgotten() {
    let mut fake = sandbox(Some(ttrpc::Code::OK)).await;
    fake.add_exec("told");
    fake.add_exec("silent");
    let waits = ["told", "silent"].map(|exec| {
        let handle = fake.handle.clone();
        tokio::spawn(async move { handle.wait("c", Some(exec)).await.unwrap().status })
    });
    tokio::task::yield_now().await;
    fake.exit("told", 5).await;
    fake.handle.delete("c", None).await.unwrap();
    let [told, silent] = waits;
    assert_eq!((told.await.unwrap(), silent.await.unwrap()), (5, KILLED));
    assert_eq!(fake.told(), ["exit told 5", "exit silent 137", "delete c 0"]);
}
