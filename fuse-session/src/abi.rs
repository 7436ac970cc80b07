//! The numbers of the FUSE protocol, and the two headers every message starts with.
//!
//! Source: the kernel's public `include/uapi/linux/fuse.h`, protocol 7.45. All integers are in host byte order.

/// Protocol major version. The kernel has only ever had this one.
pub const MAJOR: u32 = 7;
/// The newest minor version that this crate speaks.
pub const MINOR: u32 = 45;
/// The oldest minor version that this crate accepts (Linux 5.4).
pub const MINOR_MIN: u32 = 31;
/// Minor version that has NOTIFY_INC_EPOCH (Linux 6.16).
pub const MINOR_INC_EPOCH: u32 = 44;
/// Minor version that has NOTIFY_PRUNE (Linux 6.18).
pub const MINOR_PRUNE: u32 = 45;

/// The nodeid of the root directory.
pub const ROOT_ID: u64 = 1;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const GETLK: u32 = 31;
pub const SETLK: u32 = 32;
pub const SETLKW: u32 = 33;
pub const ACCESS: u32 = 34;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const BMAP: u32 = 37;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const POLL: u32 = 40;
pub const NOTIFY_REPLY: u32 = 41;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
pub const STATX: u32 = 52;
pub const COPY_FILE_RANGE_64: u32 = 53;

pub const NOTIFY_POLL: i32 = 1;
pub const NOTIFY_INVAL_INODE: i32 = 2;
pub const NOTIFY_INVAL_ENTRY: i32 = 3;
pub const NOTIFY_STORE: i32 = 4;
pub const NOTIFY_DELETE: i32 = 6;
pub const NOTIFY_INC_EPOCH: i32 = 8;
pub const NOTIFY_PRUNE: i32 = 9;

/// NOTIFY_INVAL_ENTRY flag: let the entry's TTL run out instead of dropping the entry.
pub const EXPIRE_ONLY: u32 = 1;

/// OPEN answer: bypass the page cache.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// OPEN answer: keep the pages that the kernel already caches.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// OPEN answer: the file has no position.
pub const FOPEN_NONSEEKABLE: u32 = 1 << 2;
/// OPENDIR answer: the kernel may cache the listing.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// OPEN answer: stream-like, no position at all.
pub const FOPEN_STREAM: u32 = 1 << 4;
/// OPEN answer: no FLUSH at close.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// OPEN answer: direct writes to one file may run at the same time.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// `open_flags` of OPEN and CREATE: the open truncates and must clear the suid and sgid bits.
pub const OPEN_KILL_SUIDGID: u32 = 1;

/// `write_flags`: a delayed write from the page cache; the file handle is a guess.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `write_flags`: `lock_owner` holds.
pub const WRITE_LOCKOWNER: u32 = 1 << 1;
/// `write_flags`: clear the suid and sgid bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// `setxattr_flags`: setting the access ACL must clear the sgid bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;

pub(crate) const GETATTR_FH: u32 = 1;
pub(crate) const READ_LOCKOWNER: u32 = 1 << 1;
pub(crate) const LK_FLOCK: u32 = 1;
pub(crate) const RELEASE_FLUSH: u32 = 1 << 0;
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
pub(crate) const FSYNC_FDATASYNC: u32 = 1;

pub(crate) const FATTR_MODE: u32 = 1 << 0;
pub(crate) const FATTR_UID: u32 = 1 << 1;
pub(crate) const FATTR_GID: u32 = 1 << 2;
pub(crate) const FATTR_SIZE: u32 = 1 << 3;
pub(crate) const FATTR_ATIME: u32 = 1 << 4;
pub(crate) const FATTR_MTIME: u32 = 1 << 5;
pub(crate) const FATTR_FH: u32 = 1 << 6;
pub(crate) const FATTR_ATIME_NOW: u32 = 1 << 7;
pub(crate) const FATTR_MTIME_NOW: u32 = 1 << 8;
pub(crate) const FATTR_LOCKOWNER: u32 = 1 << 9;
pub(crate) const FATTR_CTIME: u32 = 1 << 10;
pub(crate) const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// Request extension: the caller's supplementary groups that matter (CREATE_SUPP_GROUP).
pub(crate) const EXT_GROUPS: u32 = 32;

/// `_IOR(229, 0, u32)`: attach a freshly opened /dev/fuse to an existing connection.
pub(crate) const DEV_IOC_CLONE: u64 = 0x8004_e500;

/// Commands of io_uring on /dev/fuse.
pub(crate) const URING_REGISTER: u32 = 1;
pub(crate) const URING_COMMIT_AND_FETCH: u32 = 2;
/// The headers of a ring entry: those of request or answer, then the first argument of the request, then 32 bytes of
/// which commit id 8 is at 8 and payload size 4 at 16.
pub(crate) const URING_HEADERS_LEN: usize = URING_ENTRY_AT + 32;
pub(crate) const URING_OP_AT: usize = 128;
pub(crate) const URING_ENTRY_AT: usize = 256;

