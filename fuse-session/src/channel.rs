//! How an answer reaches the kernel: one `writev` on the /dev/fuse descriptor that the request came from.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::abi::{DEV_IOC_CLONE, out_header};
use crate::interrupt::InterruptTable;

/// A transport for answers. The kernel device is one; a test or another transport may be another.
pub trait Channel: Send + Sync {
    /// Delivers the answer to request `unique`: `error` is 0 or a negative errno, in which case `body` is empty.
    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> io::Result<()>;

    /// Where the requests of this channel are registered.
    fn interrupts(&self) -> &InterruptTable;

    /// Whether the kernel may not tell of a signal to the thread that waits for the answer.
    fn may_miss_signals(&self) -> bool {
        false
    }
}

/// `writev` takes this many parts at most.
const MAX_PARTS: usize = 1024;

/// One descriptor of /dev/fuse. The kernel keeps the requests read from it in its own queue, so that an answer must
/// go to the same descriptor.
pub(crate) struct Device {
    file: File,
    interrupts: Arc<InterruptTable>,
}

impl Device {
    pub(crate) fn new(file: File, interrupts: Arc<InterruptTable>) -> Device {
        Device { file, interrupts }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn shared_interrupts(&self) -> &Arc<InterruptTable> {
        &self.interrupts
    }

    /// Whether the kernel still has a filesystem behind this device.
    pub(crate) fn is_connected(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one pollfd, which lives through the call.
        let rc = unsafe { libc::poll(&raw mut poll, 1, 0) };
        rc >= 0 && poll.revents & libc::POLLERR == 0
    }

    /// A second descriptor with its own queue on the same connection.
    pub(crate) fn try_clone(&self) -> io::Result<Device> {
        let file = File::options().read(true).write(true).open("/dev/fuse")?;
        let main: u32 = self.file.as_raw_fd() as u32;
        // SAFETY: both descriptors are open for the duration of the call, and the argument is a live u32.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), DEV_IOC_CLONE as _, &raw const main) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Device::new(file, self.interrupts.clone()))
    }
}

impl Channel for Device {
    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) -> io::Result<()> {
        if body.len() >= MAX_PARTS {
            let joined = body.iter().flat_map(|part| part.iter().copied()).collect::<Vec<u8>>();
            return self.send(unique, error, &[IoSlice::new(&joined)]);
        }
        let len = body.iter().map(|part| part.len()).sum();
        let header = out_header(len, error, unique);
        let written = match body {
            [] => (&self.file).write(&header)?,
            [one] => (&self.file).write_vectored(&[IoSlice::new(&header), IoSlice::new(one)])?,
            many => {
                let mut parts = Vec::with_capacity(many.len() + 1);
                parts.push(IoSlice::new(&header));
                parts.extend(many.iter().map(|part| IoSlice::new(part)));
                (&self.file).write_vectored(&parts)?
            }
        };
        if written != header.len() + len {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took only part of a message"));
        }
        Ok(())
    }

    fn interrupts(&self) -> &InterruptTable {
        &self.interrupts
    }
}
