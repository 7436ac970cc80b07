//! The process that goes through the mount to wake those who watch. It is this program again, started with [`ARGUMENT`]; it ends when its
//! standard input does, which is when the daemon does, however that ends.

use std::collections::VecDeque;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;

use parking_lot::{Condvar, Mutex};

use super::mark;

/// First argument of the program when it is the helper; the mount point and its device number follow.
pub const ARGUMENT: &str = "--wake-watchers";
/// An open may wait for another node: so many may do so before the others wait too.
const THREADS: usize = 4;
/// Node number and generation, 8 bytes each.
const REQUEST: usize = 16;
/// Type of the handles that FUSE takes, of 12 bytes: node number, upper half first, and generation (include/linux/exportfs.h).
const INO64_GEN: libc::c_int = 0x81;

/// The daemon's end.
pub struct Helper {
    child: Child,
    input: Option<ChildStdin>,
}

impl Helper {
    /// Also returns the numbers of the threads whose requests are not meant in earnest.
    pub fn start(dir: &Path, device: u64) -> io::Result<(Self, Vec<u32>)> {
        // Not by name: the file may have been replaced since.
        let mut command = Command::new("/proc/self/exe");
        command.arg(ARGUMENT).arg(dir).arg(device.to_string()).current_dir("/");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take();
        let helper = Self { input: child.stdin.take(), child };
        let mut numbers = [0; 4 * THREADS];
        output.ok_or(io::ErrorKind::BrokenPipe)?.read_exact(&mut numbers)?;
        let number = |b: &[u8]| b.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b));
        Ok((helper, numbers.chunks(4).map(number).collect()))
    }

    /// Asks for those who watch the inode to be woken; does not wait for it.
    pub fn touch(&mut self, nodeid: u64, generation: u64) -> io::Result<()> {
        let request = [nodeid.to_le_bytes(), generation.to_le_bytes()].concat();
        self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(&request)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.input.take());
        // At the latest when the mount is gone, its open is answered with an error.
        if let Err(e) = self.child.wait() {
            tracing::warn!("cannot wait for a helper: {e}");
        }
    }
}

type Request = (u64, u64);

#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Request>>,
    changed: Condvar,
}

/// The helper's life. Returns at the end of standard input.
pub fn run(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let dir = args.next().and_then(|d| CString::new(d.as_bytes()).ok());
    let device = args.next().and_then(|d| d.to_str()?.parse().ok());
    let (Some(dir), Some(device)) = (dir, device) else {
        eprintln!("mount.clusterfs: {ARGUMENT} is for its own use");
        return ExitCode::FAILURE;
    };
    let queue = Arc::new(Queue::default());
    let (tell, told) = channel();
    for _ in 0..THREADS {
        let (queue, dir, tell) = (queue.clone(), dir.clone(), tell.clone());
        std::thread::spawn(move || {
            // SAFETY: asks for a number. The other end waits for it.
            let _ = tell.send(unsafe { libc::gettid() });
            loop {
                let request = {
                    let mut waiting = queue.waiting.lock();
                    loop {
                        match waiting.pop_front() {
                            Some(request) => break request,
                            None => queue.changed.wait(&mut waiting),
                        }
                    }
                };
                // One that is gone has no watchers; one that cannot be opened cannot be helped.
                let _ = touch(&dir, device, request);
            }
        });
    }
    let numbers: Vec<u8> = told.iter().take(THREADS).flat_map(libc::pid_t::to_le_bytes).collect();
    if io::stdout().write_all(&numbers).and_then(|()| io::stdout().flush()).is_err() {
        return ExitCode::FAILURE;
    }
    let mut bytes = [0; REQUEST];
    let mut input = io::stdin().lock();
    while input.read_exact(&mut bytes).is_ok() {
        let (nodeid, generation) = bytes.split_at(8);
        let half = |b: &[u8]| b.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let request = (half(nodeid), half(generation));
        let mut waiting = queue.waiting.lock();
        // Once in the queue is enough.
        if !waiting.contains(&request) {
            waiting.push_back(request);
            queue.changed.notify_one();
        }
    }
    ExitCode::SUCCESS
}

#[repr(C)]
struct Handle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    words: [u32; 3],
}

/// Makes events of an inode, if it is a file or a directory, by its number: its path is not known.
fn touch(dir: &CString, device: u64, (nodeid, generation): Request) -> io::Result<()> {
    // A mount of our own, so that nobody finds the mount point busy because of us.
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a C string.
    let root =
        owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, dir.as_ptr(), flags) as libc::c_int })?;
    if stat(&root)?.0 != device {
        return Err(io::Error::other("something else is mounted here now"));
    }
    // The kernel wants one that is open in earnest.
    let root = File::open(format!("/proc/self/fd/{}", root.as_raw_fd()))?;
    let words = [(nodeid >> 32) as u32, nodeid as u32, generation as u32];
    let handle = Handle { bytes: size_of::<[u32; 3]>() as libc::c_uint, kind: INO64_GEN, words };
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is laid out as the kernel's struct file_handle, with as many bytes behind it as it says.
    let found = owned(unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), &raw const handle, flags) as libc::c_int
    })?;
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    match u32::from(stat(&found)?.1) & libc::S_IFMT {
        libc::S_IFDIR => {
            let dir = File::open(path)?;
            // SAFETY: an open descriptor and a C string. Nothing is removed but what was made.
            unsafe {
                if libc::mknodat(dir.as_raw_fd(), mark::NAME.as_ptr(), libc::S_IFREG | 0o600, 0) == 0 {
                    libc::unlinkat(dir.as_raw_fd(), mark::NAME.as_ptr(), 0);
                }
            }
        }
        libc::S_IFREG => {
            let file = File::options().write(true).open(path)?;
            // SAFETY: an open descriptor. It would do no harm if it were done.
            unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, 1) };
        }
        _ => {}
    }
    Ok(())
}

/// Device number (minor in the lower 20 bits) and mode, as the kernel knows them without asking.
fn stat(fd: &OwnedFd) -> io::Result<(u64, u16)> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: an open descriptor, an empty C string and room for the answer.
    unsafe {
        let mut s: libc::statx = std::mem::zeroed();
        match libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &mut s) {
            0 => Ok((u64::from(s.stx_dev_major) << 20 | u64::from(s.stx_dev_minor), s.stx_mode)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: a new descriptor that nobody else owns.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}
