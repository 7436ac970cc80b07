//! The on-disk format of a volume: superblock and layout, domain headers, groups, tree items.
//!
//! Encode and decode of each structure stand together, with its byte offsets; docs/FORMAT.md has the whole picture.
//! All integers are little endian unless said otherwise; blocks are 4096 bytes.

pub mod bytes;
pub mod domain;
pub mod file_lock;
pub mod group;
pub mod item;
pub mod layout;
pub mod superblock;

pub use bytes::FormatError;
