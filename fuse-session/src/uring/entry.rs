//! Ring entries: the memory that the kernel puts a request into and takes its answer from, and the channel which answers.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::abi::{IN_HEADER_LEN, Malformed, URING_ENTRY_AT, URING_HEADERS_LEN, URING_OP_AT, out_header};
use crate::buffer::ReceiveBuffer;
use crate::channel::Channel;
use crate::interrupt::InterruptTable;

const PAGE: usize = 4096;

/// What those who answer share with the thread that owns the queue.
pub(super) struct Answers {
    ready: Mutex<Vec<usize>>,
    /// The owner is not waiting in the kernel, and will look at `ready` before it does.
    awake: AtomicBool,
    ended: AtomicBool,
    wake: OwnedFd,
    interrupts: Arc<InterruptTable>,
}

impl Answers {
    pub(super) fn new(interrupts: Arc<InterruptTable>) -> io::Result<Answers> {
        // SAFETY: no pointers; the descriptor is owned from here on.
        let wake = unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        let (awake, ended) = (AtomicBool::new(true), AtomicBool::new(false));
        Ok(Answers { ready: Mutex::default(), awake, ended, wake, interrupts })
    }

    pub(super) fn wake_fd(&self) -> i32 {
        self.wake.as_raw_fd()
    }

    /// Moves the entries answered since the last call to `into`.
    pub(super) fn take(&self, into: &mut Vec<usize>) {
        into.append(&mut self.ready.lock());
    }

    /// False: there is something to do before waiting.
    pub(super) fn may_wait(&self) -> bool {
        self.awake.store(false, Ordering::SeqCst);
        self.ready.lock().is_empty() && !self.ended()
    }

    pub(super) fn waited(&self) {
        self.awake.store(true, Ordering::SeqCst);
    }

    pub(super) fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// No answer is delivered any more, and the owner of the queue stops.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn push(&self, entry: usize) {
        self.ready.lock().push(entry);
        self.wake();
    }

    fn wake(&self) {
        if !self.awake.swap(true, Ordering::SeqCst) {
            let one = 1u64;
            // SAFETY: eight bytes of a live integer. It cannot fail but by overflow, and then the owner is woken anyway.
            unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }
}

/// Anonymous memory; a page costs nothing until it is used.
struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; who may touch which part when is the entries' business.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> io::Result<Memory> {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast()).map(|start| Memory { start, len }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever points into it holds the Arc.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// One entry. Its memory belongs to the kernel from the registration on and after each commit, and to us from the
/// completion that brings a request until the answer to it is ready.
pub(super) struct Entry {
    index: usize,
    answers: Arc<Answers>,
    memory: Arc<Memory>,
    /// Of the headers, a page before the payload.
    offset: usize,
    payload_len: usize,
    /// Headers, payload: what the kernel is given at registration.
    iov: [libc::iovec; 2],
    /// The request that is to be answered; 0: none. Whoever takes it may write to the memory.
    unanswered: AtomicU64,
}

// SAFETY: the pointers in `iov` are into `memory`.
unsafe impl Send for Entry {}
// SAFETY: as above; access to the memory is handed over by `unanswered` and by `Answers::ready`.
unsafe impl Sync for Entry {}

impl Entry {
    /// `count` entries, numbered from `first` on.
    pub(super) fn make(
        first: usize,
        count: usize,
        payload_len: usize,
        answers: &Arc<Answers>,
    ) -> io::Result<Vec<Arc<Entry>>> {
        let payload_len = payload_len.next_multiple_of(PAGE);
        let memory = Arc::new(Memory::new(count * (PAGE + payload_len))?);
        let make = |n: usize| {
            let offset = n * (PAGE + payload_len);
            // SAFETY: within the mapping.
            let headers = unsafe { memory.start.as_ptr().add(offset) };
            let iov = [
                libc::iovec { iov_base: headers.cast(), iov_len: URING_HEADERS_LEN },
                // SAFETY: within the mapping.
                libc::iovec { iov_base: unsafe { headers.add(PAGE) }.cast(), iov_len: payload_len },
            ];
            Arc::new(Entry {
                index: first + n,
                answers: answers.clone(),
                memory: memory.clone(),
                offset,
                payload_len,
                iov,
                unanswered: AtomicU64::new(0),
            })
        };
        Ok((0..count).map(make).collect())
    }

