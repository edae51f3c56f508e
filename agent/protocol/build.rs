//! Generates the messages and the service of `proto/agent.proto`, without any outside compiler.

use std::path::PathBuf;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTO: &str = "proto/agent.proto";

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed={PROTO}");
    Codegen::new()
        .input(PROTO)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("no OUT_DIR"))?);
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        includable(&out.join(name))?;
    }
    Ok(())
}

/// Inner attributes and inner docs may not stand in a file that is included.
fn includable(path: &PathBuf) -> io::Result<()> {
    let text = fs::read_to_string(path)?;
    let kept = text.lines().filter(|line| {
        let line = line.trim_start();
        !line.starts_with("#![") && !line.starts_with("//!")
    });
    fs::write(path, kept.flat_map(|line| [line, "\n"]).collect::<String>())
}
