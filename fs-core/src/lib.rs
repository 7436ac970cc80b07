//! The volume: domains, trees, directories, files, allocation, and their on-disk format.

pub mod error;
pub mod format;
pub mod tree;

pub use error::{FsError, Result};
