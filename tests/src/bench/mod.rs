//! `bench start`: the same pod, alternately with each handler, through the same containerd and network.

pub mod files;
pub mod images;
pub mod mesh;
pub mod net;
pub mod plot;
pub mod services;
pub mod stats;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::os::fd::AsFd;

use self::stats::{Report, Samples};
use crate::node::{Node, cgroups};
use crate::pod::{self, Pod, SOON};
use crate::process;

/// Pods of the run that starts them all at once.
const TOGETHER: usize = 20;
/// Size of the file that is printed through an exec.
const OUTPUT_MIB: usize = 100;

/// Measures and returns the report; `progress` is told what happens.
pub fn start(
    node: &Node,
    handlers: &[&str],
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut samples = Samples::default();
    for handler in handlers {
        progress(&format!("warming up {handler}"));
        // Twice: the first makes what is made once a node, the second finds all caches filled.
        for _ in 0..2 {
            one(node, handler, &mut Samples::default())
                .with_context(|| format!("first pod with handler {handler}"))?;
        }
    }
    for run in 1..=runs {
        for handler in handlers {
            one(node, handler, &mut samples)?;
        }
        if run % 10 == 0 || run == runs {
            progress(&format!("{run} of {runs} runs"));
        }
    }
    for handler in handlers {
        progress(&format!("{OUTPUT_MIB} MiB through exec with {handler}"));
        output(node, handler, runs, &mut samples)?;
    }
    for handler in handlers {
        progress(&format!("{TOGETHER} pods at once with {handler}"));
        together(node, handler, &mut samples)?;
    }
    Ok(samples.report("start", &machine(), &[(handlers[0], handlers[handlers.len() - 1])]))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// One pod's life, each call timed.
fn one(node: &Node, handler: &str, samples: &mut Samples) -> Result<()> {
    rest(node);
    let cpu_before = cgroups::cpu_nanoseconds(&node.cgroup());
    let mut timed = |metric: &str, time: Duration| {
        samples.add(handler, metric, "ms", milliseconds(time));
    };
    let start = Instant::now();
    let pod = Pod::run(node, handler, "bench")?;
    timed("run_pod_sandbox", start.elapsed());

    let start = Instant::now();
    let container = pod.create(&pod::script("main", "echo up; exec sleep 1000"))?;
    timed("create_container", start.elapsed());

    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    watch.add_watch(pod.config.log_directory.as_str(), AddWatchFlags::IN_MODIFY)?;
    let start = Instant::now();
    let first_byte = std::thread::scope(|scope| -> Result<Duration> {
        let watcher = scope.spawn(|| first_change(&watch, start));
        node.cri.start(&container.id)?;
        timed("start_container", start.elapsed());
        watcher.join().map_err(|_| anyhow!("the log's watcher panicked"))?
    })?;
    timed("first_byte", first_byte);
    let answer = first_answer(node, &pod);

    let start = Instant::now();
    container.exec(&["true"])?;
    timed("exec", start.elapsed());
    let memory = memory_of(node, &pod);

    let start = Instant::now();
    node.cri.stop_pod(&pod.id)?;
    timed("stop_pod", start.elapsed());
    let start = Instant::now();
    node.cri.remove_pod(&pod.id)?;
    timed("remove_pod", start.elapsed());
    // What is done after the pod for the sake of the next one is a cost of the pod.
    rest(node);
    if let (Some(before), Some(after)) = (cpu_before, cgroups::cpu_nanoseconds(&node.cgroup())) {
        timed("host_cpu", Duration::from_nanos(after.saturating_sub(before)));
    }
    for (metric, value) in answer {
        samples.add(handler, metric, "ms", value);
    }
    for (metric, kib) in memory {
        samples.add(handler, metric, "MiB", kib as f64 / 1024.0);
    }
    pod.remove()
}

/// What Joey measured inside of the pod's start; null with another runtime.
fn timeline(node: &Node, pod: &Pod<'_>) -> serde_json::Value {
    let inspect = node.joey(&["inspect", "--json", &pod.id]).unwrap_or_default();
    let mut inspect: serde_json::Value = serde_json::from_str(&inspect).unwrap_or_default();
    inspect["timeline"].take()
}

/// What the first answer of a machine that was cloned for this pod cost: nothing where it was in reserve,
/// and with another runtime.
fn first_answer(node: &Node, pod: &Pod<'_>) -> Vec<(&'static str, f64)> {
    let answer = &timeline(node, pod)["first_answer"];
    [("clone_to_answer", "took_ms"), ("clone_to_answer_cpu", "vmm_cpu_ms")]
        .into_iter()
        .filter_map(|(metric, field)| Some((metric, answer[field].as_f64()?)))
        .collect()
}

/// When the container's log first changed.
fn first_change(watch: &Inotify, start: Instant) -> Result<Duration> {
    let mut polled = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(SOON)?;
    if poll(&mut polled, limit)? == 0 {
        return Err(anyhow!("the container printed nothing within {SOON:?}"));
    }
    Ok(start.elapsed())
}

/// Waits until nothing happens on the node: less than a twentieth of a processor is used.
pub fn rest(node: &Node) {
    const WINDOW: Duration = Duration::from_millis(300);
    let used = || cgroups::cpu_nanoseconds(&node.cgroup()).unwrap_or_default();
    // A machine in reserve is prepared a second after a pod's start.
    std::thread::sleep(Duration::from_millis(1200));
    let end = Instant::now() + SOON;
    while Instant::now() < end {
        let before = used();
        std::thread::sleep(WINDOW);
        if u128::from(used().saturating_sub(before)) < WINDOW.as_nanos() / 20 {
            break;
        }
    }
}

/// Memory of the pod's processes in KiB: private in all and of the shim, and PSS. They are those in the
/// pod's cgroup and those that name its sandbox, as a shim outside of that cgroup does.
fn memory_of(node: &Node, pod: &Pod<'_>) -> Vec<(&'static str, u64)> {
    let inside = cgroups::processes(pod.cgroup());
    let (mut all, mut shim, mut shares) = (0, 0, 0);
    for (pid, command) in node.processes() {
        if !inside.contains(&pid) && !command.contains(&pod.id) {
            continue;
        }
        let memory = process::memory(pid).unwrap_or_default();
        all += memory.private;
        shares += memory.proportional;
        if command.contains("containerd-shim-") {
            shim += memory.private;
        }
    }
    vec![("private_memory", all), ("shim_private_memory", shim), ("pss_memory", shares)]
}

/// Prints a file of one pod through an exec, again and again; a sample is the time until it was there whole.
fn output(node: &Node, handler: &str, runs: usize, samples: &mut Samples) -> Result<()> {
    let pod = Pod::run(node, handler, "output")?;
    let container = pod.start(&pod::container("main", &["sleep", "1000"]))?;
    container.sh(&format!("head -c {OUTPUT_MIB}m /dev/zero > /tmp/data; sync"))?;
    for _ in 0..runs {
        let start = Instant::now();
        let output = container.exec_live(&["cat", "/tmp/data"], false)?.finish()?;
        samples.add(handler, "exec_cat_100_mib", "ms", milliseconds(start.elapsed()));
        ensure!(output.stdout.len() == OUTPUT_MIB << 20, "{} bytes came", output.stdout.len());
    }
    pod.remove()
}

/// Starts pods all at once; a sample is one pod's time to a started container.
fn together(node: &Node, handler: &str, samples: &mut Samples) -> Result<()> {
    let began = Instant::now();
    let outcomes: Vec<Result<(Pod<'_>, Duration)>> = std::thread::scope(|scope| {
        let one = move |number: usize| {
            let start = Instant::now();
            let pod = Pod::run(node, handler, &format!("bench{number}"))?;
            pod.start(&pod::container("main", &["sleep", "1000"]))?;
            Ok((pod, start.elapsed()))
        };
        let threads: Vec<_> = (0..TOGETHER).map(|n| scope.spawn(move || one(n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
    });
    let all = began.elapsed();
    for outcome in outcomes {
        let (pod, time) = outcome?;
        samples.add(handler, "20_at_once_each", "ms", milliseconds(time));
        pod.remove()?;
    }
    samples.add(handler, "20_at_once_all", "ms", milliseconds(all));
    Ok(())
}

/// The machine in a line: processor, count, kernel.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    let count = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // What counts is whether the processor virtualises, not whether the device node is there.
    let virtual_cpu = info
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    let mode = if virtual_cpu && fs::metadata("/dev/kvm").is_ok() {
        "KVM"
    } else {
        "no usable KVM: software emulation"
    };
    format!("{count} × {model}, Linux {}, {mode}", kernel.trim())
}
