//! FUSE over io_uring (Linux 6.14 with the module parameter `enable_uring`): one queue per processor, whose requests
//! arrive as completions and whose answers are commands that also ask for the next request. Forgets, interrupts and
//! notifications stay with /dev/fuse.

mod entry;
mod kick;
mod queue;

use std::io;
use std::os::fd::AsRawFd;

pub(crate) use queue::{Queue, Stopper};

use crate::channel::Device;
use crate::init::Negotiated;

/// The kernel's least room for an answer.
const MIN_PAYLOAD: usize = 8192;

/// A queue for each processor that the host can have: the kernel uses none before it has all. `dev` is the mount's.
pub(crate) fn queues(device: &Device, dev: (u32, u32), negotiated: &Negotiated, page: u32) -> io::Result<Vec<Queue>> {
    if !kick::POSSIBLE {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let pages = usize::from(negotiated.max_pages) * page as usize;
    let payload = MIN_PAYLOAD.max(negotiated.max_write as usize).max(pages);
    let make = |id| Queue::new(id, device.file().as_raw_fd(), dev, payload, device.shared_interrupts().clone());
    (0..possible_cpus()?).map(make).collect()
}

/// The number of processors in `/sys/devices/system/cpu/possible`.
fn possible_cpus() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    count_cpus(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/sys/devices/system/cpu/possible"))
}

/// A list of numbers and ranges: `0-3,8`. The kernel numbers its queues from 0, so that holes are not served.
fn count_cpus(list: &str) -> Option<u16> {
    let mut count = 0u16;
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        if first != count || last < first {
            return None;
        }
        count = last.checked_add(1)?;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_if_there_are_no_holes() {
        assert_eq!(["0", "0-1\n", "0-3,4,5-7"].map(count_cpus), [Some(1), Some(2), Some(8)]);
        assert_eq!(["", "1", "0-3,8", "a-b", "3-1", "0-99999"].map(count_cpus), [None; 6]);
    }
}
