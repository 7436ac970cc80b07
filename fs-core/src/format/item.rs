//! Items of a domain's tree: keys, inodes, extents, directory entries, extended attributes.
//!
//! A key is (object, kind, offset), ordered as written. `object` is the local number of an inode of this domain, or 0 for the
//! domain's own records; so everything of one inode lies together, and an inode's extents in file order.
//!
//! | kind | offset | value |
//! |------|--------|-------|
//! | 1 inode   | 0 | [`Inode`] |
//! | 2 xattr   | hash of the name << 8, plus piece | [`encode_xattr_piece`] |
//! | 3 inline  | piece number | file contents (one piece, files up to [`INLINE_MAX`]) or symlink target (pieces of [`PIECE_MAX`]) |
//! | 4 extent  | first file block | [`ExtentItem`] |
//! | 5 dirent  | cookie (hash of the name << 7, plus a free index) | [`Dirent`] |
//! | 6 orphan  | local number (object 0) | empty: an inode without a name that is still open somewhere |
//! | 7 deferred free | first block (object 0, slot domains only) | length in blocks, u64 |
//! | 8 domain with leftovers | domain number (object 0, slot domains only) | empty: may hold orphans of this slot's incarnation |
//! | 9 file lock | number of the entry (object 0) | as `format/file_lock.rs` says |

use super::bytes::{FormatError, Reader, Writer};

/// Files up to this many bytes live in the tree, not in blocks.
pub const INLINE_MAX: usize = 1024;
/// Longest value of one item in bytes.
pub const VALUE_MAX: usize = 1300;
/// Pieces of symlink targets and extended attributes.
pub const PIECE_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    Inode = 1,
    Xattr = 2,
    Inline = 3,
    Extent = 4,
    Dirent = 5,
    Orphan = 6,
    DeferredFree = 7,
    Leftover = 8,
    FileLock = 9,
}

/// Encoded size of a key: object (8), kind (1), offset (8), big endian so that bytes compare as keys do.
pub const KEY_SIZE: usize = 17;

/// `kind` stays a number here: a damaged tree may hold any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub object: u64,
    pub kind: u8,
    pub offset: u64,
}

impl Key {
    pub const MIN: Key = Key { object: 0, kind: 0, offset: 0 };
    pub const MAX: Key = Key { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    pub fn new(object: u64, kind: Kind, offset: u64) -> Self {
        Self { object, kind: kind as u8, offset }
    }

    pub fn encode(&self) -> [u8; KEY_SIZE] {
        let mut b = [0; KEY_SIZE];
        b[..8].copy_from_slice(&self.object.to_be_bytes());
        b[8] = self.kind;
        b[9..].copy_from_slice(&self.offset.to_be_bytes());
        b
    }

    /// `b` is KEY_SIZE bytes; shorter input gives `None`.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let object = u64::from_be_bytes(b.get(..8)?.try_into().ok()?);
        let offset = u64::from_be_bytes(b.get(9..17)?.try_into().ok()?);
        Some(Self { object, kind: b[8], offset })
    }
}

/// Nanosecond time since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    pub secs: i64,
    pub nanos: u32,
}

/// An inode: 112 bytes.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// | 0  | 4 | mode (type and permissions, as st_mode) |
/// | 4  | 4 | uid |
/// | 8  | 4 | gid |
/// | 12 | 4 | links |
/// | 16 | 8 | size in bytes; of a directory: number of entries |
/// | 24 | 8 | blocks allocated to contents |
/// | 32 | 12 | atime: seconds (i64), nanoseconds (u32) |
/// | 44 | 12 | mtime |
/// | 56 | 12 | ctime |
/// | 68 | 12 | time of birth |
/// | 80 | 8 | device number of a device node |
/// | 88 | 8 | of a directory: inode number of its parent |
/// | 96 | 4 | flags: 1 contents are inline |
/// | 100 | 4 | of a directory: subdirectories |
/// | 104 | 8 | generation: the domain's tenure in which the inode was made; (inode number, generation) is never used again, though a number is when a crash undid its first use, and a domain number is (I8) |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inode {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    pub size: u64,
    pub blocks: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Time,
    pub rdev: u64,
    pub parent: u64,
    pub flags: u32,
    pub subdirs: u32,
    pub generation: u64,
}

pub const INODE_SIZE: usize = 112;
pub const FLAG_INLINE: u32 = 1;

