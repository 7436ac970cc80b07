//! Buffers for READDIR and READDIRPLUS answers: entries until the kernel's size limit is reached.

use crate::types::EntryOut;

const DIRENT_LEN: usize = 24;

fn padding(len: usize) -> usize {
    len.next_multiple_of(8) - len
}

/// Appends one entry if it fits in `limit`: ino 8, offset 8, name length 4, type 4, name, zeros to a multiple of 8.
fn push(out: &mut Vec<u8>, limit: usize, head: &[u8], ino: u64, next_offset: u64, dtype: u8, name: &[u8]) -> bool {
    let len = head.len() + DIRENT_LEN + name.len();
    let pad = padding(len);
    if out.len() + len + pad > limit {
        return false;
    }
    out.extend_from_slice(head);
    out.extend_from_slice(&ino.to_ne_bytes());
    out.extend_from_slice(&next_offset.to_ne_bytes());
    out.extend_from_slice(&(name.len() as u32).to_ne_bytes());
    out.extend_from_slice(&u32::from(dtype).to_ne_bytes());
    out.extend_from_slice(name);
    out.resize(out.len() + pad, 0);
    true
}

/// The answer to READDIR.
#[derive(Debug)]
pub struct DirBuffer {
    out: Vec<u8>,
    limit: usize,
}

impl DirBuffer {
    /// `size` is the request's.
    pub fn new(size: u32) -> DirBuffer {
        DirBuffer { out: Vec::with_capacity((size as usize).min(1 << 16)), limit: size as usize }
    }

    /// Adds an entry; false says that it did not fit and the buffer is as before. `next_offset` is what the kernel
    /// asks for to continue after this entry; `dtype` is one of `libc::DT_*`.
    #[must_use]
    pub fn push(&mut self, ino: u64, next_offset: u64, dtype: u8, name: &[u8]) -> bool {
        push(&mut self.out, self.limit, &[], ino, next_offset, dtype, name)
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.out
    }
}

/// The answer to READDIRPLUS.
///
/// Every entry pushed with a nodeid other than 0 counts as one lookup of that node, except `.` and `..`, which the
/// kernel does not count.
#[derive(Debug)]
pub struct DirPlusBuffer {
    out: Vec<u8>,
    limit: usize,
}

impl DirPlusBuffer {
    /// `size` is the request's.
    pub fn new(size: u32) -> DirPlusBuffer {
        DirPlusBuffer { out: Vec::with_capacity((size as usize).min(1 << 16)), limit: size as usize }
    }

    /// Adds an entry; false says that it did not fit and the buffer is as before: then the lookup does not count.
    /// An `entry` with nodeid 0 gives only name, inode number and type, as READDIR does.
    #[must_use]
    pub fn push(&mut self, entry: &EntryOut, ino: u64, next_offset: u64, dtype: u8, name: &[u8]) -> bool {
        push(&mut self.out, self.limit, &entry.encode(), ino, next_offset, dtype, name)
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_never_exceed_the_limit() {
        let mut buf = DirBuffer::new(64);
        assert!(buf.push(7, 1, libc::DT_REG, b"abc"));
        assert_eq!(buf.bytes().len(), 32);
        assert!(buf.push(8, 2, libc::DT_DIR, b"12345678"));
        assert_eq!(buf.bytes().len(), 64);
        assert!(!buf.push(9, 3, libc::DT_DIR, b""));
        let mut expected = Vec::new();
        expected.extend_from_slice(&7u64.to_ne_bytes());
        expected.extend_from_slice(&1u64.to_ne_bytes());
        expected.extend_from_slice(&3u32.to_ne_bytes());
        expected.extend_from_slice(&8u32.to_ne_bytes());
        expected.extend_from_slice(b"abc\0\0\0\0\0");
        assert_eq!(&buf.bytes()[..32], expected.as_slice());
    }

    #[test]
    fn a_plus_entry_starts_with_the_entry() {
        let mut buf = DirPlusBuffer::new(128 + 24 + 8);
        let entry = EntryOut { nodeid: 42, ..EntryOut::default() };
        assert!(!buf.push(&entry, 1, 1, libc::DT_REG, b"ninechars"));
        assert!(buf.is_empty());
        assert!(buf.push(&entry, 1, 1, libc::DT_REG, b"x"));
        assert_eq!(&buf.bytes()[..8], &42u64.to_ne_bytes());
        assert_eq!(buf.bytes().len(), 160);
    }
}
