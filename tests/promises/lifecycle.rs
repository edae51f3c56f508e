//! Containers start, run, end and go as a kubelet expects.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::controller;
use joey_tests::pod::{self, Pod, SOON};
use k8s_cri::v1::{ContainerState, NamespaceMode};

use crate::context::{Context, Test, holds, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "lifecycle::exit_code_and_output", run: exit_code_and_output },
    Test { name: "lifecycle::environment_and_arguments", run: environment_and_arguments },
    Test { name: "lifecycle::states_and_times", run: states_and_times },
    Test { name: "lifecycle::exec", run: exec },
    Test { name: "lifecycle::term_then_kill", run: term_then_kill },
    Test { name: "lifecycle::stop_signal_is_heeded", run: stop_signal_is_heeded },
    Test { name: "lifecycle::several_containers", run: several_containers },
    Test { name: "lifecycle::container_restarts", run: container_restarts },
    Test { name: "lifecycle::emptied_pod_takes_a_container", run: emptied_pod },
    Test { name: "lifecycle::stop_and_remove_repeat", run: stop_and_remove_repeat },
    Test { name: "lifecycle::created_but_never_started", run: never_started },
    Test { name: "lifecycle::children_end_with_container", run: children_end },
    Test { name: "lifecycle::shared_processes", run: shared_processes },
    Test { name: "lifecycle::layers_and_own_copy", run: layers },
    Test { name: "lifecycle::small_host_files", run: small_host_files },
    Test { name: "lifecycle::metrics_of_the_sandbox", run: metrics_of_the_sandbox },
    Test { name: "lifecycle::many_at_once", run: many_at_once },
];

fn exit_code_and_output(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("exits")?;
    let output = pod.script("echo out; echo err >&2; exit 7")?;
    same("exit code", output.code, 7)?;
    same("stdout", output.text(), "out")?;
    same("stderr", String::from_utf8_lossy(&output.stderr), "err\n")?;
    // PID 1 is deaf to its own namespace's SIGKILL: let a child die and pass its status on.
    same("death by signal", pod.script("sh -c 'kill -9 $$'; exit $?")?.code, 137)?;
    same("success", pod.script("true")?.code, 0)?;
    pod.remove()
}

fn environment_and_arguments(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("env")?;
    let odd = "a b\"c' $HOME\n\u{fc}";
    let mut config =
        pod::container("env", &["sh", "-c", "printf %s:%s:%s \"$X\" \"$1\" \"$FROM_IMAGE\"; pwd"]);
    config.args = vec!["sh".into(), odd.into()];
    config.working_dir = "/made/for/me".into();
    let config = pod::with_env(config, "X", odd);
    let output = pod.finish(&config)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    same("environment", stdout, format!("{odd}:{odd}:yes/made/for/me\n"))?;
    pod.remove()
}

fn states_and_times(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("states")?;
    let container = pod.create(&pod::script("s", "sleep 0.3; exit 3"))?;
    same("created", container.status()?.state(), ContainerState::ContainerCreated)?;
    ctx.node.cri.start(&container.id)?;
    same("running", container.status()?.state(), ContainerState::ContainerRunning)?;
    let status = container.wait(SOON)?;
    same("exit code", status.exit_code, 3)?;
    same("reason", status.reason.as_str(), "Error")?;
    let ran = status.finished_at - status.started_at;
    ensure!((100_000_000..10_000_000_000).contains(&ran), "ran {ran} ns by its own times");
    container.remove(Duration::ZERO)?;
    pod.remove()
}