/// Length of [`InHeader`] on the wire.
pub(crate) const IN_HEADER_LEN: usize = 40;
/// Length of the fixed part of a WRITE request, so that header plus this is where the payload starts.
pub(crate) const WRITE_IN_LEN: usize = 40;
/// Length of an answer's header.
pub(crate) const OUT_HEADER_LEN: usize = 16;

/// A message is shorter than its opcode demands, or holds a value outside the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed message from the kernel: {0}")]
pub struct Malformed(pub &'static str);

/// Reads the fields of a message in order; every read checks the length.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Fields { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.rest.split_at_checked(len).ok_or(Malformed("too short"))?;
        self.rest = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.rest.split_first_chunk::<N>().ok_or(Malformed("too short"))?;
        self.rest = tail;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_ne_bytes)
    }

    pub(crate) fn skip(&mut self, len: usize) -> Result<(), Malformed> {
        self.bytes(len).map(|_| ())
    }

    /// A name that ends with NUL; the NUL is consumed and not returned.
    pub(crate) fn name(&mut self) -> Result<Vec<u8>, Malformed> {
        let end = self.rest.iter().position(|&b| b == 0).ok_or(Malformed("name without NUL"))?;
        let name = self.bytes(end)?.to_vec();
        self.skip(1)?;
        Ok(name)
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }
}

/// The head of every request.
///
/// | offset | size | field                                               |
/// |--------|------|-----------------------------------------------------|
/// | 0      | 4    | len: of the whole message                           |
/// | 4      | 4    | opcode                                              |
/// | 8      | 8    | unique                                              |
/// | 16     | 8    | nodeid                                              |
/// | 24     | 4    | uid                                                 |
/// | 28     | 4    | gid                                                 |
/// | 32     | 4    | pid                                                 |
/// | 36     | 2    | total_extlen: extensions at the end, in 8-byte units|
/// | 38     | 2    | padding                                             |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub ext_len: usize,
}

impl InHeader {
    pub(crate) fn decode(message: &[u8]) -> Result<InHeader, Malformed> {
        let mut f = Fields::new(message);
        let header = InHeader {
            len: f.u32()?,
            opcode: f.u32()?,
            unique: f.u64()?,
            nodeid: f.u64()?,
            uid: f.u32()?,
            gid: f.u32()?,
            pid: f.u32()?,
            ext_len: usize::from(f.u16()?) * 8,
        };
        f.skip(2)?;
        if header.len as usize != message.len() {
            return Err(Malformed("length field does not match the message"));
        }
        Ok(header)
    }
}

/// The head of every answer and notification.
///
/// | offset | size | field                                                               |
/// |--------|------|---------------------------------------------------------------------|
/// | 0      | 4    | len: of the whole message                                           |
/// | 4      | 4    | error: 0 or a negative errno; in a notification its code            |
/// | 8      | 8    | unique: of the request; 0 in a notification                         |
pub(crate) fn out_header(body_len: usize, error: i32, unique: u64) -> [u8; OUT_HEADER_LEN] {
    let mut out = [0; OUT_HEADER_LEN];
    out[0..4].copy_from_slice(&((OUT_HEADER_LEN + body_len) as u32).to_ne_bytes());
    out[4..8].copy_from_slice(&error.to_ne_bytes());
    out[8..16].copy_from_slice(&unique.to_ne_bytes());
    out
}

/// Builds a fixed-size message part field by field.
pub(crate) struct Put<const N: usize> {
    out: [u8; N],
    at: usize,
}

impl<const N: usize> Put<N> {
    pub(crate) fn new() -> Self {
        Put { out: [0; N], at: 0 }
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    pub(crate) fn u16(self, v: u16) -> Self {
        self.raw(&v.to_ne_bytes())
    }

    pub(crate) fn u32(self, v: u32) -> Self {
        self.raw(&v.to_ne_bytes())
    }

    pub(crate) fn i32(self, v: i32) -> Self {
        self.raw(&v.to_ne_bytes())
    }

    pub(crate) fn u64(self, v: u64) -> Self {
        self.raw(&v.to_ne_bytes())
    }

    pub(crate) fn i64(self, v: i64) -> Self {
        self.raw(&v.to_ne_bytes())
    }

    pub(crate) fn bytes(self, v: &[u8]) -> Self {
        self.raw(v)
    }

    /// The finished part; fields not put are zero.
    pub(crate) fn done(self) -> [u8; N] {
        self.out
    }
}
