//! Going to the background once the mount is usable. The process forks before it opens anything: a child that shared the
//! image's open file would keep the slot's lock alive after its parent's death.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The way to the process that waits for the mount.
pub struct Parent(std::fs::File);

/// Forks. In the parent this waits for the child's word and returns the exit status for the caller, with a message for
/// standard error; in the child it returns the way to tell the parent.
pub enum Forked {
    Parent { status: i32, message: String },
    Child(Parent),
}

/// Status the child reports by closing the pipe without a word: it died.
const DIED: i32 = 32;

pub fn fork() -> io::Result<Forked> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: pipe2 has just made them, nobody else owns them.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: the process has a single thread so far (called first thing in main), so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(read);
            // SAFETY: no memory is involved; a failure leaves the session as it is, which is harmless.
            unsafe { libc::setsid() };
            Ok(Forked::Child(Parent(write.into())))
        }
        _ => {
            drop(write);
            let mut said = Vec::new();
            std::fs::File::from(read).read_to_end(&mut said)?;
            let (status, message) = match said.split_first() {
                Some((status, text)) => ((*status).into(), String::from_utf8_lossy(text).into_owned()),
                None => (DIED, "the daemon died before the volume was mounted; see the system log".into()),
            };
            Ok(Forked::Parent { status, message })
        }
    }
}

impl Parent {
    /// The parent exits with `status` and prints the message.
    pub fn tell(mut self, status: u8, message: &str) {
        // Nothing can be done for a parent that is gone.
        let _ = self.0.write_all(&[status]);
        let _ = self.0.write_all(message.as_bytes());
    }
}

/// Lets go of the terminal and the working directory.
pub fn detach() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for fd in 0..3 {
        // SAFETY: both are open descriptors of this process.
        if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lines of the log to syslog(3).
pub struct Syslog;

impl Write for Syslog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text: Vec<u8> = line.iter().copied().filter(|b| *b != 0 && *b != b'\n').collect();
        if let Ok(text) = std::ffi::CString::new(text) {
            // SAFETY: both strings end with a zero byte; "%s" takes exactly one string.
            unsafe {
                libc::syslog(libc::LOG_DAEMON | libc::LOG_WARNING, c"mount.clusterfs: %s".as_ptr(), text.as_ptr())
            };
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
