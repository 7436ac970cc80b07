//! The B+tree of a domain: items of up to [`VALUE_MAX`](crate::format::item::VALUE_MAX) bytes under
//! [`Key`](crate::format::item::Key)s, in slotted 4096-byte nodes, so that a small change is a small journal record.
//!
//! The tree does not know locks, journal or device: it works on a [`NodeRead`] or [`NodeWrite`]. Layout of a node: `node`.
//!
//! Shape (after Bayer and McCreight 1972 and Comer 1979, "The Ubiquitous B-Tree"): values only in leaves, no links between
//! nodes of a level (a link would be one more block to change). Every node but those of the right edge is at least a
//! quarter full, an inner node has at least two children. An insert at the tree's very end leaves the full node as it is and
//! starts a new one, so that items in ascending order fill nodes to the brim.
//!
//! Every change has a version, the next number of its domain. Each node that it touches is of that version from then on, and so is
//! each node above, up to the root, as the pointer to a node says which version it has: a node that is older than what leads to it,
//! or newer, was written to the device and lost there, or what leads to it was.
//!
//! A node is never believed: levels go down by one from [`Root::levels`] (at most [`MAX_LEVELS`]), every node met is
//! verified against the key bounds its parent gives, so damage gives the store's error, never a panic or a loop.

pub(crate) mod node;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::sync::Arc;

use journal::Block;

use crate::error::Result;

pub use read::{for_each_node, get, last_at_or_before, scan, scan_with, warm};
pub use write::{insert, remove, remove_range};

/// Deepest tree: even with nodes a quarter full, far more items than a device has bytes.
pub const MAX_LEVELS: u32 = 12;

/// Where a tree's root is; kept in the domain header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// Block number of the root node; 0 = empty tree.
    pub block: u64,
    /// Version of the root node: of the latest change of the tree.
    pub version: u32,
    /// Levels: 0 empty, 1 the root is a leaf.
    pub levels: u32,
    /// Nodes in the tree.
    pub nodes: u64,
}

/// Reads nodes; the implementation verifies checksum, place and owner before it hands one out.
#[allow(async_fn_in_trait)]
pub trait NodeRead {
    /// Error attached to a node whose content makes no sense.
    fn damaged(&self, block: u64, why: &str) -> crate::error::FsError;
    async fn node(&self, block: u64) -> Result<Arc<Block>>;
    /// Reads many nodes at once into the cache, in as few device reads as their places allow.
    async fn prefetch(&self, blocks: &[u64]) -> Result<()>;
}

/// Changes nodes in a private overlay (a transaction): nothing is seen by others until the operation is installed.
/// [`NodeRead::node`] of the same store sees the overlay. An error in the middle of a change leaves the overlay
/// half changed: the caller drops it.
#[allow(async_fn_in_trait)]
pub trait NodeWrite: NodeRead {
    /// Version of the nodes that this operation changes.
    fn version(&self) -> u32;
    /// The node, private to this operation, to change in place.
    async fn node_mut(&mut self, block: u64) -> Result<&mut Block>;
    /// A new zeroed node with its block header encoded.
    async fn alloc_node(&mut self) -> Result<u64>;
    fn free_node(&mut self, block: u64);
}

/// Everything that can be verified in a node alone: level, counts, slots in bounds, keys in order, bodies apart.
pub fn check_node(block: &Block, level: u32) -> std::result::Result<(), String> {
    let n = node::Node::open(block, level)?;
    n.check()?;
    if n.count() == 0 {
        return Err("node without items".into());
    }
    Ok(())
}