    pub(super) fn iov(&self) -> *const libc::iovec {
        self.iov.as_ptr()
    }

    fn headers(&self) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.memory.start.as_ptr().add(self.offset) }
    }

    /// SAFETY: the caller must own the memory, and `at + len` be within the headers.
    unsafe fn header_bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        // SAFETY: by the caller.
        unsafe { self.headers().add(at).cast::<[u8; N]>().read_unaligned() }
    }

    /// Joins the request that has arrived in `buffer`; returns its length and the id to commit it by.
    ///
    /// Must be called once for each completion, by the owner of the queue.
    pub(super) fn receive(&self, buffer: &mut ReceiveBuffer) -> (u64, Result<usize, Malformed>) {
        // SAFETY: the completion has given us the memory, and nobody knows of the request yet.
        let (len, commit_id, payload) = unsafe {
            (
                u32::from_ne_bytes(self.header_bytes(0)) as usize,
                u64::from_ne_bytes(self.header_bytes(URING_ENTRY_AT + 8)),
                u32::from_ne_bytes(self.header_bytes(URING_ENTRY_AT + 16)) as usize,
            )
        };
        self.unanswered.store(commit_id, Ordering::SeqCst);
        let head = len.checked_sub(payload).filter(|head| {
            let op_len = head.wrapping_sub(IN_HEADER_LEN);
            op_len <= URING_ENTRY_AT - URING_OP_AT && payload <= self.payload_len && len <= buffer.space().len()
        });
        let Some(head) = head else { return (commit_id, Err(Malformed("lengths of a ring entry do not fit"))) };
        let space = buffer.space();
        let mut put = |at: usize, from: usize, len: usize| {
            // SAFETY: `from` and `len` are within the entry by the checks above, and it is ours.
            let bytes = unsafe { std::slice::from_raw_parts(self.headers().add(from), len) };
            space[at..at + len].copy_from_slice(bytes);
        };
        put(0, 0, IN_HEADER_LEN);
        put(IN_HEADER_LEN, URING_OP_AT, head - IN_HEADER_LEN);
        put(head, PAGE, payload);
        (commit_id, Ok(len))
    }
}

impl Channel for Entry {
    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> io::Result<()> {
        if self.unanswered.compare_exchange(unique, 0, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        let wanted: usize = body.iter().map(|part| part.len()).sum();
        let fits = wanted <= self.payload_len;
        let (len, error) = if fits { (wanted, error) } else { (0, -libc::EIO) };
        // SAFETY: `unanswered` gave us the memory until the push; all lengths are within it.
        unsafe {
            self.headers().cast::<[u8; 16]>().write_unaligned(out_header(len, error, unique));
            self.headers().add(URING_ENTRY_AT + 16).cast::<[u8; 4]>().write_unaligned((len as u32).to_ne_bytes());
            let mut at = self.headers().add(PAGE);
            for part in body.iter().filter(|_| fits) {
                std::ptr::copy_nonoverlapping(part.as_ptr(), at, part.len());
                at = at.add(part.len());
            }
        }
        self.answers.push(self.index);
        match (fits, self.answers.ended()) {
            (true, false) => Ok(()),
            (true, true) => Err(io::Error::from_raw_os_error(libc::ENODEV)),
            (false, _) => Err(io::Error::new(io::ErrorKind::InvalidInput, "an answer longer than the kernel takes")),
        }
    }

    fn interrupts(&self) -> &InterruptTable {
        &self.answers.interrupts
    }
    fn may_miss_signals(&self) -> bool {
        true
    }
}
