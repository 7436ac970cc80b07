//! The volume: domains, trees, directories, files, allocation, and their on-disk format.

pub mod check;
pub mod error;
pub mod format;
pub mod tree;
pub mod types;
pub mod volume;

pub use error::{FsError, Result};
pub use types::*;
pub use volume::{Leased, ROOT_INO, Volume};
