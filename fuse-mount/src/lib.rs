//! clusterfs on FUSE: a thin layer of translation over [`fs_core::Volume`].
//!
//! | module | job |
//! |--------|-----|
//! | `options` | the command line and `-o` options as mount(8) passes them |
//! | `daemon` | going to the background once the mount is usable, logging there |
//! | `mount` | from a device's name to a served mount point, and back |
//! | `handler` | requests of the kernel to operations of the volume |
//! | `listing` | READDIR and READDIRPLUS |
//! | `kernel_cache` | what the kernel knows, and making it forget (section 2.6 of the design) |
//! | `counters` | how often the kernel has asked for what |
//! | `convert`, `errno` | attributes and errors in the kernel's terms |

pub mod convert;
pub mod counters;
pub mod daemon;
pub mod errno;
pub mod handler;
pub mod kernel_cache;
mod listing;
pub mod mount;
pub mod options;
