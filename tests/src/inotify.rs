//! A watcher of directories and files, as programs that wait for new mail are.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of struct inotify_event before the name.
const HEAD: usize = 16;

pub struct Inotify {
    fd: OwnedFd,
}

impl Inotify {
    /// Watches for `events` (IN_...) of what is at `path`.
    pub fn watch(path: &Path, events: u32) -> io::Result<Self> {
        let text = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the descriptor is new, and checked before it gets an owner; the path is a C string.
        unsafe {
            let fd = libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = OwnedFd::from_raw_fd(fd);
            match libc::inotify_add_watch(fd.as_raw_fd(), text.as_ptr(), events) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(Self { fd }),
            }
        }
    }

    /// Waits for events, `time` at most, and returns their masks; empty if there were none.
    pub fn events(&self, time: Duration) -> io::Result<Vec<u32>> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one record that lives through the call.
            match unsafe { libc::poll(&mut poll, 1, left.as_millis() as libc::c_int) } {
                0 if left.is_zero() => return Ok(Vec::new()),
                1 => return self.read(),
                n if n < 0 => return Err(io::Error::last_os_error()),
                _ => {}
            }
        }
    }

    fn read(&self) -> io::Result<Vec<u32>> {
        let mut buf = [0u8; 8192];
        // SAFETY: the buffer is as long as said.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        let word = |b: &[u8], at: usize| b[at..at + 4].iter().rev().fold(0u32, |n, b| n << 8 | u32::from(*b));
        let (mut rest, mut masks) = (&buf[..n as usize], Vec::new());
        while rest.len() >= HEAD {
            masks.push(word(rest, 4));
            rest = rest.get(HEAD + word(rest, 12) as usize..).unwrap_or_default();
        }
        Ok(masks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let i = Inotify::watch(dir.path(), libc::IN_CREATE | libc::IN_DELETE).expect("a watch");
        std::fs::write(dir.path().join("a"), "x").expect("is written");
        std::fs::remove_file(dir.path().join("a")).expect("is removed");
        assert_eq!(i.events(Duration::from_secs(1)).expect("events"), [libc::IN_CREATE, libc::IN_DELETE]);
        assert!(i.events(Duration::from_millis(1)).expect("none").is_empty());
    }
}
