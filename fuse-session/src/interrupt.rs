//! Outstanding requests, and whom to call when the process that waits for one gets a signal.
//!
//! | state of a unique | INTERRUPT arrives            | `on_interrupt`              | answered |
//! |-------------------|------------------------------|-----------------------------|----------|
//! | absent            | the kernel is told to retry  | nothing                     |          |
//! | waiting           | interrupted                  | armed                       | absent   |
//! | armed             | interrupted, callback called | armed with the new callback | absent   |
//! | interrupted       | nothing new                  | called at once              | absent   |
//!
//! The end of the session interrupts all that is outstanding: the waiting processes have had their error already, and
//! whoever works for them should stop.
//!
//! "Absent" covers two cases that look alike: a request that another reader thread has just received and not yet
//! registered, and one that is already answered. A retry (EAGAIN) is right for both: the kernel repeats the INTERRUPT
//! only while the request exists.

use std::collections::HashMap;

use parking_lot::Mutex;

type Callback = Box<dyn FnOnce() + Send>;

enum Slot {
    Waiting,
    Armed(Callback),
    Interrupted,
}

const SHARDS: usize = 16;

/// The outstanding requests of a session, by unique. Sharded, so that it costs two uncontended locks per request.
#[derive(Default)]
pub struct InterruptTable {
    shards: [Mutex<HashMap<u64, Slot>>; SHARDS],
}

impl InterruptTable {
    fn shard(&self, unique: u64) -> &Mutex<HashMap<u64, Slot>> {
        // The kernel counts uniques up in steps of two.
        &self.shards[(unique >> 1) as usize % SHARDS]
    }

    pub(crate) fn register(&self, unique: u64) {
        self.shard(unique).lock().insert(unique, Slot::Waiting);
    }

    pub(crate) fn remove(&self, unique: u64) {
        let slot = self.shard(unique).lock().remove(&unique);
        // A callback may own things whose drop takes locks: not under ours.
        drop(slot);
    }

    /// False if the request is not outstanding.
    pub(crate) fn interrupt(&self, unique: u64) -> bool {
        let before = match self.shard(unique).lock().get_mut(&unique) {
            Some(slot) => std::mem::replace(slot, Slot::Interrupted),
            None => return false,
        };
        if let Slot::Armed(callback) = before {
            callback();
        }
        true
    }

    /// Nobody waits for any answer any more.
    pub(crate) fn interrupt_all(&self) {
        for shard in &self.shards {
            let mut armed = Vec::new();
            for slot in shard.lock().values_mut() {
                if let Slot::Armed(callback) = std::mem::replace(slot, Slot::Interrupted) {
                    armed.push(callback);
                }
            }
            armed.into_iter().for_each(|callback| callback());
        }
    }

    pub(crate) fn arm(&self, unique: u64, callback: Callback) {
        let mut shard = self.shard(unique).lock();
        let outdated = match shard.get_mut(&unique) {
            Some(Slot::Interrupted) => {
                drop(shard);
                return callback();
            }
            Some(slot) => std::mem::replace(slot, Slot::Armed(callback)),
            // Answered meanwhile, or never registered as a test may build one: nothing can interrupt it.
            None => return,
        };
        drop(shard);
        drop(outdated);
    }

    pub(crate) fn is_interrupted(&self, unique: u64) -> bool {
        matches!(self.shard(unique).lock().get(&unique), Some(Slot::Interrupted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn counter() -> (Arc<AtomicUsize>, Callback) {
        let count = Arc::new(AtomicUsize::new(0));
        let inner = count.clone();
        let callback = Box::new(move || {
            inner.fetch_add(1, Ordering::SeqCst);
        });
        (count, callback)
    }

    #[test]
    fn a_callback_is_called_once_whichever_comes_first() {
        let table = InterruptTable::default();
        table.register(2);
        let (count, callback) = counter();
        table.arm(2, callback);
        assert!(!table.is_interrupted(2));
        assert!(table.interrupt(2));
        assert!(table.interrupt(2));
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert!(table.is_interrupted(2));

        let (late, callback) = counter();
        table.arm(2, callback);
        assert_eq!(late.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_end_of_the_session_interrupts_everything() {
        let table = InterruptTable::default();
        let counts: Vec<_> = (1..100u64)
            .map(|n| {
                let (count, callback) = counter();
                table.register(n * 2);
                table.arm(n * 2, callback);
                count
            })
            .collect();
        table.interrupt_all();
        assert!(counts.iter().all(|c| c.load(Ordering::SeqCst) == 1));
        assert!(table.is_interrupted(2));
    }

    #[test]
    fn an_answered_or_unknown_request_asks_for_a_retry() {
        let table = InterruptTable::default();
        assert!(!table.interrupt(4));
        table.register(4);
        let (count, callback) = counter();
        table.arm(4, callback);
        table.remove(4);
        assert!(!table.interrupt(4));
        assert_eq!(count.load(Ordering::SeqCst), 0);
        assert_eq!(Arc::strong_count(&count), 1, "the callback is gone with its request");
    }
}
