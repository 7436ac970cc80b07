//! The B+tree of a domain: items of up to [`VALUE_MAX`](crate::format::item::VALUE_MAX) bytes under
//! [`Key`](crate::format::item::Key)s, in slotted 4096-byte nodes, so that a small change is a small journal record.
//!
//! The tree does not know locks, journal or device: it works on a [`NodeRead`] or [`NodeWrite`].

use std::sync::Arc;

use journal::Block;

use crate::error::Result;

/// Where a tree's root is; kept in the domain header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// Block number of the root node; 0 = empty tree.
    pub block: u64,
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
#[allow(async_fn_in_trait)]
pub trait NodeWrite: NodeRead {
    /// The node, private to this operation, to change in place.
    async fn node_mut(&mut self, block: u64) -> Result<&mut Block>;
    /// A new zeroed node with its block header encoded.
    async fn alloc_node(&mut self) -> Result<u64>;
    fn free_node(&mut self, block: u64);
}
