//! Page-aligned receive buffers, and write payloads that own one.
//!
//! A message is read so that the payload of a WRITE starts on a page boundary. A large payload takes the whole buffer
//! with it instead of being copied, and gives it back to the pool when dropped. A small one is copied to a buffer of
//! its own size: otherwise a queue of small writes would each hold a buffer of a megabyte.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::abi::{IN_HEADER_LEN, WRITE_IN_LEN};

const ALIGN: usize = 4096;
/// Where a message starts in its buffer, so that a WRITE's payload is aligned.
const MESSAGE_AT: usize = ALIGN - IN_HEADER_LEN - WRITE_IN_LEN;
/// Payloads up to this are copied (a few microseconds) rather than keep a whole receive buffer.
const COPY_LIMIT: usize = 32 << 10;
/// No request other than WRITE is longer than this: SETXATTR carries up to 64 KiB, IOCTL less.
const OTHER_LIMIT: usize = 128 << 10;

/// Zeroed memory that starts on a page boundary.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Aligned {
        let bytes = vec![0u8; len + ALIGN];
        let start = (bytes.as_ptr() as usize).next_multiple_of(ALIGN) - bytes.as_ptr() as usize;
        Aligned { bytes, start, len }
    }

    fn slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    fn slice_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Receive buffers of one size.
pub(crate) struct Pool {
    buffer_len: usize,
    keep: usize,
    free: Mutex<Vec<Aligned>>,
}

impl Pool {
    /// Buffers for writes of up to `max_write`; at most `keep` unused ones stay allocated.
    pub(crate) fn new(max_write: u32, keep: usize) -> Arc<Pool> {
        let buffer_len = ALIGN + (max_write as usize).max(OTHER_LIMIT);
        Arc::new(Pool { buffer_len, keep, free: Mutex::new(Vec::new()) })
    }

    pub(crate) fn take(self: &Arc<Self>) -> ReceiveBuffer {
        let free = self.free.lock().pop();
        ReceiveBuffer { memory: free.unwrap_or_else(|| Aligned::new(self.buffer_len)), pool: self.clone() }
    }

    fn give_back(&self, memory: Aligned) {
        let mut free = self.free.lock();
        if free.len() < self.keep {
            free.push(memory);
        }
    }
}

/// A buffer that one message is read into.
pub(crate) struct ReceiveBuffer {
    memory: Aligned,
    pool: Arc<Pool>,
}

impl ReceiveBuffer {
    /// Where to read a message to.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        &mut self.memory.slice_mut()[MESSAGE_AT..]
    }

    /// The message of `len` bytes that was read.
    pub(crate) fn message(&self, len: usize) -> &[u8] {
        &self.memory.slice()[MESSAGE_AT..MESSAGE_AT + len]
    }

    /// Takes the part `range` of the message as a payload. The buffer is replaced if it went with the payload.
    pub(crate) fn take_payload(&mut self, range: Range<usize>) -> Payload {
        let len = range.len();
        let from = MESSAGE_AT + range.start;
        if len <= COPY_LIMIT {
            return Payload::copy_of(&self.memory.slice()[from..from + len]);
        }
        let pool = self.pool.clone();
        let fresh = pool.take();
        let full = std::mem::replace(self, fresh);
        Payload { memory: Some(full.memory), range: from..from + len, home: Some(full.pool) }
    }
}

/// The data of a WRITE, SETXATTR or IOCTL: owned, page-aligned for WRITE, read through `Deref<Target = [u8]>`.
pub struct Payload {
    /// None only while being dropped, or for an empty payload.
    memory: Option<Aligned>,
    range: Range<usize>,
    home: Option<Arc<Pool>>,
}

impl Payload {
    /// A payload with its own, page-aligned copy of `data`.
    pub fn copy_of(data: &[u8]) -> Payload {
        let mut memory = Aligned::new(data.len());
        memory.slice_mut().copy_from_slice(data);
        Payload { memory: Some(memory), range: 0..data.len(), home: None }
    }

    pub(crate) fn empty() -> Payload {
        Payload { memory: None, range: 0..0, home: None }
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |m| &m.slice()[self.range.clone()])
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.range.len())
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let (Some(memory), Some(home)) = (self.memory.take(), self.home.take()) {
            home.give_back(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_aligned_owned_and_return_their_buffer() {
        let pool = Pool::new(1 << 20, 2);
        let mut buf = pool.take();
        for len in [1usize, COPY_LIMIT, COPY_LIMIT + 1, 1 << 20] {
            let at = IN_HEADER_LEN + WRITE_IN_LEN;
            buf.space()[at..at + len].fill(len as u8);
            let payload = buf.take_payload(at..at + len);
            buf.space().fill(0xee);
            assert_eq!(payload.len(), len);
            assert_eq!(payload.as_ptr() as usize % ALIGN, 0);
            assert!(payload.iter().all(|&b| b == len as u8));
        }
        assert_eq!(pool.free.lock().len(), 1, "one spare buffer serves all large payloads in turn");
    }

    #[test]
    fn the_pool_does_not_grow_without_bound() {
        let pool = Pool::new(1 << 20, 2);
        let mut buf = pool.take();
        let held: Vec<_> = (0..5).map(|_| buf.take_payload(0..1 << 20)).collect();
        drop(held);
        assert_eq!(pool.free.lock().len(), 2);
    }
}
