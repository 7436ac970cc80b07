//! Attributes and numbers between the volume's terms and the kernel's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fs_core::{Attr, ROOT_INO, SetAttr, SetTime, StatFs, Time, WallClock};
use fuse_session::{EntryOut, Setattr};

/// How long the kernel may believe what it was told while this node holds the domain: until a revocation says otherwise.
const LONG: Duration = Duration::from_secs(365 * 24 * 3600);

pub fn valid(cacheable: bool) -> Duration {
    if cacheable { LONG } else { Duration::ZERO }
}

/// The kernel calls the root 1.
pub fn to_ino(nodeid: u64) -> u64 {
    if nodeid == fuse_session::abi::ROOT_ID { ROOT_INO } else { nodeid }
}

pub fn to_nodeid(ino: u64) -> u64 {
    if ino == ROOT_INO { fuse_session::abi::ROOT_ID } else { ino }
}

fn time(t: Time) -> fuse_session::Time {
    fuse_session::Time { sec: t.secs, nsec: t.nanos }
}

pub fn attr(a: &Attr) -> fuse_session::Attr {
    let i = &a.inode;
    // A directory's size on disk is its number of entries; users expect something like bytes.
    let size = if i.is_dir() { i.size.saturating_mul(64).max(4096) } else { i.size };
    let inline = if i.is_file() && i.blocks == 0 && i.size > 0 && i.is_inline() { 1 } else { 0 };
    fuse_session::Attr {
        ino: a.ino,
        size,
        blocks: i.blocks * 8 + inline,
        atime: time(i.atime),
        mtime: time(i.mtime),
        ctime: time(i.ctime),
        mode: i.mode,
        nlink: i.links,
        uid: i.uid,
        gid: i.gid,
        rdev: i.rdev as u32,
        blksize: 4096,
    }
}

pub fn statx(a: &Attr) -> fuse_session::Statx {
    let basic = attr(a);
    fuse_session::Statx {
        mask: libc::STATX_BASIC_STATS | libc::STATX_BTIME,
        blksize: basic.blksize,
        nlink: basic.nlink,
        uid: basic.uid,
        gid: basic.gid,
        mode: basic.mode,
        ino: basic.ino,
        size: basic.size,
        blocks: basic.blocks,
        atime: basic.atime,
        btime: time(a.inode.btime),
        ctime: basic.ctime,
        mtime: basic.mtime,
        rdev: device(basic.rdev),
        ..fuse_session::Statx::default()
    }
}

/// Major and minor number of the 32 bits that the kernel passes at mknod: minor 0-7, major 8-19, minor 20-31.
fn device(rdev: u32) -> (u32, u32) {
    (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & 0xfff00)
}

pub fn entry(a: &Attr, cacheable: bool) -> EntryOut {
    let valid = valid(cacheable);
    EntryOut {
        nodeid: to_nodeid(a.ino),
        generation: a.inode.generation,
        entry_valid: valid,
        attr_valid: valid,
        attr: attr(a),
    }
}

/// Of a name that the kernel has asked to make. It takes the attributes of this reply without a look at what has been
/// invalidated since it was sent (`fuse_iget` with version 0, as `fuse_do_setattr`, in Linux 6.18): they count for this once.
pub fn made(a: &Attr, cacheable: bool) -> EntryOut {
    EntryOut { attr_valid: Duration::ZERO, ..entry(a, cacheable) }
}

pub fn statfs(s: &StatFs) -> fuse_session::Statfs {
    fuse_session::Statfs {
        blocks: s.blocks,
        bfree: s.free,
        bavail: s.free,
        files: s.files,
        ffree: s.files_free,
        bsize: s.block_size,
        namelen: s.name_max,
        frsize: s.block_size,
    }
}

pub fn set_attr(s: &Setattr) -> SetAttr {
    let time = |t: &fuse_session::SetTime| match t {
        fuse_session::SetTime::Now => SetTime::Now,
        fuse_session::SetTime::At(t) => SetTime::To(Time { secs: t.sec, nanos: t.nsec }),
    };
    SetAttr {
        mode: s.mode.map(|m| m & 0o7777),
        uid: s.uid,
        gid: s.gid,
        size: s.size,
        atime: s.atime.as_ref().map(time),
        mtime: s.mtime.as_ref().map(time),
        kill_suid: s.kill_suidgid,
    }
}

/// The host's time of day.
pub struct HostClock;

impl WallClock for HostClock {
    fn now(&self) -> Time {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(d) => Time { secs: d.as_secs() as i64, nanos: d.subsec_nanos() },
            Err(_) => Time { secs: 0, nanos: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::Inode;

    #[test]
    fn root_has_its_own_number_in_the_kernel() {
        assert_eq!(to_ino(1), ROOT_INO);
        assert_eq!(to_nodeid(ROOT_INO), 1);
        assert_eq!(to_ino(to_nodeid(7 << 40 | 3)), 7 << 40 | 3);
    }

    #[test]
    fn numbers_of_devices() {
        assert_eq!(device(0x0103), (1, 3));
        assert_eq!(device(0xabcd_ef12), (0xdef, 0xabc12));
        let inode = Inode { mode: 0o020600, rdev: 0x0103, btime: Time { secs: 7, nanos: 8 }, ..Inode::default() };
        let x = statx(&Attr { ino: 5, inode });
        assert_eq!((x.rdev, x.btime.sec, x.btime.nsec, x.mode), ((1, 3), 7, 8, 0o020600));
        assert_ne!(x.mask & libc::STATX_BTIME, 0);
    }

    #[test]
    fn attributes_in_the_kernels_units() {
        let inode = Inode { mode: 0o100644, size: 9000, blocks: 3, links: 1, generation: 5, ..Inode::default() };
        let e = entry(&Attr { ino: 99, inode }, true);
        assert_eq!((e.nodeid, e.generation, e.attr.blocks, e.attr.size), (99, 5, 24, 9000));
        assert!(e.attr_valid > Duration::from_secs(1000));
        assert_eq!(entry(&Attr { ino: 99, inode }, false).entry_valid, Duration::ZERO);
    }
}
