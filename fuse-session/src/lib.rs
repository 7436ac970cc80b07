//! The FUSE session layer: a mount, its requests, the replies to them and the notifications to the kernel.
//!
//! This crate speaks the kernel's FUSE protocol (7.31 to 7.45) directly and knows nothing about what is mounted.
//! It exists because a cluster filesystem needs parts of the protocol that general crates hide: flock told apart from
//! POSIX locks, interruption of a waiting request, unnamed files (`O_TMPFILE`), expire-only and epoch invalidation,
//! and a write payload that outlives the call which delivered it.
//!
//! The parts, from the outside in:
//!
//! | module      | job                                                                             |
//! |-------------|---------------------------------------------------------------------------------|
//! | `mount`     | mount(2), umount2(2), finding our mount again                                   |
//! | `session`   | the [`Session`]: reader threads, INIT, dispatch to a [`Handler`]                |
//! | `init`      | pure negotiation: what the kernel offers, what the handler wants, what holds    |
//! | `request`   | bytes from the kernel to a plain, owned [`Request`]; never panics on short input|
//! | `reply`     | one answer per request; an unanswered [`Reply`] answers EIO or EINTR when dropped |
//! | `interrupt` | which requests are outstanding, and whom to call when the caller gets a signal  |
//! | `notify`    | the [`Notifier`]: cache invalidation from any thread                            |
//! | `dir`       | READDIR and READDIRPLUS buffers                                                 |
//! | `types`     | attributes, entries, locks and their wire form                                  |
//! | `buffer`    | page-aligned receive buffers, handed over to large writes                       |
//! | `channel`   | how an answer reaches the kernel, through /dev/fuse                             |
//! | `uring`     | requests and answers through io_uring instead of /dev/fuse                       |
//! | `abi`       | numbers of the protocol                                                         |

pub mod abi;
mod buffer;
mod channel;
mod dir;
mod init;
mod interrupt;
mod mount;
mod notify;
mod reply;
mod request;
mod session;
mod types;
mod uring;

pub use buffer::Payload;
pub use channel::Channel;
pub use dir::{DirBuffer, DirPlusBuffer};
pub use init::{InitConfig, InitFlags, InitRequest, Negotiated};
pub use interrupt::InterruptTable;
pub use mount::{MountError, MountSpec, UnmountMode, unescape};
pub use notify::Notifier;
pub use reply::{InterruptHandle, Reply};
pub use request::{Forget, Op, Request, SetTime, Setattr};
pub use session::{Handler, RunError, Session};
pub use types::{Attr, EntryOut, FileLock, LockKind, Statfs, Statx, Time};
