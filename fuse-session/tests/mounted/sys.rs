//! The system calls that std does not offer, with errno as an integer.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn check(rc: i64) -> Result<i64, i32> {
    if rc < 0 { Err(errno()) } else { Ok(rc) }
}

pub fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

pub fn stat(path: &Path) -> Result<(), i32> {
    std::fs::symlink_metadata(path).map(drop).map_err(|e| e.raw_os_error().unwrap())
}

pub fn flock(file: &File, how: i32) -> Result<i64, i32> {
    check(unsafe { libc::flock(file.as_raw_fd(), how) }.into())
}

/// A lock on the whole file; `cmd` is F_SETLK, F_SETLKW or F_GETLK (then the kind found is returned).
pub fn posix_lock(file: &File, cmd: i32, kind: i32) -> Result<i64, i32> {
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    check(unsafe { libc::fcntl(file.as_raw_fd(), cmd, &raw mut lock) }.into())?;
    Ok(lock.l_type.into())
}

pub fn rename2(from: &Path, to: &Path, flags: u32) -> Result<i64, i32> {
    let (from, to) = (c(from), c(to));
    check(unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) }.into())
}

pub fn tmpfile(dir: &Path) -> Result<File, i32> {
    let dir = c(dir);
    let fd = check(unsafe { libc::open(dir.as_ptr(), libc::O_TMPFILE | libc::O_RDWR, 0o600) }.into())?;
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

pub fn link_open_file(file: &File, to: &Path) -> Result<i64, i32> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let to = c(to);
    let flags = libc::AT_SYMLINK_FOLLOW;
    check(unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) }.into())
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> Result<i64, i32> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }.into())
}

pub fn get_xattr(path: &Path, name: &str, room: usize) -> Result<Vec<u8>, i32> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    let mut out = vec![0u8; room];
    let len = check(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), out.as_mut_ptr().cast(), room) } as i64)?;
    out.resize(len as usize, 0);
    Ok(out)
}

pub fn list_xattr(path: &Path) -> Result<Vec<u8>, i32> {
    let path = c(path);
    let mut out = vec![0u8; 1000];
    let len = check(unsafe { libc::listxattr(path.as_ptr(), out.as_mut_ptr().cast(), out.len()) } as i64)?;
    out.truncate(len as usize);
    Ok(out)
}

pub fn remove_xattr(path: &Path, name: &str) -> Result<i64, i32> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }.into())
}

pub fn statvfs(path: &Path) -> libc::statvfs {
    let path = c(path);
    let mut out: libc::statvfs = unsafe { std::mem::zeroed() };
    check(unsafe { libc::statvfs(path.as_ptr(), &raw mut out) }.into()).unwrap();
    out
}

pub fn statx(path: &Path, mask: u32) -> libc::statx {
    let path = c(path);
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, mask, &raw mut out) }.into()).unwrap();
    out
}

pub fn copy_file_range(from: &File, to: &File, len: usize) -> Result<i64, i32> {
    let null = std::ptr::null_mut();
    check(unsafe { libc::copy_file_range(from.as_raw_fd(), null, to.as_raw_fd(), null, len, 0) } as i64)
}

pub fn lseek(file: &File, offset: i64, whence: i32) -> Result<i64, i32> {
    check(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })
}

pub fn fallocate(file: &File, len: i64) -> Result<i64, i32> {
    check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) }.into())
}

pub fn get_flags(file: &File) -> Result<u64, i32> {
    let mut out = 0u64;
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut out) }.into())?;
    Ok(out & 0xffff_ffff)
}

pub fn poll_for(file: &File, events: i16) -> i16 {
    let mut fd = libc::pollfd { fd: file.as_raw_fd(), events, revents: 0 };
    check(unsafe { libc::poll(&raw mut fd, 1, 1000) }.into()).unwrap();
    fd.revents
}

fn handle(signal: i32, handler: extern "C" fn(i32)) {
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
    }
}

/// Makes SIGUSR1 interrupt system calls instead of ending the process.
pub fn handle_sigusr1() {
    extern "C" fn ignore(_: i32) {}
    handle(libc::SIGUSR1, ignore);
}

static SIGUSR2_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Makes SIGUSR2 interrupt system calls and counts its deliveries.
pub fn count_sigusr2() {
    extern "C" fn count(_: i32) {
        SIGUSR2_COUNT.fetch_add(1, Ordering::SeqCst);
    }
    handle(libc::SIGUSR2, count);
}

pub fn sigusr2_count() -> usize {
    SIGUSR2_COUNT.load(Ordering::SeqCst)
}

/// The plain system call: the C library's function would change every thread.
pub fn set_groups_of_thread(groups: &[libc::gid_t]) {
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).unwrap();
}

/// Mounts of this thread from here on end with it.
pub fn enter_own_mount_namespace() {
    let null = std::ptr::null();
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).unwrap();
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    check(unsafe { libc::mount(null, c"/".as_ptr(), null, flags, null.cast()) }.into()).unwrap();
}

pub fn mount_fusectl() {
    let (kind, dir) = (c"fusectl".as_ptr(), c"/sys/fs/fuse/connections".as_ptr());
    match check(unsafe { libc::mount(kind, dir, kind, 0, std::ptr::null()) }.into()) {
        Ok(_) | Err(libc::EBUSY) => {}
        Err(errno) => panic!("mounting fusectl: errno {errno}"),
    }
}

pub fn thread_self() -> libc::pthread_t {
    unsafe { libc::pthread_self() }
}

pub fn signal(thread: libc::pthread_t, signal: i32) {
    unsafe { libc::pthread_kill(thread, signal) };
}

/// Of the calling thread.
pub fn run_on_cpu(cpu: usize) {
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(0, size_of_val(&set), &raw const set).into()).unwrap();
    }
}
