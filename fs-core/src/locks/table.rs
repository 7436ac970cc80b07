//! The file locks of one domain: who holds what, who waits, and in what order. Plain data without I/O.
//!
//! `fcntl` locks and `flock` locks do not meet, as on a local Linux filesystem. Within one of the two spaces of a file:
//!
//! - A lock is granted if no other owner holds a conflicting one and nobody who waits ahead wants a conflicting one. Those
//!   ahead who wait for the asker itself do not count, or a process could not add to what it has.
//! - An owner's locks never overlap; neighbours of one kind are one lock; a new lock replaces what it covers.
//! - Each entry has a number. Numbers grow, so those of waiters are their order.
//!
//! Entries of a node are changed by that node alone, whoever holds the domain: what a dead node did last needs no replay.

use std::collections::{BTreeMap, BTreeSet};

use cluster::NodeId;

/// The last byte of a lock that reaches to the end of the file, however long that gets.
pub const TO_THE_END: u64 = i64::MAX as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// `fcntl` record locks, open file description locks among them.
    Record,
    /// `flock`, always on the whole file.
    Flock,
}

/// Whose a lock is: a process's table of files, or an open file description, on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    pub node: NodeId,
    pub id: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Local number of the inode.
    pub file: u64,
    pub space: Space,
    pub owner: Owner,
    pub first: u64,
    /// Included.
    pub last: u64,
    pub exclusive: bool,
    /// Of the process that set it, on its node; only to be shown.
    pub pid: u32,
}

impl Lock {
    pub fn conflicts(&self, other: &Lock) -> bool {
        self.owner != other.owner && self.overlaps(other) && (self.exclusive || other.exclusive)
    }

    fn overlaps(&self, other: &Lock) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    fn place(&self) -> Place {
        (self.file, self.space)
    }
}

/// A lock that is held, or waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub lock: Lock,
    pub waits: bool,
}

type Place = (u64, Space);

#[derive(Clone, Debug, Default)]
struct Queue {
    held: BTreeMap<u64, Lock>,
    waiting: BTreeMap<u64, Lock>,
}

/// What stands in the way of a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Obstacles {
    pub holders: BTreeSet<Owner>,
    /// Owners of waits that come first.
    pub ahead: BTreeSet<Owner>,
}

impl Obstacles {
    pub fn none(&self) -> bool {
        self.holders.is_empty() && self.ahead.is_empty()
    }
}

#[derive(Clone, Debug, Default)]
pub struct LockTable {
    queues: BTreeMap<Place, Queue>,
    next: u64,
}

impl LockTable {
    pub fn from_entries(entries: &BTreeMap<u64, Entry>) -> Self {
        let mut t = Self { next: entries.keys().next_back().map_or(0, |n| n + 1), ..Self::default() };
        for (number, e) in entries {
            let q = t.queues.entry(e.lock.place()).or_default();
            let list = if e.waits { &mut q.waiting } else { &mut q.held };
            list.insert(*number, e.lock);
        }
        t
    }

