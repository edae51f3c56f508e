//! One pod from a real image, seen from outside and, by `joey inspect`, from inside.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use joey_tests::image;
use joey_tests::node::Node;
use joey_tests::pod::{self, Pod};
use k8s_cri::v1::ImageSpec;

/// Shows the pod's life on this node.
pub fn run(node: &Node) -> Result<()> {
    println!("node is up: {}", node.cri.version()?);
    println!("packing a real image from Debian's nginx …");
    let folder = joey_tests::paths::repository().join("target/images");
    std::fs::create_dir_all(&folder)?;
    node.import(&image::nginx(&folder)?)?;
    println!("first pod: builds the template and converts the image, once a node …");
    live(node, false)?;
    println!("second pod: a clone of the template");
    node.joey(&["standby", "rm"])?;
    live(node, true)?;
    println!("third pod: its machine has waited");
    joey_tests::bench::rest(node);
    live(node, true)
}

fn live(node: &Node, shown: bool) -> Result<()> {
    let step = |name: &str, start: Instant| {
        if shown {
            println!("  {name:<24} {:>7.1} ms", start.elapsed().as_secs_f64() * 1000.0);
        }
    };
    let start = Instant::now();
    let pod = Pod::run(node, "joey", "demo")?;
    step("RunPodSandbox", start);
    let mut config = pod::container("nginx", &[]);
    config.image = Some(ImageSpec { image: image::NGINX.into(), ..ImageSpec::default() });
    let start = Instant::now();
    let container = pod.create(&config)?;
    step("CreateContainer", start);
    let start = Instant::now();
    node.cri.start(&container.id)?;
    step("StartContainer", start);
    let address: IpAddr = pod.addresses()?.swap_remove(0).parse()?;
    let start = Instant::now();
    let answer = node.in_network(|| get(SocketAddr::new(address, 80)))??;
    step("first answer over HTTP", start);
    if shown {
        let page = answer.lines().last().unwrap_or_default();
        println!("  the pod at {address} says: {page}");
        let kernel =
            container.exec(&["/usr/bin/busybox", "uname", "-r"]).map(|output| output.text());
        println!("  its kernel: {}", kernel.unwrap_or_else(|error| format!("{error:#}")));
        println!("timeline, measured inside (joey inspect {}):", &pod.id[..12]);
        println!("{}", node.joey(&["inspect", &pod.id])?);
    }
    pod.remove()
}

fn get(target: SocketAddr) -> Result<String> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let attempt = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        match attempt() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > end => {
                return Err(error).with_context(|| format!("ask {target}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
