//! Counts of what the locks of this node did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub $name: Counter,)* }

        /// Counts since the node joined.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct LockStats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub fn snapshot(&self) -> LockStats {
                LockStats { $($name: self.$name.get(),)* }
            }
        }
    };
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub fn one(&self) {
        self.add(1);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

counters! {
    /// Locks acquired or upgraded on disk.
    acquires,
    /// Of these, those that had to wait for another node.
    waits,
    /// Locks given up or lowered on disk.
    releases,
    /// Grants to other nodes by our releases.
    handovers,
    /// Demands passed to the client.
    demands,
    /// Locks given up that were granted to us after we had stopped waiting.
    unwanted,
    /// Compare-and-writes of lock blocks that found something else.
    miscompares,
    hints_sent,
    hints_received,
    /// Datagrams dropped: not authentic, not for us, or seen before.
    hints_rejected,
    /// Other nodes that were asked to look at a change.
    wakes,
    doorbells_written,
    /// Cells with something new in our doorbell row.
    doorbells_received,
    /// Dead nodes that we recovered.
    recoveries,
}
