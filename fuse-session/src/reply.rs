//! The answer to one request. Every request is answered exactly once: a [`Reply`] that is dropped answers EIO (EINTR after a signal), so that
//! no error path of a handler can leave a process waiting.

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use crate::abi::{self, Put};
use crate::channel::Channel;
use crate::dir::{DirBuffer, DirPlusBuffer};
use crate::types::{Attr, EntryOut, FileLock, Statfs, Statx};

/// The kernel refuses error numbers beyond this, and would keep the caller waiting.
const ERRNO_MAX: u32 = 511;

/// The way to answer one request; may be moved to another thread or task.
///
/// The answering methods return whether the kernel took the answer. It does not when the connection is gone; a handler
/// that counts lookups or open files must then take back what the answer would have granted.
pub struct Reply {
    unique: u64,
    opcode: u32,
    channel: Option<Arc<dyn Channel>>,
}

impl Reply {
    /// For the session, for another transport and for tests of a handler.
    pub fn new(unique: u64, opcode: u32, channel: Arc<dyn Channel>) -> Reply {
        Reply { unique, opcode, channel: Some(channel) }
    }

    /// The kernel's number of this request.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Whether the waiting process has received a signal. A request that may wait should then answer EINTR; any other
    /// answer is correct as well.
    pub fn interrupted(&self) -> bool {
        self.channel.as_ref().is_some_and(|c| c.interrupts().is_interrupted(self.unique))
    }

    /// [`InterruptHandle::on_interrupt`] for a callback that does not need the reply itself, such as one that wakes the
    /// task which owns it.
    pub fn on_interrupt(&self, callback: impl FnOnce() + Send + 'static) {
        if let Some(handle) = self.interrupt_handle() {
            handle.on_interrupt(callback);
        }
    }

    /// The way to hear of interrupts while the reply is parked elsewhere. None only for an answered reply.
    pub fn interrupt_handle(&self) -> Option<InterruptHandle> {
        Some(InterruptHandle { unique: self.unique, channel: self.channel.clone()? })
    }

    fn send(&mut self, error: i32, body: &[IoSlice<'_>]) -> bool {
        let Some(channel) = self.channel.take() else { return false };
        channel.interrupts().remove(self.unique);
        match channel.send(self.unique, error, body) {
            Ok(()) => true,
            // The connection was aborted or unmounted, and the kernel has already failed the request.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EPERM)) => {
                debug!(unique = self.unique, opcode = self.opcode, "nobody waits for this answer any more");
                false
            }
            Err(e) => {
                warn!(unique = self.unique, opcode = self.opcode, "the kernel refused an answer: {e}");
                false
            }
        }
    }

    fn body(mut self, body: &[u8]) -> bool {
        self.send(0, &[IoSlice::new(body)])
    }

    /// Fails the request. `errno` is positive (`libc::ENOENT`); what is no errno becomes EIO.
    pub fn err(mut self, errno: i32) -> bool {
        let errno = if (1..=ERRNO_MAX).contains(&errno.unsigned_abs()) { errno.abs() } else { libc::EIO };
        self.send(-errno, &[])
    }

    /// Success without data: unlink, rmdir, rename, setxattr, removexattr, access, flush, release, fsync, setlk,
    /// fallocate, syncfs, and the same for directories.
    pub fn ok(mut self) -> bool {
        self.send(0, &[])
    }

    /// lookup, mknod, mkdir, symlink, link. Counts as one lookup unless `nodeid` is 0.
    pub fn entry(self, entry: &EntryOut) -> bool {
        self.body(&entry.encode())
    }

    /// getattr, setattr.
    pub fn attr(self, valid: Duration, attr: &Attr) -> bool {
        self.body(&attr.encode_with_ttl(valid))
    }

    /// statx.
    pub fn statx(self, valid: Duration, statx: &Statx) -> bool {
        self.body(&statx.encode_with_ttl(valid))
    }

    /// readlink.
    pub fn readlink(self, target: &[u8]) -> bool {
        self.body(target)
    }

    /// open, opendir. `open_flags` is of [`abi::FOPEN_KEEP_CACHE`] and its kin.
    pub fn open(self, fh: u64, open_flags: u32) -> bool {
        self.body(&encode_open(fh, open_flags))
    }

