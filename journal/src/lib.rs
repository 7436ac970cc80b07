//! The redo log of one node: group commit, placing, checkpoint, and replay of a dead node's log.
//!
//! The journal owns every dirty metadata block between the operation that changed it and its placing:
//! [`Journal::install`] takes an operation's changes atomically, [`Journal::commit`] makes everything installed so far
//! durable in one device write, [`Journal::settle`] places what a lock covers so that the lock can be given up (I3).

pub mod block;
mod types;

pub use block::{BLOCK_SIZE, Block};
pub use types::*;
