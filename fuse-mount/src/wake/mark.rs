//! Events without changes: what the helper asks for is answered here, and nothing happens on the volume.
//!
//! The kernel tells watchers of what it believes to have happened. For the helper a file [`NAME`] does not exist, can be made and
//! can be removed in any directory, and space is always allocated already. That gives IN_CREATE and IN_DELETE, or IN_MODIFY, on top of
//! what opening gives. Requests are answered before anything is waited for: the kernel holds the directory's i_rwsem.

use std::time::Duration;

use fuse_session::{Attr, EntryOut, Op, Reply, Request};
use parking_lot::Mutex;

/// As of a file that somebody makes and removes at once: who reads the directory never finds it. Hidden, as mail programs
/// expect of what is not mail.
pub const NAME: &std::ffi::CStr = c".clusterfs-changed";
/// A number in a domain that no volume has.
const NODE: u64 = u64::MAX;
/// From making to removing.
const VALID: Duration = Duration::from_secs(1);

/// The helper's threads, by which its requests are known.
#[derive(Default)]
pub struct Threads(Mutex<Vec<u32>>);

impl Threads {
    pub fn set(&self, threads: Vec<u32>) {
        *self.0.lock() = threads;
    }

    /// Answers what is not meant in earnest; anything else is handed back.
    pub fn answer(&self, request: &Request, reply: Reply) -> Option<Reply> {
        if request.nodeid == NODE {
            reply.err(libc::ESTALE);
            return None;
        }
        let ours = match &request.op {
            Op::Lookup { name } | Op::Mknod { name, .. } | Op::Unlink { name } => name == NAME.to_bytes(),
            Op::Fallocate { .. } => true,
            _ => false,
        };
        if !ours || !self.0.lock().contains(&request.pid) {
            return Some(reply);
        }
        match &request.op {
            Op::Lookup { .. } => reply.err(libc::ENOENT),
            Op::Mknod { .. } => reply.entry(&entry()),
            _ => reply.ok(),
        };
        None
    }
}

fn entry() -> EntryOut {
    let attr = Attr { ino: NODE, mode: libc::S_IFREG | 0o600, nlink: 1, blksize: 4096, ..Attr::default() };
    EntryOut { nodeid: NODE, generation: 0, entry_valid: VALID, attr_valid: VALID, attr }
}
