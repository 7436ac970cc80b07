//! System calls that the standard library does not offer, as tests need them.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Result};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn c(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: impl Into<i64>) -> Result<u64> {
    u64::try_from(result.into()).map_err(|_| io::Error::last_os_error())
}

/// The number of the error that a call must have ended with.
pub fn errno<T: std::fmt::Debug>(r: Result<T>) -> i32 {
    match r {
        Err(e) => e.raw_os_error().unwrap_or_else(|| panic!("not a system error: {e}")),
        Ok(v) => panic!("succeeded, with {v:?}"),
    }
}

pub fn stat(path: &Path) -> Result<libc::stat> {
    let p = c(path)?;
    // SAFETY: all-zero is a valid stat; both live through the call.
    unsafe {
        let mut st = std::mem::zeroed();
        check(libc::lstat(p.as_ptr(), &mut st))?;
        Ok(st)
    }
}

pub fn statfs(path: &Path) -> Result<libc::statfs> {
    let p = c(path)?;
    // SAFETY: all-zero is a valid statfs; both live through the call.
    unsafe {
        let mut st = std::mem::zeroed();
        check(libc::statfs(p.as_ptr(), &mut st))?;
        Ok(st)
    }
}

/// access(2) as the effective user.
pub fn access(path: &Path, mode: i32) -> Result<()> {
    let p = c(path)?;
    // SAFETY: a valid C string.
    check(unsafe { libc::faccessat(libc::AT_FDCWD, p.as_ptr(), mode, libc::AT_EACCESS) }).map(drop)
}

pub fn rename2(from: &Path, to: &Path, flags: u32) -> Result<()> {
    let (from, to) = (c(from)?, c(to)?);
    let at = libc::AT_FDCWD;
    // SAFETY: valid C strings.
    check(unsafe { libc::renameat2(at, from.as_ptr(), at, to.as_ptr(), flags) }).map(drop)
}

pub fn mknod(path: &Path, mode: u32, dev: u64) -> Result<()> {
    let p = c(path)?;
    // SAFETY: a valid C string.
    check(unsafe { libc::mknod(p.as_ptr(), mode, dev) }).map(drop)
}

pub fn chown(path: &Path, uid: u32, gid: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
}

/// Access and modification time, each in seconds and nanoseconds.
pub fn utimes(path: &Path, atime: (i64, i64), mtime: (i64, i64)) -> Result<()> {
    let p = c(path)?;
    let times = [atime, mtime].map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    // SAFETY: two times, as the call wants them.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, p.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) }).map(drop)
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> Result<()> {
    let (p, n) = (c(path)?, CString::new(name)?);
    // SAFETY: the value is as long as said.
    check(unsafe { libc::lsetxattr(p.as_ptr(), n.as_ptr(), value.as_ptr().cast(), value.len(), flags) }).map(drop)
}

pub fn xattr(path: &Path, name: &str) -> Result<Vec<u8>> {
    let (p, n) = (c(path)?, CString::new(name)?);
    let mut value = vec![0; 1 << 16];
    // SAFETY: the buffer is as long as said.
    let len = unsafe { libc::lgetxattr(p.as_ptr(), n.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(check(len as i64)? as usize);
    Ok(value)
}

pub fn xattrs(path: &Path) -> Result<Vec<String>> {
    let p = c(path)?;
    let mut names = vec![0u8; 1 << 16];
    // SAFETY: the buffer is as long as said.
    let len = check(unsafe { libc::llistxattr(p.as_ptr(), names.as_mut_ptr().cast(), names.len()) } as i64)?;
    let mut names: Vec<String> = names[..len as usize]
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(|n| String::from_utf8_lossy(n).into_owned())
        .collect();
    names.sort();
    Ok(names)
}

pub fn remove_xattr(path: &Path, name: &str) -> Result<()> {
    let (p, n) = (c(path)?, CString::new(name)?);
    // SAFETY: valid C strings.
    check(unsafe { libc::lremovexattr(p.as_ptr(), n.as_ptr()) }).map(drop)
}

pub fn fallocate(file: &File, mode: i32, offset: i64, len: i64) -> Result<()> {
    // SAFETY: an open descriptor.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(drop)
}

/// SEEK_DATA, SEEK_HOLE.
pub fn seek(file: &File, offset: i64, whence: i32) -> Result<u64> {
    // SAFETY: an open descriptor.
    check(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })
}

/// A file without a name, in a directory.
pub fn tmpfile(dir: &Path) -> Result<File> {
    let p = c(dir)?;
    // SAFETY: a valid C string; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::open(p.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, 0o600);
        check(fd)?;
        Ok(File::from_raw_fd(fd))
    }
}

/// Gives an open file a name.
pub fn link_open(file: &File, to: &Path) -> Result<()> {
    let (from, to) = (CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?, c(to)?);
    let at = libc::AT_FDCWD;
    // SAFETY: valid C strings.
    check(unsafe { libc::linkat(at, from.as_ptr(), at, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) }).map(drop)
}

/// How a file's bytes go to another without passing through the caller.
#[derive(Clone, Copy, Debug)]
pub enum Copy {
    Sendfile,
    CopyFileRange,
}

/// Copies up to `len` bytes from the position of one file to that of the other.
pub fn copy(how: Copy, from: &File, to: &File, len: usize) -> Result<u64> {
    let (i, o, null) = (from.as_raw_fd(), to.as_raw_fd(), std::ptr::null_mut());
    // SAFETY: open descriptors; no offsets are passed.
    check(unsafe {
        match how {
            Copy::Sendfile => libc::sendfile(o, i, null, len),
            Copy::CopyFileRange => libc::copy_file_range(i, null, o, null, len, 0),
        }
    } as i64)
}

/// Runs as another user, this thread only: file permissions apply to it.
pub fn as_user<T>(uid: u32, gid: u32, work: impl FnOnce() -> T) -> T {
    struct Root;
    impl Drop for Root {
        fn drop(&mut self) {
            // SAFETY: changes numbers of the calling thread.
            unsafe {
                libc::setfsuid(0);
                libc::setfsgid(0);
            }
        }
    }
    let _root = Root;
    // SAFETY: changes numbers of the calling thread; each call returns the number before.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        libc::setfsuid(uid)
    };
    assert_eq!(now as u32, uid, "the thread did not become the user");
    work()
}

/// A shared mapping of a file from its beginning.
pub struct Map {
    at: *mut u8,
    len: usize,
}

// SAFETY: only numbers; what is behind them is read and written with volatile accesses.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    pub fn new(file: &File, len: usize, write: bool) -> Result<Self> {
        let access = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at: at.cast(), len }) }
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping; volatile because others change it.
        (at..at + len).map(|i| unsafe { self.at.add(i).read_volatile() }).collect()
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        for (i, b) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, which the caller made writable.
            unsafe { self.at.add(at + i).write_volatile(*b) };
        }
    }

    pub fn sync(&self) -> Result<()> {
        // SAFETY: the mapping as it was made.
        check(unsafe { libc::msync(self.at.cast(), self.len, libc::MS_SYNC) }).map(drop)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping as it was made, not used any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// The command runs in a network namespace, given as a file (`/run/netns/NAME`).
pub fn enter_netns(command: &mut std::process::Command, netns: &std::path::Path) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    use std::os::unix::process::CommandExt;
    let file = std::fs::File::open(netns)?;
    // SAFETY: only one system call in the child, on a descriptor that the closure keeps open.
    unsafe {
        command.pre_exec(move || match libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    Ok(())
}
