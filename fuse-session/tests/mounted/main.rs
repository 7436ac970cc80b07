//! The session against the kernel itself: a small filesystem in memory, mounted on a temporary directory.
//! Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod enable;
mod guard;
mod locks;
mod memfs;
mod notify;
mod ops;
mod sys;

/// Requests come through /dev/fuse; `tests/uring` runs the same tests with io_uring.
const URING: bool = false;