fn exec(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("exec")?;
    let container = pod.start(&pod::script("main", "sleep 1000"))?;
    let output = container.sh("echo out; echo err >&2; exit 42")?;
    same("exit code", output.code, 42)?;
    same("stdout", output.text(), "out")?;
    same("stderr", output.stderr.as_slice(), b"err\n")?;
    same("environment", container.sh("echo $FROM_IMAGE")?.text(), "yes")?;
    holds("sees the container's processes", &container.sh("ps")?.text(), "sleep 1000")?;
    for round in 0..10 {
        same("again", container.sh(&format!("exit {round}"))?.code, round)?;
    }
    let missing = container.exec(&["/no/such/program"]);
    ensure!(missing.is_err() || missing.is_ok_and(|o| o.code != 0), "a missing program ran");
    let slow = ctx.node.cri.exec(&container.id, &["sleep", "60"], Duration::from_secs(1));
    ensure!(slow.is_err(), "exec's timeout was not kept");
    same("still well", container.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn term_then_kill(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("kill")?;
    let deaf =
        pod.start(&pod::script("deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done"))?;
    deaf.wait_output("up", SOON)?;
    let start = Instant::now();
    ctx.node.cri.stop(&deaf.id, Duration::from_secs(2))?;
    let took = start.elapsed();
    ensure!(took >= Duration::from_millis(1900), "killed after {took:?}, before its grace period");
    ensure!(took < Duration::from_secs(8), "took {took:?} to kill");
    same("exit code", deaf.wait(SOON)?.exit_code, 137)?;
    pod.remove()
}

fn stop_signal_is_heeded(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("term")?;
    let text = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let polite = pod.start(&pod::script("polite", text))?;
    polite.wait_output("up", SOON)?;
    let start = Instant::now();
    ctx.node.cri.stop(&polite.id, Duration::from_secs(20))?;
    ensure!(start.elapsed() < Duration::from_secs(10), "SIGTERM did not end it");
    same("exit code", polite.wait(SOON)?.exit_code, 5)?;
    polite.wait_output("bye", SOON)?;
    pod.remove()
}

fn several_containers(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("several")?;
    let server = pod.start(&pod::script("server", "httpd -f -p 8080 -h /www"))?;
    let text = "hostname; for i in $(seq 100); do wget -qO- http://localhost:8080/ && break; sleep 0.1; done";
    let output = pod.script(text)?;
    same("shared localhost and host name", output.text(), "several\nhello from the pod")?;
    let other = pod.start(&pod::script("other", "sleep 1000"))?;
    let processes = other.sh("ps")?.text();
    ensure!(!processes.contains("httpd"), "sees the other container's processes:\n{processes}");
    server.sh("echo x > /only-here")?;
    same("own file system", other.sh("ls /only-here")?.code, 1)?;
    other.sh("echo x > /dev/shm/shared")?;
    same("shared memory", server.sh("cat /dev/shm/shared")?.text(), "x")?;
    server.remove(Duration::ZERO)?;
    same("outlives its neighbour", other.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn container_restarts(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("restarts")?;
    for attempt in 0..3 {
        let mut config = pod::script("again", "test ! -e /mark; touch /mark; exit 1");
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt = attempt;
        }
        let container = pod.start(&config)?;
        same("exit code", container.wait(SOON)?.exit_code, 1)?;
        container.remove(Duration::ZERO)?;
    }
    same("a fresh file system", pod.script("ls /mark")?.code, 1)?;
    pod.remove()
}

fn emptied_pod(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("emptied")?;
    let first = pod.start(&pod::script("first", "sleep 1000"))?;
    first.remove(Duration::ZERO)?;
    std::thread::sleep(Duration::from_millis(300));
    same("second container", pod.script("echo second")?.text(), "second")?;
    pod.remove()
}

fn stop_and_remove_repeat(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("repeat")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    for _ in 0..2 {
        ctx.node.cri.stop(&container.id, Duration::ZERO)?;
    }
    for _ in 0..2 {
        ctx.node.cri.stop_pod(&pod.id)?;
    }
    let id = pod.id.clone();
    pod.remove()?;
    ctx.node.cri.remove_pod(&id)
}

fn never_started(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("created")?;
    let one = pod.create(&pod::script("one", "true"))?;
    let _two = pod.create(&pod::script("two", "true"))?;
    ctx.node.cri.remove(&one.id)?;
    pod.remove()
}

fn children_end(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("children")?;
    let other = pod.start(&pod::script("other", "sleep 1000"))?;
    let output = pod.script("sleep 2000 & sleep 2000 & (setsid sleep 2000 &); echo started")?;
    same("output", output.text(), "started")?;
    same("neighbour", other.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

/// `shareProcessNamespace`: containers see each other's processes, and yet each ends as a whole.
fn shared_processes(ctx: &Context<'_>) -> Result<()> {
    let shared = |config: &mut k8s_cri::v1::ContainerConfig| {
        let options = pod::security(config).namespace_options.get_or_insert_default();
        options.pid = NamespaceMode::Pod.into();
    };
    let mut config = pod::config(ctx.node, "shared");
    let linux = config.linux.get_or_insert_default();
    let options =
        linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default();
    options.pid = NamespaceMode::Pod.into();
    let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
    let mut first = pod::script("first", "exec sleep 1234");
    shared(&mut first);
    let first = pod.start(&first)?;
    // Its child holds its output open, and goes with it.
    let mut second = pod::script("second", "ps; sleep 4321 & exit 3");
    shared(&mut second);
    let second = pod.start(&second)?;
    same("exit code", second.wait(SOON)?.exit_code, 3)?;
    let seen = String::from_utf8_lossy(&second.logs()?.0).into_owned();
    holds("the other container's process", &seen, "sleep 1234")?;
    let left = first.sh("ps")?.text();
    ensure!(!left.contains("sleep 4321"), "outlives its container:\n{left}");
    second.remove(Duration::ZERO)?;
    same("neighbour", first.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn layers(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("layers")?;
    let text = "cat /etc/replaced; ls /etc/removed 2>/dev/null; echo mine > /etc/replaced; cat /etc/replaced; \
                mkdir /new && rm /www/index.html && rmdir /www && mv /etc/passwd /new/ && ls /new; stat -c %a /tmp";
    same("first", pod.script(text)?.text(), "upper\nmine\npasswd\n1777")?;
    same("second has its own copy", pod.script(text)?.text(), "upper\nmine\npasswd\n1777")?;
    pod.remove()
}

fn small_host_files(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("hostfiles")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    let resolv = container.sh("cat /etc/resolv.conf")?.text();
    for line in ["nameserver 10.96.0.10", "search default.svc.cluster.local", "options ndots:5"] {
        holds("resolv.conf", &resolv, line)?;
    }
    holds("hosts", &container.sh("cat /etc/hosts")?.text(), "localhost")?;
    same("hostname file", container.sh("cat /etc/hostname")?.text(), "hostfiles")?;
    same("host name", container.sh("hostname")?.text(), "hostfiles")?;
    holds("shared memory", &container.sh("df /dev/shm | tail -1")?.text(), "65536")?;
    pod.remove()
}

fn many_at_once(ctx: &Context<'_>) -> Result<()> {
    const PODS: usize = 20;
    let start = Instant::now();
    let results: Vec<Result<Duration>> = std::thread::scope(|scope| {
        let one = |number: usize| -> Result<Duration> {
            let start = Instant::now();
            let pod = ctx.pod(&format!("many{number}"))?;
            let output = pod.script(&format!("echo pod {number}"))?;
            same("output", output.text(), format!("pod {number}"))?;
            let took = start.elapsed();
            pod.remove()?;
            Ok(took)
        };
        let threads: Vec<_> = (0..PODS).map(|n| scope.spawn(move || one(n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))).collect()
    });
    let mut times = results.into_iter().collect::<Result<Vec<_>>>()?;
    times.sort();
    println!("        {PODS} pods in {:.1?}, slowest {:.1?}", start.elapsed(), times[PODS - 1]);
    Ok(())
}

/// Of all containers, those that are gone too.
fn metrics_of_the_sandbox(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler != "joey-sandboxed" {
        return skip("containerd asks the shim only where the shim keeps the sandbox");
    }
    let pod = ctx.pod("metrics")?;
    let metrics = || controller::metrics(&ctx.node.dir().join("c.sock"), &pod.id);
    let before = metrics()?;
    let busy = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
    same("exit code", pod.script(busy)?.code, 0)?;
    let of_the_first = metrics()?;
    let cpu = of_the_first.cpu_usec.saturating_sub(before.cpu_usec);
    ensure!(cpu > 20_000, "{cpu} µs for what has ended; {before:?}, {of_the_first:?}");
    let script = "dd if=/dev/zero of=/dev/shm/full bs=1M count=8 2>/dev/null; echo up; sleep 1000";
    let container = pod.start(&pod::script("second", script))?;
    container.wait_output("up", SOON)?;
    let memory = metrics()?.memory;
    ensure!((8 << 20..512 << 20).contains(&memory), "memory {memory} bytes");
    ctx.node.cri.stop_pod(&pod.id)?;
    refused("metrics of a pod that is stopped", metrics(), &pod.id)?;
    pod.remove()
}
