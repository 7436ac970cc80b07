//! The session against the kernel itself: a small filesystem in memory, mounted on a temporary directory.
//! Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod guard;
mod locks;
mod memfs;
mod notify;
mod ops;
mod sys;
