//! Generates code from containerd's service definitions.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().bytes(".containerd.services.content.v1").compile_protos(
        &["proto/snapshots.proto", "proto/diff.proto", "proto/content.proto"],
        &["proto"],
    )
}
