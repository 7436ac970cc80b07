//! Contents of regular files.
//!
//! A write goes to pages in memory. When they are *flushed* (fsync, age, pressure, revocation), blocks are allocated, and
//! extents, size and contents go into the running transaction together: so a size or an extent never reaches the disk before
//! the contents it promises (I11). Contents overwrite written blocks in place; what is new goes to new blocks.
//! Files of up to [`INLINE_MAX`](crate::format::item::INLINE_MAX) bytes live in the tree.

mod extents;
mod file;
mod flush;
mod layout_ops;
mod mapped;
mod tails;

pub use mapped::MappedWrites;
pub use tails::Tails;
