//! Attributes, directory entries, locks and filesystem totals, each with its wire form beside it.

use std::time::Duration;

use crate::abi::{Fields, Malformed, Put};

/// A point in time as the kernel counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Time {
    pub sec: i64,
    pub nsec: u32,
}

/// The attributes of a node.
///
/// | offset | size | field     | offset | size | field     |
/// |--------|------|-----------|--------|------|-----------|
/// | 0      | 8    | ino       | 56     | 4    | ctimensec |
/// | 8      | 8    | size      | 60     | 4    | mode      |
/// | 16     | 8    | blocks    | 64     | 4    | nlink     |
/// | 24     | 8    | atime     | 68     | 4    | uid       |
/// | 32     | 8    | mtime     | 72     | 4    | gid       |
/// | 40     | 8    | ctime     | 76     | 4    | rdev      |
/// | 48     | 4    | atimensec | 80     | 4    | blksize   |
/// | 52     | 4    | mtimensec | 84     | 4    | flags (0) |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    /// Type and permission bits.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
}

pub(crate) const ATTR_LEN: usize = 88;
pub(crate) const ENTRY_LEN: usize = 40 + ATTR_LEN;

impl Attr {
    pub(crate) fn encode(&self) -> [u8; ATTR_LEN] {
        Put::new()
            .u64(self.ino)
            .u64(self.size)
            .u64(self.blocks)
            .i64(self.atime.sec)
            .i64(self.mtime.sec)
            .i64(self.ctime.sec)
            .u32(self.atime.nsec)
            .u32(self.mtime.nsec)
            .u32(self.ctime.nsec)
            .u32(self.mode)
            .u32(self.nlink)
            .u32(self.uid)
            .u32(self.gid)
            .u32(self.rdev)
            .u32(self.blksize)
            .u32(0)
            .done()
    }

    /// The body of a GETATTR or SETATTR answer: TTL (8 seconds, 4 nanoseconds), 4 padding, attributes.
    pub(crate) fn encode_with_ttl(&self, valid: Duration) -> [u8; 16 + ATTR_LEN] {
        Put::new().u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0).bytes(&self.encode()).done()
    }
}

/// What a name stands for, and for how long the kernel may believe it.
///
/// | offset | size | field            |
/// |--------|------|------------------|
/// | 0      | 8    | nodeid           |
/// | 8      | 8    | generation       |
/// | 16     | 8    | entry_valid      |
/// | 24     | 8    | attr_valid       |
/// | 32     | 4    | entry_valid_nsec |
/// | 36     | 4    | attr_valid_nsec  |
/// | 40     | 88   | attr             |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EntryOut {
    /// 0 says that the name does not exist, and lets the kernel remember that for `entry_valid`.
    pub nodeid: u64,
    pub generation: u64,
    pub entry_valid: Duration,
    pub attr_valid: Duration,
    pub attr: Attr,
}

impl EntryOut {
    /// "No such name", to be remembered for `valid`.
    pub fn negative(valid: Duration) -> EntryOut {
        EntryOut { entry_valid: valid, ..EntryOut::default() }
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        Put::new()
            .u64(self.nodeid)
            .u64(self.generation)
            .u64(self.entry_valid.as_secs())
            .u64(self.attr_valid.as_secs())
            .u32(self.entry_valid.subsec_nanos())
            .u32(self.attr_valid.subsec_nanos())
            .bytes(&self.attr.encode())
            .done()
    }
}

/// Totals of the filesystem.
///
/// blocks, bfree, bavail, files, ffree (8 each, from 0), bsize, namelen, frsize, padding (4 each, from 40),
/// 24 bytes spare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statfs {
    /// In units of `frsize`, like `bfree` and `bavail`.
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub namelen: u32,
    pub frsize: u32,
}

impl Statfs {
    pub(crate) fn encode(&self) -> [u8; 80] {
        Put::new()
            .u64(self.blocks)
            .u64(self.bfree)
            .u64(self.bavail)
            .u64(self.files)
            .u64(self.ffree)
            .u32(self.bsize)
            .u32(self.namelen)
            .u32(self.frsize)
            .done()
    }
}

/// Extended attributes of a node in the sense of statx(2).
///
/// mask 0, blksize 4, attributes 8, nlink 16, uid 20, gid 24, mode 28 (2 bytes, 2 spare), ino 32, size 40, blocks 48,
/// attributes_mask 56, atime 64, btime 80, ctime 96, mtime 112 (each 8 seconds, 4 nanoseconds, 4 spare),
/// rdev major 128, rdev minor 132, dev major 136, dev minor 140, spare to 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statx {
    /// `STATX_*` bits of the fields that hold.
    pub mask: u32,
    pub blksize: u32,
    /// `STATX_ATTR_*` bits.
    pub attributes: u64,
    pub attributes_mask: u64,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: Time,
    pub btime: Time,
    pub ctime: Time,
    pub mtime: Time,
    pub rdev: (u32, u32),
}

