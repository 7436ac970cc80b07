//! The tests of `tests/mounted` with requests that come through io_uring, and those that it alone needs.
//! Needs root, /dev/fuse and Linux 6.14.

#![allow(clippy::unwrap_used)]

#[path = "../mounted/enable.rs"]
mod enable;
#[path = "../mounted/guard.rs"]
mod guard;
#[path = "../mounted/locks.rs"]
mod locks;
#[path = "../mounted/memfs.rs"]
mod memfs;
#[path = "../mounted/notify.rs"]
mod notify;
#[path = "../mounted/ops.rs"]
mod ops;
mod queues;
#[path = "../mounted/sys.rs"]
mod sys;

const URING: bool = true;
