//! Notifications: telling the kernel what it must no longer believe.
//!
//! | call                 | code | needs                | accepted by Linux 6.18 (protocol 7.45)               |
//! |----------------------|------|----------------------|------------------------------------------------------|
//! | `poll_wakeup`        | 1    | 7.11                 | yes                                                  |
//! | `inval_inode`        | 2    | 7.12                 | yes                                                  |
//! | `inval_entry`        | 3    | 7.12                 | yes                                                  |
//! | `store`              | 4    | 7.15                 | yes                                                  |
//! | `delete`             | 6    | 7.18                 | yes                                                  |
//! | `inval_entry` expire | 3    | HAS_EXPIRE_ONLY 7.38 | yes                                                  |
//! | `inc_epoch`          | 8    | 7.44                 | yes                                                  |
//! | `prune`              | 9    | 7.45                 | yes                                                  |
//!
//! Hazard: `inval_entry` (also expire-only) and `delete` take the directory's lock in the kernel, which a lookup,
//! create, unlink or rename of that directory holds while it waits for our answer; `inval_inode` waits for pages that
//! are being read or written. Never call them where the answer they wait for depends on the caller. `inc_epoch` and
//! `prune` wait for nothing.

use std::io::{self, IoSlice};
use std::sync::{Arc, OnceLock};

use crate::abi::{self, Put};
use crate::channel::{Channel, Device};
use crate::init::{InitFlags, Negotiated};

/// Sends notifications; cheap to clone, usable from any thread once INIT is done.
#[derive(Clone)]
pub struct Notifier {
    device: Arc<Device>,
    negotiated: Arc<OnceLock<Negotiated>>,
}

impl Notifier {
    pub(crate) fn new(device: Arc<Device>, negotiated: Arc<OnceLock<Negotiated>>) -> Notifier {
        Notifier { device, negotiated }
    }

    fn send(&self, code: i32, body: &[IoSlice<'_>]) -> io::Result<()> {
        self.device.send(0, code, body)
    }

    /// Ok(false): the kernel does not have what the notification is about, which is as good.
    fn send_known(&self, code: i32, body: &[IoSlice<'_>]) -> io::Result<bool> {
        match self.send(code, body) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn negotiated(&self) -> io::Result<&Negotiated> {
        self.negotiated.get().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTCONN))
    }

    /// Whether the kernel has expire-only invalidation and we agreed on it.
    pub fn has_expire_only(&self) -> bool {
        self.negotiated.get().is_some_and(|n| n.flags.contains(InitFlags::HAS_EXPIRE_ONLY))
    }

    /// Whether the kernel has [`Notifier::inc_epoch`].
    pub fn has_inc_epoch(&self) -> bool {
        self.negotiated.get().is_some_and(|n| n.minor >= abi::MINOR_INC_EPOCH)
    }

    /// Whether the kernel has [`Notifier::prune`].
    pub fn has_prune(&self) -> bool {
        self.negotiated.get().is_some_and(|n| n.minor >= abi::MINOR_PRUNE)
    }

    /// Drops the cached attributes of a node and its cached pages from `off` on, `len` bytes or to the end if `len` is
    /// 0 or less. A negative `off` leaves the pages alone. Dirty pages in the range are written first.
    ///
    /// Body: nodeid 8, offset 8, length 8.
    pub fn inval_inode(&self, nodeid: u64, off: i64, len: i64) -> io::Result<bool> {
        let body = Put::<24>::new().u64(nodeid).i64(off).i64(len).done();
        self.send_known(abi::NOTIFY_INVAL_INODE, &[IoSlice::new(&body)])
    }

    /// Drops a name, or with `expire_only` ends its TTL and keeps it: then a directory that is some process's working
    /// directory stays reachable. Unsupported is returned if expire-only was asked for and not agreed on, because such
    /// a kernel would drop the name.
    ///
    /// Body: parent 8, name length 4, flags 4, name, NUL.
    pub fn inval_entry(&self, parent: u64, name: &[u8], expire_only: bool) -> io::Result<bool> {
        if expire_only && !self.has_expire_only() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flags = if expire_only { abi::EXPIRE_ONLY } else { 0 };
        let head = Put::<16>::new().u64(parent).u32(name.len() as u32).u32(flags).done();
        self.send_known(abi::NOTIFY_INVAL_ENTRY, &[IoSlice::new(&head), IoSlice::new(name), IoSlice::new(&[0])])
    }

    /// Says that the name `name` of `child` in `parent` is gone; the kernel drops it even if it is in use, and tells
    /// those who watch. ENOTEMPTY and EBUSY are errors of this call.
    ///
    /// Body: parent 8, child 8, name length 4, padding 4, name, NUL.
    pub fn delete(&self, parent: u64, child: u64, name: &[u8]) -> io::Result<bool> {
        let head = Put::<24>::new().u64(parent).u64(child).u32(name.len() as u32).done();
        self.send_known(abi::NOTIFY_DELETE, &[IoSlice::new(&head), IoSlice::new(name), IoSlice::new(&[0])])
    }

    /// Ends the validity of every name, present or absent, that the kernel learned before this call, whatever its TTL;
    /// each is looked up again at its next use. Takes microseconds, waits for nothing.
    pub fn inc_epoch(&self) -> io::Result<()> {
        if self.negotiated()?.minor < abi::MINOR_INC_EPOCH {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.send(abi::NOTIFY_INC_EPOCH, &[])
    }

    /// Puts data into a node's page cache.
    ///
    /// Body: nodeid 8, offset 8, size 4, padding 4, data.
    pub fn store(&self, nodeid: u64, offset: u64, data: &[u8]) -> io::Result<bool> {
        let head = Put::<24>::new().u64(nodeid).u64(offset).u32(data.len() as u32).done();
        self.send_known(abi::NOTIFY_STORE, &[IoSlice::new(&head), IoSlice::new(data)])
    }

    /// Asks the kernel to forget these nodes if nobody uses them; those which it does not know are skipped.
    ///
    /// Body: count 4, padding 4, spare 8, then 8 per node.
    pub fn prune(&self, nodeids: &[u64]) -> io::Result<()> {
        if self.negotiated()?.minor < abi::MINOR_PRUNE {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let head = Put::<16>::new().u32(nodeids.len() as u32).done();
        let list: Vec<u8> = nodeids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        self.send(abi::NOTIFY_PRUNE, &[IoSlice::new(&head), IoSlice::new(&list)])
    }

    /// Wakes those who poll the handle `kh` of a POLL request that asked for it.
    pub fn poll_wakeup(&self, kh: u64) -> io::Result<bool> {
        self.send_known(abi::NOTIFY_POLL, &[IoSlice::new(&kh.to_ne_bytes())])
    }
}
