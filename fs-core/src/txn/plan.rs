//! What an operation needs before it begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster::Mode;

use crate::alloc::Purpose;
use crate::hold::Ticket;

/// The domains an operation works on, and how.
pub struct Plan {
    pub domains: BTreeMap<u32, Mode>,
    pub purpose: Purpose,
    /// An inode whose pages may go to the kernel by this.
    pub(super) pages_of: Option<u64>,
    /// Times the operation has started over for want of space.
    pub space_tries: u32,
    /// A group that was found for it.
    pub kept: Option<Kept>,
}

/// Keeps a lock while an operation waits for others: for a time only, as nobody may wait for one lock while keeping another.
pub struct Kept {
    _ticket: Arc<parking_lot::Mutex<Option<Ticket>>>,
}

impl Kept {
    pub fn for_a_time(ticket: Ticket, time: std::time::Duration) -> Self {
        let kept = Arc::new(parking_lot::Mutex::new(Some(ticket)));
        let weak = Arc::downgrade(&kept);
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            let over = weak.upgrade().and_then(|k| k.lock().take());
            drop(over);
        });
        Self { _ticket: kept }
    }
}

impl Plan {
    pub fn read(domains: &[u32]) -> Self {
        Self::new(domains, Mode::Shared, Purpose::Grow)
    }
    pub fn write(domains: &[u32], purpose: Purpose) -> Self {
        Self::new(domains, Mode::Exclusive, purpose)
    }
    fn new(domains: &[u32], mode: Mode, purpose: Purpose) -> Self {
        Self {
            domains: domains.iter().map(|d| (*d, mode)).collect(),
            purpose,
            pages_of: None,
            space_tries: 0,
            kept: None,
        }
    }
    /// Pages of the inode may go to the kernel, or come from it (see [`crate::hold`]).
    pub fn with_pages_of(self, ino: u64) -> Self {
        Self { pages_of: Some(ino), ..self }
    }
    pub fn writes(&self) -> bool {
        self.domains.values().any(|m| *m == Mode::Exclusive)
    }
}
