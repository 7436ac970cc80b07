//! From the kernel's bytes to a plain, owned [`Request`]. Every field is read with a length check: short or odd input is
//! an error, never a panic.
//!
//! The layouts follow `include/uapi/linux/fuse.h`; each arm of `parse_op` reads the fields in wire order, so that the
//! arm is the layout.

use std::ops::Range;

use crate::abi::{self, Fields, InHeader, Malformed};
use crate::buffer::Payload;
use crate::types::{FileLock, Time};

/// One request of the kernel, with the caller's identity.
#[derive(Debug)]
pub struct Request {
    pub unique: u64,
    /// The node the operation is about; for operations on names the directory.
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    /// With CREATE_SUPP_GROUP: the parent directory's group if the caller is in it. Else empty.
    pub groups: Vec<u32>,
    pub op: Op,
}

impl Request {
    /// A whole message in the newest layouts; `None` if it is none for the handler. For other transports and for tests.
    pub fn parse(message: &[u8]) -> Result<Option<Request>, Malformed> {
        let header = InHeader::decode(message)?;
        let Message::Request(mut request, payload) = parse(&header, message, Dialect { setxattr_ext: true })? else {
            return Ok(None);
        };
        if let (Op::Write { data, .. }, Some(at)) = (&mut request.op, payload) {
            *data = Payload::copy_of(message.get(at).unwrap_or_default());
        }
        Ok(Some(request))
    }
}

/// The kernel gives up `nlookup` of its references to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forget {
    pub nodeid: u64,
    pub nlookup: u64,
}

/// A timestamp to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The server's present time.
    Now,
    At(Time),
}

/// What SETATTR changes; None leaves a field as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Setattr {
    pub fh: Option<u64>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<Time>,
    pub lock_owner: Option<u64>,
    /// The suid and sgid bits must be cleared along with a truncation.
    pub kill_suidgid: bool,
}

