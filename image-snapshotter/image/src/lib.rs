//! Images as block data: layers, and the disks that are made of them.
//!
//! A layer is made in one pass ([`layer`]) from a tar stream ([`tar`]) or a directory ([`directory`]). A
//! container gets a disk: layers merged by [`tree`], described by [`erofs`], protected by [`verity`], put
//! together by [`disk`]. joey-snapshotter does so with what is pulled, the shim with what another snapshotter
//! has unpacked. What is written over them the one tells the other ([`usage`]).

pub mod directory;
pub mod disk;
pub mod erofs;
pub mod layer;
pub mod tar;
pub mod tree;
pub mod usage;
pub mod verity;
