//! A domain's file locks in memory: the table, what of it is in the tree, and the operations here that wait.
//!
//! | the node holds the domain | the table | own entries in it | others' entries |
//! |---|---|---|---|
//! | exclusively, `current` under the grant's tenure | counts; changed under a ticket | true | true |
//! | exclusively, not looked at since | to be read from the tree first | true | may be old |
//! | shared, or not at all | as it was written into the tree | true | may be old |
//!
//! Own entries are always true because nobody else changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cluster::{Grant, Mode, NodeId, Tenure};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::table::{Entry, Lock, LockTable, Owner, Space};

/// Whom the owners on this node wait for, in all domains.
pub type WaitsFor = Mutex<BTreeMap<(u32, u64), (Owner, BTreeSet<Owner>)>>;

/// An operation that waits for a lock.
#[derive(Default)]
pub struct Waiter {
    granted: AtomicBool,
    wake: Notify,
}

impl Waiter {
    pub async fn granted(&self) {
        while !self.is_granted() {
            self.wake.notified().await;
        }
    }

    fn is_granted(&self) -> bool {
        self.granted.load(Ordering::Acquire)
    }

    fn grant(&self) {
        self.granted.store(true, Ordering::Release);
        self.wake.notify_one();
    }
}

#[derive(Default)]
struct State {
    table: LockTable,
    /// The entries in the tree, as this node last read or wrote them.
    stored: BTreeMap<u64, Entry>,
    /// The tenure under which the table counts.
    current: Option<Tenure>,
    /// Waits of operations here, by number. An own wait in the table without one was given up.
    waiters: BTreeMap<u64, Arc<Waiter>>,
    /// Waits of other nodes that were told that their way is free.
    woken: BTreeSet<u64>,
    /// What owners here have given up, and the table still has: it goes before anything else is done under a ticket. An owner may
    /// ask again before the unlock gets its ticket, and so may another that the kernel gives the same number.
    ending: Vec<Lock>,
}

pub struct DomainLocks {
    domain: u32,
    state: Mutex<State>,
}

/// What became of a request.
pub enum Asked {
    Granted,
    /// Somebody is in the way, and the request does not wait.
    Refused,
    Deadlock,
    Waits(u64, Arc<Waiter>),
}

/// The node that works on a table, and what it knows of others.
pub struct View<'a> {
    pub me: NodeId,
    pub ended: &'a dyn Fn(NodeId) -> bool,
    pub waits_for: &'a WaitsFor,
}

impl DomainLocks {
    pub fn new(domain: u32) -> Self {
        Self { domain, state: Mutex::default() }
    }

    /// Whether the table counts under this grant. It does as well if nobody else held the domain exclusively since.
    pub fn is_current(&self, grant: &Grant) -> bool {
        let mut s = self.state.lock();
        if grant.mode == Mode::Exclusive && s.current == Some(grant.previous_tenure) {
            s.current = Some(grant.tenure);
        }
        s.current == Some(grant.tenure)
    }

    /// Takes in what the tree says, under a new tenure.
    pub fn loaded(&self, stored: BTreeMap<u64, Entry>, tenure: Tenure) {
        let mut s = self.state.lock();
        s.table = LockTable::from_entries(&stored);
        s.stored = stored;
        s.current = Some(tenure);
        s.woken.clear();
    }

    /// What must be changed in the tree before the domain is given up under `tenure`: the entries as they are now, and as the
    /// tree has them.
    pub fn unstored(&self, tenure: Tenure) -> Option<(BTreeMap<u64, Entry>, BTreeMap<u64, Entry>)> {
        let s = self.state.lock();
        if s.current != Some(tenure) {
            return None;
        }
        let now = s.table.entries();
        (now != s.stored).then(|| (now, s.stored.clone()))
    }

    pub fn stored(&self, entries: BTreeMap<u64, Entry>) {
        self.state.lock().stored = entries;
    }

    // ---- under a ticket, the table being current ---------------------------------------------------------------

    /// Asks for a lock. Returns whom to wake, too.
    pub fn ask(&self, want: Lock, wait: bool, view: &View<'_>) -> (Asked, BTreeSet<NodeId>) {
        let mut s = self.state.lock();
        let mut wake = s.settle(self.domain, view);
        if want.space == Space::Flock {
            if s.table.holds(&want) {
                return (Asked::Granted, wake);
            }
            // As on Linux the old lock goes first, so that two that both want more do not wait for each other.
            s.table.clear(&want, 0, u64::MAX);
            wake.append(&mut s.settle(self.domain, view));
        }
        let asked = if s.table.obstacles(&want, None).none() {
            s.table.set(want);
            Asked::Granted
        } else if !wait {
            Asked::Refused
        } else if want.space == Space::Record && s.deadlock(&want, view) {
            Asked::Deadlock
        } else {
            let (number, waiter) = (s.table.wait(want), Arc::new(Waiter::default()));
            s.waiters.insert(number, waiter.clone());
            Asked::Waits(number, waiter)
        };
        wake.append(&mut s.settle(self.domain, view));
        (asked, wake)
    }