    pub fn entries(&self) -> BTreeMap<u64, Entry> {
        let of = |list: &BTreeMap<u64, Lock>, waits| -> Vec<(u64, Entry)> {
            list.iter().map(|(n, lock)| (*n, Entry { lock: *lock, waits })).collect()
        };
        self.queues.values().flat_map(|q| [of(&q.held, false), of(&q.waiting, true)].concat()).collect()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    // ---- asking ------------------------------------------------------------------------------------------------

    /// What stands in the way of `want`, which waits as `number` or not at all yet.
    pub fn obstacles(&self, want: &Lock, number: Option<u64>) -> Obstacles {
        let Some(q) = self.queues.get(&want.place()) else { return Obstacles::default() };
        let holders = q.held.values().filter(|l| l.conflicts(want)).map(|l| l.owner).collect();
        let waits_for_me = |w: &Lock| q.held.values().any(|l| l.owner == want.owner && l.conflicts(w));
        let ahead = q.waiting.range(..number.unwrap_or(u64::MAX)).map(|(_, w)| w);
        let ahead = ahead.filter(|w| w.conflicts(want) && !waits_for_me(w)).map(|w| w.owner).collect();
        Obstacles { holders, ahead }
    }

    /// The first lock that `want` would have to wait for, as F_GETLK tells: a waiter ahead counts as the holder that it is
    /// about to be.
    pub fn in_the_way(&self, want: &Lock) -> Option<Lock> {
        let obstacles = self.obstacles(want, None);
        let q = self.queues.get(&want.place())?;
        let by_place = |list: Vec<&Lock>| list.into_iter().min_by_key(|l| (l.first, l.last)).copied();
        let held = by_place(q.held.values().filter(|l| l.conflicts(want)).collect());
        held.or_else(|| {
            let ahead = |l: &&Lock| l.conflicts(want) && obstacles.ahead.contains(&l.owner);
            by_place(q.waiting.values().filter(ahead).collect())
        })
    }

    /// Whether waiting for `want` closes a circle of owners that wait for each other. `elsewhere` tells whom an owner waits for
    /// in other domains. Waits behind other waiters do not count: they end by overtaking.
    pub fn deadlock(&self, want: &Lock, elsewhere: impl Fn(Owner) -> Vec<Owner>) -> bool {
        let mut reached: BTreeSet<Owner> = self.obstacles(want, None).holders;
        let mut next: Vec<Owner> = reached.iter().copied().collect();
        while let Some(owner) = next.pop() {
            if owner == want.owner {
                return true;
            }
            let waits = self.queues.iter().filter(|((_, space), _)| *space == Space::Record);
            let waits = waits.flat_map(|(_, q)| q.waiting.iter()).filter(|(_, w)| w.owner == owner);
            let here = waits.flat_map(|(n, w)| self.obstacles(w, Some(*n)).holders);
            for o in here.chain(elsewhere(owner)) {
                if reached.insert(o) {
                    next.push(o);
                }
            }
        }
        false
    }

    // ---- changing ----------------------------------------------------------------------------------------------

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Gives the owner the lock, in place of what it holds there.
    pub fn set(&mut self, lock: Lock) {
        let mut lock = lock;
        self.clear(&lock, lock.first, lock.last);
        let number = self.number();
        let q = self.queues.entry(lock.place()).or_default();
        let touches = |l: &Lock| {
            l.owner == lock.owner
                && l.exclusive == lock.exclusive
                && (l.last.checked_add(1) == Some(lock.first) || lock.last.checked_add(1) == Some(l.first))
        };
        let neighbours: Vec<u64> = q.held.iter().filter(|(_, l)| touches(l)).map(|(n, _)| *n).collect();
        for n in neighbours {
            if let Some(l) = q.held.remove(&n) {
                lock.first = lock.first.min(l.first);
                lock.last = lock.last.max(l.last);
            }
        }
        q.held.insert(number, lock);
    }

    /// Takes from the owner of `of` what it holds between `first` and `last`. True if that was anything.
    pub fn clear(&mut self, of: &Lock, first: u64, last: u64) -> bool {
        let place = of.place();
        let Some(q) = self.queues.get(&place) else { return false };
        let within = |l: &Lock| l.owner == of.owner && l.first <= last && first <= l.last;
        let hit: Vec<(u64, Lock)> = q.held.iter().filter(|(_, l)| within(l)).map(|(n, l)| (*n, *l)).collect();
        for (n, l) in &hit {
            let left = (l.first < first).then(|| Lock { last: first - 1, ..*l });
            let right = (l.last > last).then(|| Lock { first: last + 1, ..*l });
            let numbers = [self.number(), self.number()];
            let q = self.queues.entry(place).or_default();
            q.held.remove(n);
            for (number, rest) in numbers.into_iter().zip([left, right]) {
                if let Some(rest) = rest {
                    q.held.insert(number, rest);
                }
            }
        }
        self.drop_empty(place);
        !hit.is_empty()
    }

    /// Whether the owner holds just this lock already.
    pub fn holds(&self, lock: &Lock) -> bool {
        let same = |l: &Lock| {
            l.owner == lock.owner && l.exclusive == lock.exclusive && l.first <= lock.first && l.last >= lock.last
        };
        self.queues.get(&lock.place()).is_some_and(|q| q.held.values().any(same))
    }

    /// Puts `want` at the end of the queue.
    pub fn wait(&mut self, want: Lock) -> u64 {
        let number = self.number();
        self.queues.entry(want.place()).or_default().waiting.insert(number, want);
        number
    }

    /// Ends a wait. Returns the lock that was waited for, if it still was.
    pub fn end_wait(&mut self, number: u64) -> Option<Lock> {
        let found = self.queues.iter_mut().find_map(|(place, q)| Some((*place, q.waiting.remove(&number)?)));
        let (place, lock) = found?;
        self.drop_empty(place);
        Some(lock)
    }

    /// Ends a wait with the lock.
    pub fn grant(&mut self, number: u64) {
        if let Some(lock) = self.end_wait(number) {
            self.set(lock);
        }
    }

    /// Waits in whose way nothing stands, in order. Granting one may put it into the way of the next.
    pub fn ready(&self) -> Vec<(u64, Owner)> {
        let waits = self.queues.values().flat_map(|q| q.waiting.iter());
        waits.filter(|(n, w)| self.obstacles(w, Some(**n)).none()).map(|(n, w)| (*n, w.owner)).collect()
    }

    pub fn waiting(&self, number: u64) -> Option<&Lock> {
        self.queues.values().find_map(|q| q.waiting.get(&number))
    }

    /// Keeps the entries for which `keep(number, entry)` says so. True if some went.
    pub fn retain(&mut self, mut keep: impl FnMut(u64, &Entry) -> bool) -> bool {
        let mut gone = false;
        for q in self.queues.values_mut() {
            for (list, waits) in [(&mut q.held, false), (&mut q.waiting, true)] {
                list.retain(|n, lock| {
                    let stays = keep(*n, &Entry { lock: *lock, waits });
                    gone |= !stays;
                    stays
                });
            }
        }
        self.queues.retain(|_, q| !q.held.is_empty() || !q.waiting.is_empty());
        gone
    }

    /// Whether the owner holds anything in this space of the file.
    pub fn has(&self, file: u64, space: Space, owner: Owner) -> bool {
        self.queues.get(&(file, space)).is_some_and(|q| q.held.values().any(|l| l.owner == owner))
    }

    /// Files on which a node holds locks.
    pub fn files_of(&self, node: NodeId) -> BTreeSet<u64> {
        let held = |q: &Queue| q.held.values().any(|l| l.owner.node == node);
        self.queues.iter().filter(|(_, q)| held(q)).map(|((file, _), _)| *file).collect()
    }

    fn drop_empty(&mut self, place: Place) {
        if self.queues.get(&place).is_some_and(|q| q.held.is_empty() && q.waiting.is_empty()) {
            self.queues.remove(&place);
        }
    }
}