    /// create, tmpfile.
    pub fn create(mut self, entry: &EntryOut, fh: u64, open_flags: u32) -> bool {
        self.send(0, &[IoSlice::new(&entry.encode()), IoSlice::new(&encode_open(fh, open_flags))])
    }

    /// write: how much was written.
    pub fn write(self, written: u32) -> bool {
        self.body(&Put::<8>::new().u32(written).done())
    }

    /// copy_file_range: how much was copied. The older form of the request can only tell of 4 GiB; less than asked for
    /// is a valid answer, and the caller goes on from there.
    pub fn copied(self, len: u64) -> bool {
        if self.opcode == abi::COPY_FILE_RANGE_64 {
            return self.body(&len.to_ne_bytes());
        }
        self.write(u32::try_from(len).unwrap_or(u32::MAX))
    }

    /// read: at most as much as was asked for; less means end of file.
    pub fn data(self, data: &[u8]) -> bool {
        self.body(data)
    }

    /// read from several places, without joining them first.
    pub fn data_vectored(mut self, parts: &[IoSlice<'_>]) -> bool {
        self.send(0, parts)
    }

    /// readdir.
    pub fn dir(self, entries: &DirBuffer) -> bool {
        self.body(entries.bytes())
    }

    /// readdirplus.
    pub fn dir_plus(self, entries: &DirPlusBuffer) -> bool {
        self.body(entries.bytes())
    }

    pub fn statfs(self, statfs: &Statfs) -> bool {
        self.body(&statfs.encode())
    }

    /// getxattr, listxattr: `size` is the request's. Answers the value's length if that is 0, ERANGE if the value is
    /// longer, else the value.
    pub fn xattr(self, size: u32, value: &[u8]) -> bool {
        if size == 0 {
            self.xattr_size(value.len() as u32)
        } else if value.len() > size as usize {
            self.err(libc::ERANGE)
        } else {
            self.body(value)
        }
    }

    /// getxattr, listxattr with size 0: how long the value is.
    pub fn xattr_size(self, len: u32) -> bool {
        self.body(&Put::<8>::new().u32(len).done())
    }

    pub fn lseek(self, offset: u64) -> bool {
        self.body(&offset.to_ne_bytes())
    }

    /// getlk: the lock in the way, or one of kind Unlock if there is none.
    pub fn lk(self, lock: &FileLock) -> bool {
        self.body(&lock.encode())
    }

    pub fn bmap(self, block: u64) -> bool {
        self.body(&block.to_ne_bytes())
    }

    /// ioctl: the call's result, and the data for the caller.
    pub fn ioctl(mut self, result: i32, data: &[u8]) -> bool {
        let head = Put::<16>::new().i32(result).done();
        self.send(0, &[IoSlice::new(&head), IoSlice::new(data)])
    }

    /// poll: `POLLIN` and its kin.
    pub fn poll(self, revents: u32) -> bool {
        self.body(&Put::<8>::new().u32(revents).done())
    }
}

/// Hears of the interruption of one request, independent of where its [`Reply`] is.
#[derive(Clone)]
pub struct InterruptHandle {
    unique: u64,
    channel: Arc<dyn Channel>,
}

impl InterruptHandle {
    /// Calls `callback` when the waiting process receives a signal, at once if it already has; never after the request
    /// has been answered, except for a call that is already under way. The callback runs on a reader thread, or on
    /// this one, and must not wait. A second callback replaces the first.
    ///
    /// To park a request: put the reply into a slot, then arm a callback that takes it from there and answers EINTR.
    /// Whoever takes the reply first answers it.
    pub fn on_interrupt(&self, callback: impl FnOnce() + Send + 'static) {
        self.channel.interrupts().arm(self.unique, Box::new(callback));
    }

