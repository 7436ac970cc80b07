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

//!
//! With io_uring the kernel (6.18) neither repeats an INTERRUPT nor sends one for a signal that comes after the request
//! was made and before it was handed over. So an INTERRUPT of an absent request is remembered for a while, and when a
//! request that came this way is armed, `/proc` is asked whether the thread that waits for it has a signal.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

type Callback = Box<dyn FnOnce() + Send>;

enum Slot {
    /// With the thread to ask about, if the kernel may not tell of its signals.
    Waiting(Option<u32>),
    Armed(Callback),
    Interrupted,
}

const SHARDS: usize = 16;
/// Interrupts remembered per shard. Those of requests already answered stay until pushed out.
const EARLY: usize = 32;

#[derive(Default)]
struct Shard {
    slots: HashMap<u64, Slot>,
    early: VecDeque<u64>,
}

/// The outstanding requests of a session, by unique. Sharded, so that it costs two uncontended locks per request.
#[derive(Default)]
pub struct InterruptTable {
    shards: [Mutex<Shard>; SHARDS],
}

impl InterruptTable {
    fn shard(&self, unique: u64) -> &Mutex<Shard> {
        // The kernel counts uniques up in steps of two.
        &self.shards[(unique >> 1) as usize % SHARDS]
    }

    /// `waiter`: the waiting thread, if the kernel may not tell of its signals.
    pub(crate) fn register(&self, unique: u64, waiter: Option<u32>) {
        let mut shard = self.shard(unique).lock();
        let early = shard.early.contains(&unique);
        shard.slots.insert(unique, if early { Slot::Interrupted } else { Slot::Waiting(waiter) });
    }

    pub(crate) fn remove(&self, unique: u64) {
        let slot = self.shard(unique).lock().slots.remove(&unique);
        // A callback may own things whose drop takes locks: not under ours.
        drop(slot);
    }

    /// False if the request is not outstanding.
    pub(crate) fn interrupt(&self, unique: u64) -> bool {
        let before = match self.shard(unique).lock().slots.get_mut(&unique) {
            Some(slot) => std::mem::replace(slot, Slot::Interrupted),
            None => return false,
        };
        if let Slot::Armed(callback) = before {
            callback();
        }
        true
    }

    /// Interrupts the request, or remembers to do it when it is registered.
    pub(crate) fn interrupt_now_or_later(&self, unique: u64) {
        {
            let mut shard = self.shard(unique).lock();
            if !shard.slots.contains_key(&unique) {
                if shard.early.len() == EARLY {
                    shard.early.pop_front();
                }
                return shard.early.push_back(unique);
            }
        }
        self.interrupt(unique);
    }

    /// Nobody waits for any answer any more.
    pub(crate) fn interrupt_all(&self) {
        for shard in &self.shards {
            let mut armed = Vec::new();
            for slot in shard.lock().slots.values_mut() {
                if let Slot::Armed(callback) = std::mem::replace(slot, Slot::Interrupted) {
                    armed.push(callback);
                }
            }
            armed.into_iter().for_each(|callback| callback());
        }
    }

    pub(crate) fn arm(&self, unique: u64, callback: Callback) {
        let mut shard = self.shard(unique).lock();
        let outdated = match shard.slots.get_mut(&unique) {
            Some(Slot::Interrupted) => {
                drop(shard);
                return callback();
            }
            Some(slot) => std::mem::replace(slot, Slot::Armed(callback)),
            // Answered meanwhile, or never registered as a test may build one: nothing can interrupt it.
            None => return,
        };
        drop(shard);
        if let Slot::Waiting(Some(thread)) = outdated
            && has_signal(thread)
        {
            self.interrupt(unique);
        }
    }

    pub(crate) fn is_interrupted(&self, unique: u64) -> bool {
        matches!(self.shard(unique).lock().slots.get(&unique), Some(Slot::Interrupted))
    }
}

/// Whether a signal is about to be delivered to a thread that waits in the kernel.
fn has_signal(thread: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{thread}/status")).is_ok_and(|status| pending(&status, thread))
}

/// A signal to the process counts for its first thread, which the kernel prefers: it may be meant for another.
fn pending(status: &str, thread: u32) -> bool {
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim();
    let set = |name| u64::from_str_radix(field(name), 16).unwrap_or(0);
    let shared = if field("Tgid:").parse() == Ok(thread) { set("ShdPnd:") } else { 0 };
    (set("SigPnd:") | shared) & !set("SigBlk:") != 0
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
        table.register(2, None);
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
                table.register(n * 2, None);
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
        table.register(4, None);
        let (count, callback) = counter();
        table.arm(4, callback);
        table.remove(4);
        assert!(!table.interrupt(4));
        assert_eq!(count.load(Ordering::SeqCst), 0);
        assert_eq!(Arc::strong_count(&count), 1, "the callback is gone with its request");
    }
    #[test]
    fn an_interrupt_before_its_request_is_remembered_but_not_for_ever() {
        let table = InterruptTable::default();
        table.interrupt_now_or_later(2);
        table.register(2, None);
        let (count, callback) = counter();
        table.arm(2, callback);
        assert_eq!(count.load(Ordering::SeqCst), 1);

        let same_shard = |n: u64| (n * SHARDS as u64) << 1;
        table.interrupt_now_or_later(same_shard(1));
        (2..EARLY as u64 + 2).for_each(|n| table.interrupt_now_or_later(same_shard(n)));
        table.register(same_shard(1), None);
        assert!(!table.is_interrupted(same_shard(1)));
        table.register(same_shard(2), None);
        assert!(table.is_interrupted(same_shard(2)));

        table.register(6, None);
        table.interrupt_now_or_later(6);
        assert!(table.is_interrupted(6));
    }

    #[test]
    fn signals_are_pending_for_a_thread_unless_blocked_or_for_its_process() {
        let status = |own, shared, blocked| {
            format!(
                "Name:\tx\nTgid:\t7\nPid:\t7\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n"
            )
        };
        assert!(!pending(&status(0, 0, 0), 7));
        assert!(pending(&status(0x200, 0, 0), 7));
        assert!(pending(&status(0x200, 0, 0), 8));
        assert!(pending(&status(0, 0x2000, 0), 7));
        assert!(!pending(&status(0, 0x2000, 0), 8));
        assert!(!pending(&status(0x200, 0x2000, 0x2200), 7));
        assert!(!pending("", 7));
    }
}
