//! The redo log of one node: group commit, placing, checkpoint, and replay of a dead node's log.
//!
//! The journal owns every dirty metadata block between the operation that changed it and its placing:
//! [`Journal::install`] takes an operation's changes atomically, [`Journal::commit`] makes everything installed so far
//! durable in one device write, [`Journal::settle`] places what a lock covers so that the lock can be given up (I3).
//!
//! A block moves through these states:
//!
//! | state | where it is | who moves it on |
//! |-------|-------------|-----------------|
//! | running | changed by installed operations, in no record yet | `commit` |
//! | committing | sealed, its record is being written | the same commit, once the flush is back |
//! | logged | its record is durable: it may be placed (I2) | `settle`, `checkpoint` |
//! | placed | on the device, flushed: forgotten here | |

pub mod block;
mod commit;
mod diff;
mod format;
mod log;
mod place;
mod replay;
mod running;
mod salvage;
mod types;

pub use block::{BLOCK_SIZE, Block};
pub use format::initial_header;
pub use log::{Journal, JournalStats, Room};
pub use replay::{ReplayReport, Scan, TenureSource, last_opened_by, replay, scan};
pub use salvage::{Salvage, salvage};
pub use types::*;
