//! clusterfs on FUSE: a thin layer of translation over [`fs_core::Volume`].
//!
//! | module | job |
//! |--------|-----|
//! | `options` | the command line and `-o` options as mount(8) passes them |
//! | `daemon` | going to the background once the mount is usable, logging there |
//! | `mount` | from a device's name to a served mount point, and back |
//! | `handler` | requests of the kernel to operations of the volume |
//! | `open` | OPEN, CREATE and TMPFILE |
//! | `growth` | telling the kernel that a file has grown |
//! | `interrupt` | signals to processes that wait for an answer |
//! | `file_locks` | fcntl and flock |
//! | `listing` | READDIR and READDIRPLUS |
//! | `membership` | being a node, and becoming one again after a lapse |
//! | `lost` | whom to tell of changes that were lost with a membership |
//! | `kernel_cache` | what the kernel knows, and making it forget (section 2.6 of the design) |
//! | `wake` | waking those who watch by inotify what another node changes |
//! | `counters` | how often the kernel has asked for what |
//! | `report` | what this node is doing, for `clusterfs top` |
//! | `convert`, `errno` | attributes and errors in the kernel's terms |

pub mod convert;
pub mod counters;
pub mod daemon;
pub mod errno;
mod file_locks;
mod growth;
pub mod handler;
mod interrupt;
pub mod kernel_cache;
mod listing;
pub mod lost;
pub mod membership;
pub mod mount;
mod open;
pub mod options;
pub mod report;
pub mod wake;