/// What is asked for. Names come without the NUL. `flags` of open files are those of open(2).
///
/// FORGET, INIT, INTERRUPT and DESTROY never get here: the session handles them.
#[derive(Debug)]
pub enum Op {
    Lookup {
        name: Vec<u8>,
    },
    Getattr {
        fh: Option<u64>,
    },
    Setattr(Setattr),
    Readlink,
    Symlink {
        name: Vec<u8>,
        target: Vec<u8>,
    },
    Mknod {
        name: Vec<u8>,
        mode: u32,
        rdev: u32,
        umask: u32,
    },
    Mkdir {
        name: Vec<u8>,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Vec<u8>,
    },
    Rmdir {
        name: Vec<u8>,
    },
    /// RENAME and RENAME2; `flags` is of renameat2(2).
    Rename {
        name: Vec<u8>,
        newdir: u64,
        newname: Vec<u8>,
        flags: u32,
    },
    /// A new name in the request's node for the node `oldnode`.
    Link {
        oldnode: u64,
        newname: Vec<u8>,
    },
    /// `open_flags`: [`abi::OPEN_KILL_SUIDGID`].
    Open {
        flags: u32,
        open_flags: u32,
    },
    Create {
        name: Vec<u8>,
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    },
    /// An unnamed file, to be given a name by LINK or to vanish.
    Tmpfile {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
        lock_owner: Option<u64>,
        flags: u32,
    },
    /// `write_flags`: [`abi::WRITE_CACHE`] and its kin.
    Write {
        fh: u64,
        offset: u64,
        write_flags: u32,
        lock_owner: Option<u64>,
        flags: u32,
        data: Payload,
    },
    Statfs,
    Release {
        fh: u64,
        flags: u32,
        flush: bool,
        lock_owner: u64,
        /// The flock locks of this open file end with it.
        flock_release: bool,
    },
    Fsync {
        fh: u64,
        datasync: bool,
    },
    Flush {
        fh: u64,
        lock_owner: u64,
    },
    Opendir {
        flags: u32,
        open_flags: u32,
    },
    Readdir {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Readdirplus {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Releasedir {
        fh: u64,
        flags: u32,
    },
    Fsyncdir {
        fh: u64,
        datasync: bool,
    },
    /// `flags` is of setxattr(2), `setxattr_flags` is [`abi::SETXATTR_ACL_KILL_SGID`] (with SETXATTR_EXT).
    Setxattr {
        name: Vec<u8>,
        value: Vec<u8>,
        flags: u32,
        setxattr_flags: u32,
    },
    Getxattr {
        name: Vec<u8>,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: Vec<u8>,
    },
    Access {
        mask: u32,
    },
    Getlk {
        fh: u64,
        owner: u64,
        lock: FileLock,
        flock: bool,
    },
    /// Must not wait: EAGAIN if another owner is in the way.
    Setlk {
        fh: u64,
        owner: u64,
        lock: FileLock,
        flock: bool,
    },
    /// May wait; to be given up on interruption.
    Setlkw {
        fh: u64,
        owner: u64,
        lock: FileLock,
        flock: bool,
    },
    Bmap {
        block: u64,
        blocksize: u32,
    },
    Ioctl {
        fh: u64,
        flags: u32,
        cmd: u32,
        arg: u64,
        data: Vec<u8>,
        out_size: u32,
    },
    Poll {
        fh: u64,
        kh: u64,
        flags: u32,
        events: u32,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    /// Answer with [`Reply::copied`](crate::Reply::copied).
    CopyFileRange {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    },
    Statx {
        fh: Option<u64>,
        flags: u32,
        mask: u32,
    },
    Syncfs,
}

/// A message, told apart by who handles it.
#[derive(Debug)]
// A message lives on the reader's stack for one dispatch; a box would cost an allocation per request.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Message {
    /// For the handler. The range, if any, is where in the message the payload of a WRITE is.
    Request(Request, Option<Range<usize>>),
    Forget(Vec<Forget>),
    Interrupt {
        target: u64,
    },
    Destroy,
    /// An answer of the kernel to a notification that we never send, or a second INIT.
    Ignored,
    Unknown,
}

/// What the parser must know of the negotiation.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Dialect {
    pub setxattr_ext: bool,
}

/// Reads a whole message whose header is already decoded.
pub(crate) fn parse(header: &InHeader, message: &[u8], dialect: Dialect) -> Result<Message, Malformed> {
    let ext_at = message.len().checked_sub(header.ext_len).ok_or(Malformed("extensions longer than the message"))?;
    let body = message.get(abi::IN_HEADER_LEN..ext_at).ok_or(Malformed("too short"))?;
    let mut f = Fields::new(body);
    match header.opcode {
        abi::FORGET => return Ok(Message::Forget(vec![Forget { nodeid: header.nodeid, nlookup: f.u64()? }])),
        abi::BATCH_FORGET => return parse_batch_forget(&mut f),
        abi::INTERRUPT => return Ok(Message::Interrupt { target: f.u64()? }),
        abi::DESTROY => return Ok(Message::Destroy),
        abi::NOTIFY_REPLY | abi::INIT => return Ok(Message::Ignored),
        _ => {}
    }
    let mut payload = None;
    let Some(op) = parse_op(header.opcode, &mut f, body.len(), dialect, &mut payload)? else {
        return Ok(Message::Unknown);
    };
    let groups = parse_groups(message.get(ext_at..).unwrap_or_default())?;
    let request = Request {
        unique: header.unique,
        nodeid: header.nodeid,
        uid: header.uid,
        gid: header.gid,
        pid: header.pid,
        groups,
        op,
    };
    Ok(Message::Request(request, payload))
}

/// count 4, dummy 4, then nodeid 8 and nlookup 8 each.
fn parse_batch_forget(f: &mut Fields<'_>) -> Result<Message, Malformed> {
    let count = f.u32()? as usize;
    f.skip(4)?;
    if f.remaining() / 16 < count {
        return Err(Malformed("too short"));
    }
    let list = (0..count).map(|_| Ok(Forget { nodeid: f.u64()?, nlookup: f.u64()? })).collect::<Result<_, Malformed>>();
    Ok(Message::Forget(list?))
}

/// Extensions: size 4 (with this header, padded to 8), type 4, content. Groups: count 4, then 4 each.
fn parse_groups(ext: &[u8]) -> Result<Vec<u32>, Malformed> {
    let mut f = Fields::new(ext);
    let mut groups = Vec::new();
    while f.remaining() > 0 {
        let (size, kind) = (f.u32()? as usize, f.u32()?);
        let content = f.bytes(size.checked_sub(8).ok_or(Malformed("extension too short"))?)?;
        f.skip((size.next_multiple_of(8) - size).min(f.remaining()))?;
        if kind == abi::EXT_GROUPS {
            let mut g = Fields::new(content);
            for _ in 0..g.u32()? {
                groups.push(g.u32()?);
            }
        }
    }
    Ok(groups)
}

fn parse_op(
    opcode: u32,
    f: &mut Fields<'_>,
    body_len: usize,
    dialect: Dialect,
    payload: &mut Option<Range<usize>>,
) -> Result<Option<Op>, Malformed> {
    let op = match opcode {
        abi::LOOKUP => Op::Lookup { name: f.name()? },
        abi::GETATTR => {
            let flags = f.u32()?;
            f.skip(4)?;
            let fh = f.u64()?;
            Op::Getattr { fh: (flags & abi::GETATTR_FH != 0).then_some(fh) }
        }
        abi::SETATTR => Op::Setattr(parse_setattr(f)?),
        abi::READLINK => Op::Readlink,
        abi::SYMLINK => Op::Symlink { name: f.name()?, target: f.name()? },
        abi::MKNOD => {
            let (mode, rdev, umask) = (f.u32()?, f.u32()?, f.u32()?);
            f.skip(4)?;
            Op::Mknod { name: f.name()?, mode, rdev, umask }
        }
        abi::MKDIR => {
            let (mode, umask) = (f.u32()?, f.u32()?);
            Op::Mkdir { name: f.name()?, mode, umask }
        }
        abi::UNLINK => Op::Unlink { name: f.name()? },
        abi::RMDIR => Op::Rmdir { name: f.name()? },
        abi::RENAME => {
            let newdir = f.u64()?;
            Op::Rename { name: f.name()?, newdir, newname: f.name()?, flags: 0 }
        }
        abi::RENAME2 => {
            let (newdir, flags) = (f.u64()?, f.u32()?);
            f.skip(4)?;
            Op::Rename { name: f.name()?, newdir, newname: f.name()?, flags }
        }
        abi::LINK => Op::Link { oldnode: f.u64()?, newname: f.name()? },
        abi::OPEN => Op::Open { flags: f.u32()?, open_flags: f.u32()? },
        abi::OPENDIR => Op::Opendir { flags: f.u32()?, open_flags: f.u32()? },
        abi::CREATE => {
            let (flags, mode, umask, open_flags) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
            Op::Create { name: f.name()?, flags, mode, umask, open_flags }
        }
        abi::TMPFILE => Op::Tmpfile { flags: f.u32()?, mode: f.u32()?, umask: f.u32()?, open_flags: f.u32()? },
        abi::READ | abi::READDIR | abi::READDIRPLUS => {
            let (fh, offset, size, read_flags) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
            let (owner, flags) = (f.u64()?, f.u32()?);
            match opcode {
                abi::READ => {
                    let lock_owner = (read_flags & abi::READ_LOCKOWNER != 0).then_some(owner);
                    Op::Read { fh, offset, size, lock_owner, flags }
                }
                abi::READDIR => Op::Readdir { fh, offset, size },
                _ => Op::Readdirplus { fh, offset, size },
            }
        }
        abi::WRITE => {
            let (fh, offset, size, write_flags) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
            let (owner, flags) = (f.u64()?, f.u32()?);
            f.skip(4)?;
            if f.remaining() != size as usize {
                return Err(Malformed("write size does not match its data"));
            }
            let end = abi::IN_HEADER_LEN + body_len;
            *payload = Some(end - size as usize..end);
            let lock_owner = (write_flags & abi::WRITE_LOCKOWNER != 0).then_some(owner);
            Op::Write { fh, offset, write_flags, lock_owner, flags, data: Payload::empty() }
        }
        abi::STATFS => Op::Statfs,
        abi::RELEASE | abi::RELEASEDIR => {
            let (fh, flags, release_flags, lock_owner) = (f.u64()?, f.u32()?, f.u32()?, f.u64()?);
            if opcode == abi::RELEASEDIR {
                return Ok(Some(Op::Releasedir { fh, flags }));
            }
            Op::Release {
                fh,
                flags,
                flush: release_flags & abi::RELEASE_FLUSH != 0,
                lock_owner,
                flock_release: release_flags & abi::RELEASE_FLOCK_UNLOCK != 0,
            }
        }
        abi::FSYNC => Op::Fsync { fh: f.u64()?, datasync: f.u32()? & abi::FSYNC_FDATASYNC != 0 },
        abi::FSYNCDIR => Op::Fsyncdir { fh: f.u64()?, datasync: f.u32()? & abi::FSYNC_FDATASYNC != 0 },
        abi::FLUSH => {
            let fh = f.u64()?;
            f.skip(8)?;
            Op::Flush { fh, lock_owner: f.u64()? }
        }
        abi::SETXATTR => {
            let (size, flags) = (f.u32()? as usize, f.u32()?);
            let setxattr_flags = if dialect.setxattr_ext { f.u32()? } else { 0 };
            f.skip(if dialect.setxattr_ext { 4 } else { 0 })?;
            Op::Setxattr { name: f.name()?, value: f.bytes(size)?.to_vec(), flags, setxattr_flags }
        }
        abi::GETXATTR => {
            let size = f.u32()?;
            f.skip(4)?;
            Op::Getxattr { name: f.name()?, size }
        }
        abi::LISTXATTR => Op::Listxattr { size: f.u32()? },
        abi::REMOVEXATTR => Op::Removexattr { name: f.name()? },
        abi::ACCESS => Op::Access { mask: f.u32()? },
        abi::GETLK | abi::SETLK | abi::SETLKW => {
            let (fh, owner, lock) = (f.u64()?, f.u64()?, FileLock::decode(f)?);
            let flock = f.u32()? & abi::LK_FLOCK != 0;
            match opcode {
                abi::GETLK => Op::Getlk { fh, owner, lock, flock },
                abi::SETLK => Op::Setlk { fh, owner, lock, flock },
                _ => Op::Setlkw { fh, owner, lock, flock },
            }
        }
        abi::BMAP => Op::Bmap { block: f.u64()?, blocksize: f.u32()? },
        abi::IOCTL => {
            let (fh, flags, cmd, arg) = (f.u64()?, f.u32()?, f.u32()?, f.u64()?);
            let (in_size, out_size) = (f.u32()? as usize, f.u32()?);
            Op::Ioctl { fh, flags, cmd, arg, data: f.bytes(in_size)?.to_vec(), out_size }
        }
        abi::POLL => Op::Poll { fh: f.u64()?, kh: f.u64()?, flags: f.u32()?, events: f.u32()? },
        abi::FALLOCATE => Op::Fallocate { fh: f.u64()?, offset: f.u64()?, length: f.u64()?, mode: f.u32()? },
        abi::LSEEK => Op::Lseek { fh: f.u64()?, offset: f.u64()?, whence: f.u32()? },
        abi::COPY_FILE_RANGE | abi::COPY_FILE_RANGE_64 => Op::CopyFileRange {
            fh_in: f.u64()?,
            off_in: f.u64()?,
            nodeid_out: f.u64()?,
            fh_out: f.u64()?,
            off_out: f.u64()?,
            len: f.u64()?,
            flags: f.u64()?,
        },
        abi::STATX => {
            let getattr_flags = f.u32()?;
            f.skip(4)?;
            let (fh, flags, mask) = (f.u64()?, f.u32()?, f.u32()?);
            Op::Statx { fh: (getattr_flags & abi::GETATTR_FH != 0).then_some(fh), flags, mask }
        }
        abi::SYNCFS => Op::Syncfs,
        _ => return Ok(None),
    };
    Ok(Some(op))
}

/// valid 0, padding 4, fh 8, size 16, lock_owner 24, atime 32, mtime 40, ctime 48, atimensec 56, mtimensec 60,
/// ctimensec 64, mode 68, unused 72, uid 76, gid 80, unused 84.
fn parse_setattr(f: &mut Fields<'_>) -> Result<Setattr, Malformed> {
    let valid = f.u32()?;
    f.skip(4)?;
    let (fh, size, lock_owner) = (f.u64()?, f.u64()?, f.u64()?);
    let (atime, mtime, ctime) = (f.u64()? as i64, f.u64()? as i64, f.u64()? as i64);
    let (atime_nsec, mtime_nsec, ctime_nsec) = (f.u32()?, f.u32()?, f.u32()?);
    let mode = f.u32()?;
    f.skip(4)?;
    let (uid, gid) = (f.u32()?, f.u32()?);
    let has = |bit: u32| valid & bit != 0;
    let time = |set: u32, now: u32, sec, nsec| match (has(set), has(now)) {
        (_, true) => Some(SetTime::Now),
        (true, false) => Some(SetTime::At(Time { sec, nsec })),
        (false, false) => None,
    };
    Ok(Setattr {
        fh: has(abi::FATTR_FH).then_some(fh),
        mode: has(abi::FATTR_MODE).then_some(mode),
        uid: has(abi::FATTR_UID).then_some(uid),
        gid: has(abi::FATTR_GID).then_some(gid),
        size: has(abi::FATTR_SIZE).then_some(size),
        atime: time(abi::FATTR_ATIME, abi::FATTR_ATIME_NOW, atime, atime_nsec),
        mtime: time(abi::FATTR_MTIME, abi::FATTR_MTIME_NOW, mtime, mtime_nsec),
        ctime: has(abi::FATTR_CTIME).then_some(Time { sec: ctime, nsec: ctime_nsec }),
        lock_owner: has(abi::FATTR_LOCKOWNER).then_some(lock_owner),
        kill_suidgid: has(abi::FATTR_KILL_SUIDGID),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32, body: &[u8], ext: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&((abi::IN_HEADER_LEN + body.len() + ext.len()) as u32).to_ne_bytes());
        out.extend_from_slice(&opcode.to_ne_bytes());
        out.extend_from_slice(&[2u64, 9].map(u64::to_ne_bytes).concat());
        out.extend_from_slice(&[1000u32, 100, 4242].map(u32::to_ne_bytes).concat());
        out.extend_from_slice(&((ext.len() / 8) as u16).to_ne_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(body);
        out.extend_from_slice(ext);
        out
    }

    fn parsed(opcode: u32, body: &[u8], ext: &[u8]) -> Result<Message, Malformed> {
        let bytes = message(opcode, body, ext);
        parse(&InHeader::decode(&bytes)?, &bytes, Dialect { setxattr_ext: true })
    }

    fn request(opcode: u32, body: &[u8], ext: &[u8]) -> Request {
        match parsed(opcode, body, ext).unwrap() {
            Message::Request(request, _) => request,
            other => panic!("{other:?}"),
        }
    }

    fn u64s(v: &[u64]) -> Vec<u8> {
        v.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    fn u32s(v: &[u32]) -> Vec<u8> {
        v.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    #[test]
    fn no_input_of_any_length_makes_the_parser_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut noise = vec![0u8; 160];
        for opcode in (0..64).chain([4096, u32::MAX]) {
            for round in 0..8 {
                for byte in &mut noise {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    // Mostly zeros and ones in some rounds, so that counts and sizes get past their checks.
                    *byte = if round < 4 { (state >> 60) as u8 & 1 } else { (state >> 56) as u8 };
                }
                for len in 0..noise.len() {
                    let _ = parsed(opcode, &noise[..len], &[]);
                    let _ = parsed(opcode, &[], &noise[..len / 8 * 8]);
                    let _ = InHeader::decode(&noise[..len]);
                }
            }
        }
    }

    #[test]
    fn short_bodies_are_malformed() {
        for opcode in [abi::LOOKUP, abi::SETATTR, abi::OPEN, abi::READ, abi::WRITE, abi::SETLKW, abi::FORGET] {
            assert!(parsed(opcode, &[], &[]).is_err(), "opcode {opcode}");
        }
        assert!(parsed(abi::BATCH_FORGET, &u32s(&[u32::MAX, 0]), &[]).is_err());
        assert!(parsed(abi::LOOKUP, b"no nul", &[]).is_err());
        assert!(matches!(parsed(abi::STATFS, &[], &[]), Ok(Message::Request(..))));
        assert!(matches!(parsed(999, &[], &[]), Ok(Message::Unknown)));
    }

    #[test]
    fn the_header_names_the_caller_and_extensions_its_groups() {
        let ext = u32s(&[8 + 8, abi::EXT_GROUPS, 1, 77]);
        let r = request(abi::MKDIR, &[u32s(&[0o755, 0o22]), b"dir\0".to_vec()].concat(), &ext);
        assert_eq!((r.unique, r.nodeid, r.uid, r.gid, r.pid), (2, 9, 1000, 100, 4242));
        assert_eq!(r.groups, [77]);
        assert!(matches!(r.op, Op::Mkdir { name, mode: 0o755, umask: 0o22 } if name == b"dir"));
    }

    #[test]
    fn setattr_tells_apart_now_and_a_given_time() {
        let mut body = u32s(&[abi::FATTR_ATIME | abi::FATTR_ATIME_NOW | abi::FATTR_MTIME | abi::FATTR_UID, 0]);
        body.extend(u64s(&[1, 2, 3, 4, (-5i64) as u64, 6]));
        body.extend(u32s(&[7, 8, 9, 10, 0, 11, 12, 0]));
        let Op::Setattr(s) = request(abi::SETATTR, &body, &[]).op else { panic!() };
        let expected = Setattr {
            uid: Some(11),
            atime: Some(SetTime::Now),
            mtime: Some(SetTime::At(Time { sec: -5, nsec: 8 })),
            ..Setattr::default()
        };
        assert_eq!(s, expected);
    }

    #[test]
    fn both_renames_become_one() {
        let old = [u64s(&[5]), b"a\0b\0".to_vec()].concat();
        let new = [u64s(&[5]), u32s(&[1, 0]), b"a\0b\0".to_vec()].concat();
        for (opcode, body, want) in [(abi::RENAME, old, 0), (abi::RENAME2, new, 1)] {
            let Op::Rename { name, newdir, newname, flags } = request(opcode, &body, &[]).op else { panic!() };
            assert_eq!((name.as_slice(), newdir, newname.as_slice(), flags), (&b"a"[..], 5, &b"b"[..], want));
        }
    }

    #[test]
    fn a_write_names_where_its_payload_is() {
        let body = [u64s(&[3, 4096]), u32s(&[5, abi::WRITE_LOCKOWNER]), u64s(&[8]), u32s(&[1, 0]), b"hello".to_vec()];
        let bytes = message(abi::WRITE, &body.concat(), &[]);
        let header = InHeader::decode(&bytes).unwrap();
        let Message::Request(r, Some(range)) = parse(&header, &bytes, Dialect::default()).unwrap() else { panic!() };
        assert_eq!(&bytes[range], b"hello");
        assert!(matches!(r.op, Op::Write { fh: 3, offset: 4096, lock_owner: Some(8), flags: 1, .. }));
    }

    #[test]
    fn setxattr_has_two_layouts() {
        let long = [u32s(&[2, 1, 1, 0]), b"user.a\0xy".to_vec()].concat();
        let Op::Setxattr { name, value, flags: 1, setxattr_flags: 1 } = request(abi::SETXATTR, &long, &[]).op else {
            panic!()
        };
        assert_eq!((name.as_slice(), value.as_slice()), (&b"user.a"[..], &b"xy"[..]));
        let short = message(abi::SETXATTR, &[u32s(&[2, 1]), b"user.a\0xy".to_vec()].concat(), &[]);
        let header = InHeader::decode(&short).unwrap();
        let Ok(Message::Request(r, None)) = parse(&header, &short, Dialect::default()) else { panic!() };
        assert!(matches!(r.op, Op::Setxattr { value, setxattr_flags: 0, .. } if value == b"xy"));
    }

    #[test]
    fn flock_and_posix_locks_are_told_apart() {
        for (lk_flags, want) in [(0, false), (1, true)] {
            let body = [u64s(&[1, 2, 0, i64::MAX as u64]), u32s(&[1, 3, lk_flags, 0])].concat();
            assert!(matches!(request(abi::SETLKW, &body, &[]).op, Op::Setlkw { flock, .. } if flock == want));
        }
    }
}
