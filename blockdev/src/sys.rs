//! The system calls on files and block devices, each retried on EINTR and turned into a `Result`.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::{AlignedBuf, WritePermit};

/// The most iovecs that one call takes (IOV_MAX on Linux).
const MAX_IOVECS: usize = 1024;

/// Repeats `call` until it is not interrupted; a negative result becomes errno.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let e = Error::last_os_error();
                if e.kind() != ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

/// The parts of a transfer that are left after `done` bytes, at most as many as one call takes.
fn rest(parts: &[(*mut u8, usize)], done: usize) -> Vec<libc::iovec> {
    let mut skip = done;
    let mut iovecs = Vec::with_capacity(parts.len().min(MAX_IOVECS));
    for (ptr, len) in parts {
        if iovecs.len() == MAX_IOVECS {
            break;
        }
        if skip >= *len {
            skip -= len;
            continue;
        }
        iovecs.push(libc::iovec { iov_base: ptr.wrapping_add(skip).cast(), iov_len: len - skip });
        skip = 0;
    }
    iovecs
}

/// Fills `bufs` from `offset`, with one call unless the kernel returns short.
pub(crate) fn read(file: &File, offset: u64, bufs: &mut [AlignedBuf]) -> io::Result<()> {
    let parts: Vec<_> = bufs.iter_mut().map(|b| (b.as_mut_ptr(), b.len())).collect();
    let total: usize = parts.iter().map(|p| p.1).sum();
    let mut done = 0;
    while done < total {
        let iovecs = rest(&parts, done);
        let at = (offset + done as u64) as libc::off_t;
        // SAFETY: the iovecs point into `bufs`, which are borrowed exclusively for the duration of the call.
        let n = retry(|| unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) })?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        done += n;
    }
    Ok(())
}

/// Nothing was written: the permit is not valid any more.
#[derive(Debug, thiserror::Error)]
#[error("the permit to write has ended")]
pub(crate) struct Refused;

/// Whether an error is [`Refused`].
pub(crate) fn is_refusal(e: &io::Error) -> bool {
    e.get_ref().is_some_and(|inner| inner.is::<Refused>())
}

/// Writes `bufs` from `offset`, with one call unless the kernel returns short; `fua`: durable on return. The error is
/// [`Refused`] without a `permit`.
pub(crate) fn write(
    file: &File,
    offset: u64,
    bufs: &[Arc<AlignedBuf>],
    fua: bool,
    permit: Option<&dyn WritePermit>,
) -> io::Result<()> {
    let parts: Vec<_> = bufs.iter().map(|b| (b.as_ptr().cast_mut(), b.len())).collect();
    let total: usize = parts.iter().map(|p| p.1).sum();
    let mut flags = if fua { libc::RWF_DSYNC } else { 0 };
    let mut done = 0;
    while done < total {
        let iovecs = rest(&parts, done);
        let at = (offset + done as u64) as libc::off_t;
        if permit.is_some_and(|p| !p.valid()) {
            return Err(if done == 0 { io::Error::other(Refused) } else { ErrorKind::TimedOut.into() });
        }
        let n = retry(|| {
            // SAFETY: the iovecs point into `bufs`, which live through the call and are only read.
            unsafe { libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at, flags) }
        });
        match n {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            // A filesystem without the flag: flush instead.
            Err(e) if flags != 0 && e.raw_os_error() == Some(libc::EOPNOTSUPP) => flags = 0,
            Err(e) => return Err(e),
        }
    }
    if fua && flags == 0 { file.sync_data() } else { Ok(()) }
}

/// `_IO(0x12, 104)` and `_IO(0x12, 119)`, from linux/fs.h.
const BLKSSZGET: u64 = 0x1268;
const BLKDISCARD: u64 = 0x1277;

/// Gives a range of a block device back; not an error where the device takes nothing back.
pub(crate) fn discard(file: &File, offset: u64, len: u64, permit: Option<&dyn WritePermit>) -> io::Result<()> {
    if permit.is_some_and(|p| !p.valid()) {
        return Err(io::Error::other(Refused));
    }
    let range = [offset, len];
    // SAFETY: the ioctl reads two numbers of 64 bits.
    match retry(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) as _ }) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Deallocates a range of a file; not an error where the filesystem cannot.
pub(crate) fn punch(file: &File, offset: u64, len: u64, permit: Option<&dyn WritePermit>) -> io::Result<()> {
    if permit.is_some_and(|p| !p.valid()) {
        return Err(io::Error::other(Refused));
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain system call on an open descriptor.
    let result = retry(|| unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) as _ });
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(()),
        other => other.map(|_| ()),
    }
}

fn flock(kind: i32, start: u64, len: u64) -> libc::flock {
    // SAFETY: flock is plain data; OFD locks require l_pid to be 0.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start as i64;
    lock.l_len = len as i64;
    lock
}

fn set_lock(file: &File, kind: i32, start: u64, len: u64) -> io::Result<()> {
    let lock = flock(kind, start, len);
    // SAFETY: the pointer is valid through the call.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) as _ }).map(|_| ())
}

/// Tries to take a lock of this open file description; `false`: another one has a lock there that excludes it.
pub(crate) fn try_lock(file: &File, exclusive: bool, start: u64, len: u64) -> io::Result<bool> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    match set_lock(file, kind, start, len) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Polls for a lock for `limit` at most, so that a stopped process cannot hold this one up for ever.
pub(crate) fn lock_within(file: &File, exclusive: bool, start: u64, len: u64, limit: Duration) -> io::Result<bool> {
    let mut pause = Duration::from_micros(20);
    let mut waited = Duration::ZERO;
    while !try_lock(file, exclusive, start, len)? {
        if waited >= limit {
            return Ok(false);
        }
        std::thread::sleep(pause);
        waited += pause;
        pause = (pause * 2).min(Duration::from_millis(2));
    }
    Ok(true)
}

pub(crate) fn unlock(file: &File, start: u64, len: u64) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK, start, len)
}

/// Whether another open file description has a lock there.
pub(crate) fn is_locked(file: &File, start: u64, len: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, start, len);
    // SAFETY: the pointer is valid through the call.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) as _ })?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Alignment that direct I/O needs, in bytes; `None`: the filesystem does not tell or has none.
pub(crate) fn direct_alignment(file: &File) -> Option<u32> {
    let empty = CString::default();
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a valid C string and `stat` is large enough.
    let done = unsafe {
        libc::statx(file.as_raw_fd(), empty.as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, stat.as_mut_ptr())
    };
    if done != 0 {
        return None;
    }
    // SAFETY: zero-initialised and then filled by the kernel; all fields are plain integers.
    let stat = unsafe { stat.assume_init() };
    let told = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    told.then_some(stat.stx_dio_offset_align.max(stat.stx_dio_mem_align))
}

/// Logical sector size of a kernel block device.
pub(crate) fn block_sector_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the ioctl writes one int.
    retry(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET as _, &mut size) as _ })?;
    u32::try_from(size).map_err(|_| ErrorKind::InvalidData.into())
}

/// Switches direct I/O off.
pub(crate) fn set_buffered(file: &File) -> io::Result<()> {
    // SAFETY: plain system calls on an open descriptor.
    let flags = retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) as _ })?;
    let flags = flags as i32 & !libc::O_DIRECT;
    // SAFETY: as above.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) as _ }).map(|_| ())
}

/// In whole sectors. The end of a block device is not in its metadata.
pub fn size_of(mut file: &File, sector_size: u32) -> io::Result<u64> {
    let end = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    Ok(end - end % u64::from(sector_size))
}