impl Inode {
    pub fn encode(&self) -> [u8; INODE_SIZE] {
        let mut b = [0; INODE_SIZE];
        let mut w = Writer::new(&mut b);
        w.u32(self.mode).u32(self.uid).u32(self.gid).u32(self.links).u64(self.size).u64(self.blocks);
        for t in [self.atime, self.mtime, self.ctime, self.btime] {
            w.i64(t.secs).u32(t.nanos);
        }
        w.u64(self.rdev).u64(self.parent).u32(self.flags).u32(self.subdirs).u64(self.generation);
        b
    }

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("inode", b);
        let (mode, uid, gid, links) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let (size, blocks) = (r.u64()?, r.u64()?);
        let mut times = [Time::default(); 4];
        for t in &mut times {
            *t = Time { secs: r.i64()?, nanos: r.u32()? };
        }
        let [atime, mtime, ctime, btime] = times;
        let (rdev, parent, flags, subdirs, generation) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?, r.u64()?);
        Ok(Self {
            mode,
            uid,
            gid,
            links,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            btime,
            rdev,
            parent,
            flags,
            subdirs,
            generation,
        })
    }

    pub fn is_dir(&self) -> bool {
        self.mode & mode_bits::S_IFMT == mode_bits::S_IFDIR
    }
    pub fn is_file(&self) -> bool {
        self.mode & mode_bits::S_IFMT == mode_bits::S_IFREG
    }
    pub fn is_symlink(&self) -> bool {
        self.mode & mode_bits::S_IFMT == mode_bits::S_IFLNK
    }
    pub fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE != 0
    }
}

/// File type bits of st_mode, fixed by POSIX practice and stored on disk.
pub mod mode_bits {
    pub const S_IFMT: u32 = 0o170000;
    pub const S_IFSOCK: u32 = 0o140000;
    pub const S_IFLNK: u32 = 0o120000;
    pub const S_IFREG: u32 = 0o100000;
    pub const S_IFBLK: u32 = 0o060000;
    pub const S_IFDIR: u32 = 0o040000;
    pub const S_IFCHR: u32 = 0o020000;
    pub const S_IFIFO: u32 = 0o010000;
}

/// Value of an extent item: start block (8), length in blocks (4), flags (4; 1 = allocated but not written, reads as zeros).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentItem {
    pub start: u64,
    pub len: u32,
    pub unwritten: bool,
}

impl ExtentItem {
    pub fn encode(&self) -> [u8; 16] {
        let mut b = [0; 16];
        Writer::new(&mut b).u64(self.start).u32(self.len).u32(u32::from(self.unwritten));
        b
    }

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("extent", b);
        let (start, len, flags) = (r.u64()?, r.u32()?, r.u32()?);
        if len == 0 {
            return Err(FormatError::new("extent", "empty"));
        }
        Ok(Self { start, len, unwritten: flags & 1 != 0 })
    }
}

/// Value of a directory entry: inode number (8), type (1: st_mode >> 12), name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    pub ino: u64,
    pub file_type: u8,
    pub name: Vec<u8>,
}

impl Dirent {
    pub fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; 9 + self.name.len()];
        Writer::new(&mut b).u64(self.ino).u8(self.file_type).bytes(&self.name);
        b
    }

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("directory entry", b);
        let (ino, file_type) = (r.u64()?, r.u8()?);
        let name = r.rest().to_vec();
        if name.is_empty() || name.len() > 255 || name.contains(&b'/') || name.contains(&0) {
            return Err(FormatError::new("directory entry", "bad name"));
        }
        Ok(Self { ino, file_type, name })
    }
}

/// Cookies are hash << INDEX_BITS | index; names whose hashes collide take different indexes.
pub const INDEX_BITS: u32 = 7;
/// Largest index: this many more names may share one 56-bit hash.
pub const INDEX_MAX: u64 = (1 << INDEX_BITS) - 1;

/// The smallest cookie a name can have. Cookies fit in 63 bits and are at least 128, so that 0, 1 and 2 are free for
/// the start, "." and "..".
pub fn name_cookie(name: &[u8]) -> u64 {
    let h = blake3::hash(name);
    let mut v = [0; 8];
    v.copy_from_slice(&h.as_bytes()[..8]);
    (u64::from_le_bytes(v) >> 8).max(1) << INDEX_BITS
}

/// First key offset of an extended attribute's pieces.
pub fn xattr_offset(name: &[u8]) -> u64 {
    let h = blake3::hash(name);
    let mut v = [0; 8];
    v.copy_from_slice(&h.as_bytes()[..8]);
    u64::from_le_bytes(v) & !0xff
}

/// One piece of an extended attribute: length of the name (1), number of pieces (1), name, bytes of the value.
pub fn encode_xattr_piece(name: &[u8], pieces: u8, value: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 2 + name.len() + value.len()];
    Writer::new(&mut b).u8(name.len() as u8).u8(pieces).bytes(name).bytes(value);
    b
}

/// (name, number of pieces, bytes of the value)
pub fn decode_xattr_piece(b: &[u8]) -> Result<(&[u8], u8, &[u8]), FormatError> {
    let mut r = Reader::new("extended attribute", b);
    let n = r.u8()?;
    let pieces = r.u8()?;
    let name = r.bytes(n.into())?;
    Ok((name, pieces, r.rest()))
}

/// Bits of an inode number that count within the domain.
pub const LOCAL_BITS: u32 = 40;

/// An inode number: domain (24 bits), local number (40 bits).
pub fn ino(domain: u32, local: u64) -> u64 {
    u64::from(domain) << LOCAL_BITS | local
}
pub fn ino_domain(ino: u64) -> u32 {
    (ino >> LOCAL_BITS) as u32
}
pub fn ino_local(ino: u64) -> u64 {
    ino & ((1 << LOCAL_BITS) - 1)
}
/// The directory that a domain was made for has this local number.
pub const DIR_LOCAL: u64 = 1;