    pub fn in_the_way(&self, want: &Lock, view: &View<'_>) -> (Option<Lock>, BTreeSet<NodeId>) {
        let mut s = self.state.lock();
        let wake = s.settle(self.domain, view);
        (s.table.in_the_way(want), wake)
    }

    /// Grants what can be granted. The wait `overtakes` may pass those ahead of it that only wait.
    pub fn look(&self, overtakes: Option<u64>, view: &View<'_>) -> BTreeSet<NodeId> {
        let mut s = self.state.lock();
        let mut wake = s.settle(self.domain, view);
        if let Some(n) = overtakes
            && let Some(want) = s.table.waiting(n).copied()
            && s.table.obstacles(&want, Some(n)).holders.is_empty()
        {
            s.grant(n);
            wake.append(&mut s.settle(self.domain, view));
        }
        wake
    }

    /// The domain was freed, and all its files with it.
    pub fn forget(&self) {
        let mut s = self.state.lock();
        (s.table, s.stored, s.current) = (LockTable::default(), BTreeMap::new(), None);
        s.ending.clear();
    }

    // ---- at any time -------------------------------------------------------------------------------------------

    /// The owner of `of` gives up what lies within its range: true if it has anything there. It counts before all that is
    /// asked from now on; a [`Self::look`] makes it so.
    pub fn end(&self, of: Lock) -> bool {
        let mut s = self.state.lock();
        let any = s.table.has(of.file, of.space, of.owner);
        if any {
            s.ending.push(of);
        }
        any
    }

    /// Ends an operation's wait. True if the lock has been granted: then it is the operation's.
    pub fn give_up(&self, number: u64, waits_for: &WaitsFor) -> bool {
        let waiter = self.state.lock().waiters.remove(&number);
        waits_for.lock().remove(&(self.domain, number));
        waiter.is_none_or(|w| w.is_granted())
    }

    pub fn anyone_waits(&self) -> bool {
        !self.state.lock().waiters.is_empty()
    }

    /// Files on which this node holds locks.
    pub fn files_of(&self, me: NodeId) -> BTreeSet<u64> {
        self.state.lock().table.files_of(me)
    }
}

impl State {
    /// Drops what is over, grants what can be granted here, and tells which other nodes have a free way now.
    fn settle(&mut self, domain: u32, view: &View<'_>) -> BTreeSet<NodeId> {
        for of in self.ending.drain(..) {
            self.table.clear(&of, of.first, of.last);
        }
        let (me, waiters) = (view.me, &self.waiters);
        self.table.retain(|n, e| {
            let node = e.lock.owner.node;
            let given_up = node == me && e.waits && !waiters.contains_key(&n);
            !given_up && (node == me || !(view.ended)(node))
        });
        while let Some((n, _)) = self.table.ready().into_iter().find(|(_, o)| o.node == me) {
            self.grant(n);
        }
        self.note_waits(domain, view.waits_for);
        let ready = self.table.ready().into_iter().filter(|(_, o)| o.node != me);
        ready.filter(|(n, _)| self.woken.insert(*n)).map(|(_, o)| o.node).collect()
    }

    fn grant(&mut self, number: u64) {
        self.table.grant(number);
        if let Some(w) = self.waiters.remove(&number) {
            w.grant();
        }
    }

    fn note_waits(&self, domain: u32, waits_for: &WaitsFor) {
        let mut all = waits_for.lock();
        if self.waiters.is_empty() && all.is_empty() {
            return;
        }
        all.retain(|(d, n), _| *d != domain || self.waiters.contains_key(n));
        for n in self.waiters.keys() {
            if let Some(w) = self.table.waiting(*n).filter(|w| w.space == Space::Record) {
                all.insert((domain, *n), (w.owner, self.table.obstacles(w, Some(*n)).holders));
            }
        }
    }

    fn deadlock(&self, want: &Lock, view: &View<'_>) -> bool {
        let all = view.waits_for.lock();
        self.table.deadlock(want, |owner| {
            let waits = all.values().filter(|(who, _)| *who == owner);
            waits.flat_map(|(_, whom)| whom.iter().copied()).collect()
        })
    }
}