impl Statx {
    /// The body of a STATX answer: TTL (8 + 4), flags 4, spare 16, then the fields above.
    pub(crate) fn encode_with_ttl(&self, valid: Duration) -> [u8; 288] {
        let head = Put::<288>::new().u64(valid.as_secs()).u32(valid.subsec_nanos()).bytes(&[0; 20]);
        let body = head
            .u32(self.mask)
            .u32(self.blksize)
            .u64(self.attributes)
            .u32(self.nlink)
            .u32(self.uid)
            .u32(self.gid)
            .u16(self.mode as u16)
            .u16(0)
            .u64(self.ino)
            .u64(self.size)
            .u64(self.blocks)
            .u64(self.attributes_mask);
        [self.atime, self.btime, self.ctime, self.mtime]
            .into_iter()
            .fold(body, |put, t| put.i64(t.sec).u32(t.nsec).u32(0))
            .u32(self.rdev.0)
            .u32(self.rdev.1)
            .done()
    }
}

/// Kind of a file lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    Read,
    Write,
    Unlock,
}

/// A lock on a byte range.
///
/// | offset | size | field                                     |
/// |--------|------|-------------------------------------------|
/// | 0      | 8    | start                                     |
/// | 8      | 8    | end, inclusive; `i64::MAX` is end of file |
/// | 16     | 4    | type: F_RDLCK 0, F_WRLCK 1, F_UNLCK 2     |
/// | 20     | 4    | pid                                       |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileLock {
    pub start: u64,
    /// Inclusive.
    pub end: u64,
    pub kind: LockKind,
    pub pid: u32,
}

impl FileLock {
    pub(crate) fn decode(f: &mut Fields<'_>) -> Result<FileLock, Malformed> {
        let (start, end) = (f.u64()?, f.u64()?);
        let kind = match f.u32()? as i32 {
            libc::F_RDLCK => LockKind::Read,
            libc::F_WRLCK => LockKind::Write,
            libc::F_UNLCK => LockKind::Unlock,
            _ => return Err(Malformed("unknown lock type")),
        };
        Ok(FileLock { start, end, kind, pid: f.u32()? })
    }

    pub(crate) fn encode(&self) -> [u8; 24] {
        let kind = match self.kind {
            LockKind::Read => libc::F_RDLCK,
            LockKind::Write => libc::F_WRLCK,
            LockKind::Unlock => libc::F_UNLCK,
        };
        Put::new().u64(self.start).u64(self.end).i32(kind).u32(self.pid).done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn an_entry_has_every_field_at_the_documented_offset() {
        let t = |n| Time { sec: n, nsec: n as u32 + 1000 };
        let attr = Attr {
            ino: 11,
            size: 12,
            blocks: 13,
            atime: t(14),
            mtime: t(15),
            ctime: t(16),
            mode: 17,
            nlink: 18,
            uid: 19,
            gid: 20,
            rdev: 21,
            blksize: 22,
        };
        let entry = EntryOut {
            nodeid: 1,
            generation: 2,
            entry_valid: Duration::new(3, 5),
            attr_valid: Duration::new(4, 6),
            attr,
        };
        let b = entry.encode();
        assert_eq!([0, 8, 16, 24].map(|at| u64_at(&b, at)), [1, 2, 3, 4]);
        assert_eq!([32, 36].map(|at| u32_at(&b, at)), [5, 6]);
        assert_eq!([0, 8, 16, 24, 32, 40].map(|at| u64_at(&b, 40 + at)), [11, 12, 13, 14, 15, 16]);
        assert_eq!(
            [48, 52, 56, 60, 64, 68, 72, 76, 80, 84].map(|at| u32_at(&b, 40 + at)),
            [1014, 1015, 1016, 17, 18, 19, 20, 21, 22, 0]
        );
    }

    #[test]
    fn statx_has_every_field_at_the_documented_offset() {
        let t = |n| Time { sec: n, nsec: n as u32 + 1000 };
        let x = Statx {
            mask: 1,
            blksize: 2,
            attributes: 3,
            attributes_mask: 4,
            nlink: 5,
            uid: 6,
            gid: 7,
            mode: 8,
            ino: 9,
            size: 10,
            blocks: 11,
            atime: t(12),
            btime: t(13),
            ctime: t(14),
            mtime: t(15),
            rdev: (16, 17),
        };
        let b = x.encode_with_ttl(Duration::new(21, 22));
        assert_eq!((u64_at(&b, 0), u32_at(&b, 8)), (21, 22));
        let s = &b[32..];
        assert_eq!([0, 4, 16, 20, 24, 28, 128, 132].map(|at| u32_at(s, at)), [1, 2, 5, 6, 7, 8, 16, 17]);
        assert_eq!([8, 32, 40, 48, 56].map(|at| u64_at(s, at)), [3, 9, 10, 11, 4]);
        assert_eq!([64, 80, 96, 112].map(|at| u64_at(s, at)), [12, 13, 14, 15]);
        assert_eq!([72, 88, 104, 120].map(|at| u32_at(s, at)), [1012, 1013, 1014, 1015]);
    }

    #[test]
    fn a_lock_survives_the_wire_and_an_unknown_kind_is_refused() {
        for kind in [LockKind::Read, LockKind::Write, LockKind::Unlock] {
            let lock = FileLock { start: 5, end: i64::MAX as u64, kind, pid: 77 };
            assert_eq!(FileLock::decode(&mut Fields::new(&lock.encode())), Ok(lock));
        }
        let mut bytes = FileLock { start: 0, end: 0, kind: LockKind::Read, pid: 0 }.encode();
        bytes[16..20].copy_from_slice(&9u32.to_ne_bytes());
        assert!(FileLock::decode(&mut Fields::new(&bytes)).is_err());
    }
}
