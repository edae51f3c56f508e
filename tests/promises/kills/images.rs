//! The making of a disk of what containerd's own snapshotter unpacked, cut short.

use anyhow::{Context as _, Result};
use joey_tests::node::traces;
use joey_tests::process;

use super::pods::{self, Scene, Step};
use super::{failed, interrupt, standby};
use crate::context::{Context, same, skip};

/// Who of those that make a disk is killed.
#[derive(Clone, Copy, Debug)]
enum Maker {
    Converter,
    Shim,
}

/// Nothing half made stays: it is removed, or made to its end for the next pod.
pub(super) fn image_conversion(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler != "joey" {
        return skip("it is about a handler of its own");
    }
    let ctx = &Context { node: ctx.node, handler: "joey-overlayfs" };
    standby(ctx, 0, || {
        for (maker, made) in [(Maker::Converter, 0), (Maker::Shim, 1)] {
            ctx.node.joey(&["image", "prune"])?;
            cut_short(ctx, maker).with_context(|| format!("{maker:?} killed"))?;
            same("images made", images(ctx)?, made)?;
        }
        pods::after(ctx)?;
        same("images made", images(ctx)?, 1)
    })
}

fn cut_short(ctx: &Context<'_>, maker: Maker) -> Result<()> {
    let before = ctx.node.traces();
    let mut scene = Scene::before(ctx, Step::Start)?;
    let told = interrupt(
        ctx,
        "image.made",
        || scene.act(Step::Start),
        |converter| {
            process::kill(match maker {
                Maker::Converter => converter,
                Maker::Shim => traces::parent(converter).context("the converter has no parent")?,
            })
        },
    );
    let cleared = scene.clear(&before);
    match maker {
        Maker::Converter => failed(told?, &["joey: signal: 9"])?,
        Maker::Shim => failed(told?, &["ttrpc: closed", "connection reset"])?,
    }
    cleared
}

/// How many disks are cached.
fn images(ctx: &Context<'_>) -> Result<usize> {
    let told: serde_json::Value =
        serde_json::from_str(&ctx.node.joey(&["--json", "image", "ls"])?)?;
    Ok(told["images"].as_array().context("no list of images")?.len())
}
