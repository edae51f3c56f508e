//! scratch
#![allow(clippy::all, missing_docs, clippy::unwrap_used, clippy::print_stdout)]
use std::path::PathBuf;
use std::time::*;
use joey_protocol::mux::Mux;
use joey_protocol::api::*;
use joey_shim::host::jail::IdRange;
use joey_shim::vmm::template::TemplateStore;
use joey_shim::vmm::{self, Started, VmSpec, VmmConfig};
use tokio::io::*;
fn ctx()->ttrpc::context::Context{ ttrpc::context::with_timeout(60_000_000_000) }
fn ph(p:&[Phase])->String{ p.iter().map(|p|format!("{}={:.1}",p.name,p.nanoseconds as f64/1e6)).collect::<Vec<_>>().join(" ") }
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let directory = PathBuf::from(&a[1]);
    let n: u32 = a[3].parse()?; let mode=a.get(4).cloned().unwrap_or_default();
    let config = VmmConfig { qemu: std::env::var_os("QEMU").map_or("/usr/bin/qemu-system-x86_64".into(), PathBuf::from), guest_dir: (&a[2]).into(), templates_dir: directory.join("templates"), run_dir: directory.join("run"), use_templates: true, ids: IdRange { first: 800_000, count: 1000 }, builder: None };
    let b = Instant::now();
    let t = TemplateStore::new(&config)?.build(1, 128).await?;
    println!("template {} {:?}", t.manifest.key, b.elapsed());
    for number in 0..n {
        let spec = VmSpec { id: format!("a3c{number}"), vcpus: 1, memory_mib: 128, tap: None, mac: [2,0,0,0,0,2], run_dir: directory.join(format!("run/c{number}")), cgroup_procs: Vec::new() };
        let b = Instant::now();
        let Started { vm, cloned, .. } = vmm::start(&config, spec).await?;
        let disk = std::fs::File::open("/tmp/w/agent-sys/k/root.erofs")?;
        let (mux, driver) = Mux::connect(vm.take_channel()?);
        let driver = tokio::spawn(driver);
        let c = AgentClient::new(ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(mux.open(0)?)));
        let mut ev=mux.open(1)?;
        tokio::spawn(async move{ loop { let Ok(n)=ev.read_u32_le().await else {return}; let mut b=vec![0;n as usize]; ev.read_exact(&mut b).await.unwrap(); if std::env::var("EV").is_ok(){println!("EVENT {}",<Event as protobuf::Message>::parse_from_bytes(&b).unwrap());} }});
        c.hello(ctx(), &HelloRequest{protocol_version:1,..Default::default()}).await?;
        let up = b.elapsed();
        vm.attach_disk(0, disk.into(), true).await?;
        let b0 = Instant::now();
        let r=StartSandboxRequest{protocol_version:1,sandbox_id:"sb1".into(),hostname:"pod-1".into(),wall_clock_ns:SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as i64,entropy:(0..64).collect(),machine_id:vec![7;16],..Default::default()};
        let r=c.start_sandbox(ctx(),&r).await?; let ss=b0.elapsed(); println!("clone={cloned} up {up:?} attach; START_SANDBOX {ss:?} {}", ph(&r.phases));
        c.copy_in(ctx(),&CopyInRequest{volume_id:"hosts".into(),entries:vec![FileEntry{path:"".into(),mode:0o100644,data:b"127.0.0.1 localhost\n".to_vec(),..Default::default()}],..Default::default()}).await?;
        let caps=["CAP_CHOWN","CAP_KILL","CAP_SETUID","CAP_SETGID"];
        let sp=|args:Vec<&str>| serde_json::json!({"ociVersion":"1.1.0","process":{"user":{"uid":0,"gid":0},"args":args,"env":["PATH=/bin"],"cwd":"/","noNewPrivileges":true,"capabilities":{"bounding":caps,"effective":caps,"permitted":caps}},
   "root":{"path":"rootfs"},"hostname":"","mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro"]},{"destination":"/etc/hosts","type":"bind","source":"joey-volume:hosts","options":["rbind","ro"]},{"destination":"/dev/shm","type":"bind","source":"joey-shm:","options":["rbind","rw"]}],
   "linux":{"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"cgroup"},{"type":"ipc","path":"/proc/1/ns/ipc"},{"type":"uts","path":"/proc/1/ns/uts"},{"type":"network","path":"/proc/1/ns/net"}],"resources":{"memory":{"limit":50000000},"cpu":{"shares":1024},"devices":[{"allow":false,"access":"rwm"}]},"cgroupsPath":"/kubepods/x/c1","maskedPaths":["/proc/acpi","/proc/asound","/proc/kcore","/proc/keys","/proc/latency_stats","/proc/timer_list","/proc/timer_stats","/proc/sched_debug","/sys/firmware","/proc/scsi"],"readonlyPaths":["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"],
   "seccomp": if std::env::var("SECCOMP").is_ok() {serde_json::from_str(&std::fs::read_to_string("/tmp/w/agent3/seccomp.json").unwrap()).unwrap()} else {serde_json::Value::Null}}}).to_string().into_bytes();
        let big="head -c 104857600 /dev/zero"; let oom="x=$(head -c 90000000 /dev/zero | tr '\\0' x); x=$x$x; echo ${#x}";
        let runs: Vec<(&str,&str)> = match mode.as_str() {"big"=>vec![("big",big),("big2",big)],"oom"=>vec![("oom",oom),("ok","echo hi; cat /proc/mounts | wc -l")],_=>vec![("c1","echo hi; read x"),("c2","echo hi")]};
        let mut next=16u32;
        for (name,script) in runs {
            let (i,o,e)=(next,next+1,next+2); next+=3;
            let (mut si,mut so,mut se)=(mux.open(i)?,mux.open(o)?,mux.open(e)?);
            let t=Instant::now();
            let r=c.create_container(ctx(),&CreateContainerRequest{container_id:name.into(),spec:sp(vec!["/bin/sh","-c",script]),rootfs:Some(Rootfs{layers:vec![Disk{slot:0,file_system:"erofs".into(),..Default::default()}],..Default::default()}).into(),stdio:Some(Stdio{stdin:i,stdout:o,stderr:e,..Default::default()}).into(),..Default::default()}).await?;
            let tc=t.elapsed();
            let r2=c.start(ctx(),&ProcessRequest{container_id:name.into(),..Default::default()}).await?; let ts=t.elapsed()-tc;
            let mut b=vec![0u8;1<<20]; let mut total=so.read(&mut b).await?; let tf=t.elapsed();
            println!("  {name}: create {tc:?} start {ts:?} first byte {tf:?} | {} | {}",ph(&r.phases),ph(&r2.phases));
            if name=="c1" { for k in 0..2 { let o2=next; next+=1; let mut eo=mux.open(o2)?; let t=Instant::now();
                c.create_exec(ctx(),&CreateExecRequest{container_id:name.into(),exec_id:format!("e{k}"),process:serde_json::json!({"user":{"uid":0,"gid":0},"args":["/bin/sh","-c","echo x"],"cwd":"/","env":["PATH=/bin"]}).to_string().into_bytes(),stdio:Some(Stdio{stdout:o2,..Default::default()}).into(),..Default::default()}).await?; let t1=t.elapsed();
                c.start(ctx(),&ProcessRequest{container_id:name.into(),exec_id:format!("e{k}"),..Default::default()}).await?; let t2=t.elapsed();
                let mut b=vec![]; eo.read_to_end(&mut b).await?; println!("    exec create {t1:?} start {t2:?} out {:?}",t.elapsed()); } }
            si.shutdown().await.ok();
            loop { let n=so.read(&mut b).await?; if n==0 {break} total+=n; }
            let whole=t.elapsed()-tf; let mut er=String::new(); se.read_to_string(&mut er).await?;
            println!("    {total} bytes in {whole:?} = {:.1} MiB/s {er:?} {:?}",total as f64/1048576.0/whole.as_secs_f64(), String::from_utf8_lossy(&b[..20]));
            tokio::time::sleep(Duration::from_millis(100)).await;
            let t=Instant::now(); c.delete(ctx(),&ProcessRequest{container_id:name.into(),..Default::default()}).await?; println!("    delete {:?}",t.elapsed());
        }
        driver.abort(); vm.kill(); vm.exited().await;
    }
    Ok(())
}
