//! Requests of our own through a queue, so that the answers to them let those through which found no entry.
//!
//! They are STATFS of the mount, asked for by its device number with ustat(2): that needs neither a path, which may be
//! covered or gone from the tree, nor an open file, which would keep the mount from being unmounted.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;

use super::queue::pin_to;
use crate::abi::{self, InHeader};

/// Whether this processor's Linux has ustat(2); newer ones do not.
pub(super) const POSSIBLE: bool = cfg!(target_arch = "x86_64");

pub(super) struct Kicker {
    queue: u16,
    dev: (u32, u32),
    threads: Arc<Mutex<Vec<u32>>>,
}

impl Kicker {
    pub(super) fn new(queue: u16, dev: (u32, u32)) -> Kicker {
        Kicker { queue, dev, threads: Arc::default() }
    }

    /// Sends `count` requests, one after the other, from a thread of their own: those of an earlier call may themselves
    /// be among what waits for an entry.
    pub(super) fn kick(&self, count: usize) {
        let (queue, dev, threads) = (self.queue, encode(self.dev), self.threads.clone());
        let run = move || {
            pin_to(queue);
            // SAFETY: no preconditions.
            let me = unsafe { libc::gettid() }.cast_unsigned();
            threads.lock().push(me);
            for _ in 0..count {
                stat(dev);
            }
            threads.lock().retain(|thread| *thread != me);
        };
        if let Err(e) = std::thread::Builder::new().name(format!("fuse-kick-{queue}")).spawn(run) {
            warn!(queue, "requests may wait for each other: cannot start a thread: {e}");
        }
    }

    /// Whether a message is one of our requests.
    pub(super) fn sent(&self, message: &[u8]) -> bool {
        let ours = |h: InHeader| h.opcode == abi::STATFS && self.threads.lock().contains(&h.pid);
        InHeader::decode(message).is_ok_and(ours)
    }
}

/// As the system call takes it: minor 0-7, major 8-19, minor 20-31.
fn encode((major, minor): (u32, u32)) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

#[cfg(target_arch = "x86_64")]
fn stat(dev: u32) {
    // struct ustat has 32 bytes.
    let mut out = [0u64; 8];
    // SAFETY: the buffer is larger than what is written. The result does not matter: the request is what counts.
    unsafe { libc::syscall(libc::SYS_ustat, dev, out.as_mut_ptr()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn stat(_: u32) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_of_the_system_call() {
        assert_eq!([(0, 50), (8, 1), (0, 0x123)].map(encode), [50, 0x801, 0x0010_0023]);
    }
}
