//! The volume: domains, trees, directories, files, allocation, and their on-disk format.
//!
//! [`Volume::mount`] joins a volume; its methods are what a filesystem does, named after the system calls. Each result is
//! [`Leased`]: true for as long as the node holds the domains it came from. Below are, from the top: the operations
//! (`ops`, `contents`), an operation's private overlay (`txn`), admission and revocation (`hold`, `revoke`), the domain's
//! tree (`tree`), free space (`alloc`, `space`), verified blocks (`store`), and the on-disk format (`format`).

mod acl;
pub mod activity;
pub mod alloc;
mod background;
pub mod check;
mod contents;
mod domain;
pub mod error;
pub mod format;
pub mod grow;
mod hold;
mod locks;
mod ops;
mod recovery;
pub mod repair;
mod revoke;
mod space;
mod store;
pub mod tree;
mod txn;
pub mod types;
mod unnamed;
mod visit;
mod volume;

pub use error::{FsError, Result};
pub use format::item::ino_domain;
pub use locks::{FileLock, HeldLock, Space, TO_THE_END};
pub use recovery::{JournalRecoverer, refuse_unclean};
pub use types::*;
pub use volume::{Leased, MountError, ROOT_INO, Remains, Volume, read_superblock};