    /// Whether the waiting process has received a signal; false once the request is answered.
    pub fn interrupted(&self) -> bool {
        self.channel.interrupts().is_interrupted(self.unique)
    }
}

/// fh 8, open_flags 4, backing id 4 (0).
fn encode_open(fh: u64, open_flags: u32) -> [u8; 16] {
    Put::new().u64(fh).u32(open_flags).done()
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply(unique {}, opcode {})", self.unique, self.opcode)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.channel.is_some() {
            if self.interrupted() {
                // Given up because nobody waits any more.
                self.send(-libc::EINTR, &[]);
                return;
            }
            warn!(unique = self.unique, opcode = self.opcode, "request dropped without an answer, answering EIO");
            self.send(-libc::EIO, &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::InterruptTable;
    use parking_lot::Mutex;
    use std::io;

    #[derive(Default)]
    struct Capture {
        sent: Mutex<Vec<(u64, i32, Vec<u8>)>>,
        interrupts: InterruptTable,
    }

    impl Channel for Capture {
        fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> io::Result<()> {
            let body = body.iter().flat_map(|p| p.iter().copied()).collect();
            self.sent.lock().push((unique, error, body));
            Ok(())
        }

        fn interrupts(&self) -> &InterruptTable {
            &self.interrupts
        }
    }

    fn answer(opcode: u32, f: impl FnOnce(Reply) -> bool) -> (u64, i32, Vec<u8>) {
        let capture = Arc::new(Capture::default());
        assert!(f(Reply::new(6, opcode, capture.clone())));
        let mut sent = capture.sent.lock();
        assert_eq!(sent.len(), 1, "exactly one answer");
        sent.remove(0)
    }

    #[test]
    fn an_unanswered_reply_answers_eio_once() {
        let sent = answer(abi::LOOKUP, |reply| {
            drop(reply);
            true
        });
        assert_eq!(sent, (6, -libc::EIO, vec![]));
    }

    #[test]
    fn errors_stay_within_what_the_kernel_accepts() {
        for (given, sent) in [(libc::ENOENT, -libc::ENOENT), (-libc::ENOENT, -libc::ENOENT), (0, -libc::EIO)] {
            assert_eq!(answer(abi::LOOKUP, |r| r.err(given)).1, sent);
        }
        assert_eq!(answer(abi::LOOKUP, |r| r.err(512)).1, -libc::EIO);
        assert_eq!(answer(abi::LOOKUP, |r| r.err(i32::MIN)).1, -libc::EIO);
    }

    #[test]
    fn xattr_follows_the_size_that_was_asked() {
        assert_eq!(answer(abi::GETXATTR, |r| r.xattr(0, b"abc")).2, [3u32, 0].map(u32::to_ne_bytes).concat());
        assert_eq!(answer(abi::GETXATTR, |r| r.xattr(2, b"abc")).1, -libc::ERANGE);
        assert_eq!(answer(abi::GETXATTR, |r| r.xattr(3, b"abc")).2, b"abc");
    }

    #[test]
    fn copied_takes_the_form_of_its_request() {
        assert_eq!(answer(abi::COPY_FILE_RANGE_64, |r| r.copied(1 << 33)).2, (1u64 << 33).to_ne_bytes());
        let old = answer(abi::COPY_FILE_RANGE, |r| r.copied(1 << 33)).2;
        assert_eq!(old, [u32::MAX, 0].map(u32::to_ne_bytes).concat());
    }

    #[test]
    fn answering_ends_the_interest_in_interrupts() {
        let capture = Arc::new(Capture::default());
        capture.interrupts.register(6, None);
        let reply = Reply::new(6, abi::SETLKW, capture.clone());
        assert!(!reply.interrupted());
        assert!(capture.interrupts.interrupt(6));
        assert!(reply.interrupted());
        assert!(reply.err(libc::EINTR));
        assert!(!capture.interrupts.interrupt(6));
    }

    #[test]
    fn a_dropped_reply_tells_whether_it_was_interrupted() {
        let capture = Arc::new(Capture::default());
        for interrupted in [true, false] {
            capture.interrupts.register(6, None);
            let reply = Reply::new(6, abi::GETATTR, capture.clone());
            if interrupted {
                capture.interrupts.interrupt(6);
            }
            drop(reply);
        }
        assert_eq!(*capture.sent.lock(), [(6, -libc::EINTR, vec![]), (6, -libc::EIO, vec![])]);
    }
}
