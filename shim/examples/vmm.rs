//! Builds a template and clones it: `vmm <directory> <guest image> [clones]`, as root. Prints what took
//! how long, and what a clone costs.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use joey_protocol::mux::Mux;
use joey_protocol::{api, limits};
use joey_shim::host::jail::IdRange;
use joey_shim::vmm::template::TemplateStore;
use joey_shim::vmm::{self, Started, VmSpec, VmmConfig};

fn config(directory: &Path, guest: &str) -> VmmConfig {
    VmmConfig {
        qemu: std::env::var_os("QEMU").map_or("/usr/bin/qemu-system-x86_64".into(), PathBuf::from),
        guest_dir: guest.into(),
        templates_dir: directory.join("templates"),
        run_dir: directory.join("run"),
        use_templates: true,
        ids: IdRange { first: 700_000, count: 1000 },
        builder: None,
        home: Vec::new(),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).init();
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().context("no directory")?);
    let guest = arguments.next().context("no guest image")?;
    let clones: u32 = arguments.next().unwrap_or_else(|| "1".to_owned()).parse()?;
    let config = config(&directory, &guest);
    let begun = Instant::now();
    let template = TemplateStore::new(&config)?.build(1, 128).await?;
    println!("template {} {:?}", template.manifest.key, begun.elapsed());
    let mut times = Vec::new();
    for number in 0..clones {
        let spec = VmSpec {
            id: format!("clone{number}"),
            vcpus: 1,
            memory_mib: 128,
            tap: None,
            mac: [2, 0, 0, 0, 0, 2],
            run_dir: directory.join(format!("run/clone{number}")),
            cgroup_procs: Vec::new(),
        };
        let begun = Instant::now();
        let Started { vm, cloned, phases } = vmm::start(&config, spec).await?;
        let (mux, driver) = Mux::connect(vm.take_channel()?);
        let driver = tokio::spawn(driver);
        let socket = ttrpc::r#async::transport::Socket::new(mux.open(limits::STREAM_RPC)?);
        let agent = api::AgentClient::new(ttrpc::r#async::Client::new(socket));
        let request = api::HelloRequest { protocol_version: 1, ..Default::default() };
        agent.hello(ttrpc::context::Context::default(), &request).await?;
        times.push(begun.elapsed());
        let cpu = cpu_time(vm.pid())?;
        println!("{:?} cloned={cloned} cpu {cpu:.1} ms {phases:?}", begun.elapsed());
        let begun = Instant::now();
        agent.hello(ttrpc::context::Context::default(), &request).await?;
        println!("  second answer {:?}", begun.elapsed());
        if number + 1 == clones {
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            print_memory(vm.pid())?;
        }
        driver.abort();
        vm.kill();
        println!("  {}", vm.exited().await);
    }
    times.sort();
    println!("median {:?}", times.get(times.len() / 2));
    Ok(())
}

fn cpu_time(pid: i32) -> anyhow::Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().unwrap_or_default().parse::<f64>()?;
    }
    Ok(nanoseconds / 1e6)
}

fn print_memory(pid: i32) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    for line in text.lines().filter(|l| l.starts_with("Private") || l.starts_with("Pss:")) {
        println!("  {line}");
    }
    Ok(())
}
