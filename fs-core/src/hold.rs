//! Admission of operations to what a cluster lock protects, and the order of its revocation (section 2.6 of the design).
//!
//! An operation takes a [`Ticket`] before it looks at anything of a domain or group (I1) and keeps it until its reply has
//! been given. A revocation moves through these stages:
//!
//! | stage | new operations | what happens |
//! |-------|----------------|--------------|
//! | `Open` | admitted, replies cacheable | normal work |
//! | `Serving` | admitted, replies not cacheable | older tickets drain, then the kernel's caches are invalidated; what is read or written meanwhile is remembered and invalidated too |
//! | `Blocked` | wait | the last tickets drain, changes are placed (I3), the lock block is changed |
//!
//! Then the stage is `Open` again with the lower mode (or none). The kernel's page invalidation waits for requests on
//! those pages, which is why requests are served during it.

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{Grant, LockId, Mode};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::error::FsError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Open,
    Serving,
    Blocked,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    grant: Option<Grant>,
    /// An acquire is in flight.
    acquiring: Option<Mode>,
    /// The strongest mode another node wants since the current grant.
    demanded: Option<Mode>,
    /// A revocation task is running.
    revoking: bool,
    /// Tickets given in the `Open` stage, and those given since the revocation began.
    tickets: usize,
    late_tickets: usize,
    /// Operations waiting to be admitted, and whether one was since the grant: a grant always serves someone.
    waiting: usize,
    served: bool,
    /// Why the latest acquire failed, until the next one starts.
    error: Option<FsError>,
    /// Inodes whose pages may go to the kernel while it is being invalidated.
    touched: BTreeSet<u64>,
    usage: Usage,
}

/// How much a lock was used by this node, since it first was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Operations admitted.
    pub operations: u64,
    /// Grants from the lock block, upgrades among them.
    pub acquired: u64,
    /// Times that it was given up or lowered to shared.
    pub given_up: u64,
}

/// The state of one lock on this node.
#[derive(Debug)]
pub struct Hold {
    /// Revocations and the taking over of grants follow each other.
    pub turn: tokio::sync::Mutex<()>,
    pub id: LockId,
    state: Mutex<State>,
    changed: Notify,
}

/// The right to use what a lock protects, in the mode it was asked for.
#[derive(Debug)]
pub struct Ticket {
    hold: Arc<Hold>,
    cacheable: bool,
}

/// What [`Hold::try_enter`] found.
pub enum Entry {
    Admitted(Ticket),
    /// Start an acquire in this mode, then wait.
    Acquire(Mode),
    Wait,
}

impl Hold {
    pub fn new(id: LockId) -> Arc<Self> {
        Arc::new(Self {
            turn: tokio::sync::Mutex::new(()),
            id,
            state: Mutex::new(State {
                stage: Stage::Open,
                grant: None,
                acquiring: None,
                demanded: None,
                revoking: false,
                tickets: 0,
                late_tickets: 0,
                waiting: 0,
                served: false,
                error: None,
                touched: BTreeSet::new(),
                usage: Usage::default(),
            }),
            changed: Notify::new(),
        })
    }

    /// The grant under which the lock is held now.
    pub fn grant(&self) -> Option<Grant> {
        self.state.lock().grant
    }

    pub fn usage(&self) -> Usage {
        self.state.lock().usage
    }

    /// What is going on with it; `None`: nothing. For who wants to know what a node is waiting for.
    pub fn busy(&self) -> Option<String> {
        let s = self.state.lock();
        let users = s.tickets + s.late_tickets;
        if s.stage == Stage::Open && s.acquiring.is_none() && !s.revoking && users + s.waiting == 0 {
            return None;
        }
        let taken = if self.turn.try_lock().is_err() { ", being taken over or given up" } else { "" };
        Some(format!(
            "{}: {:?}, held {:?}, wanted {:?}, demanded {:?}{taken}; {users} operations have it, {} wait for it",
            self.id,
            s.stage,
            s.grant.map(|g| g.mode),
            s.acquiring,
            s.demanded,
            s.waiting
        ))
    }

    /// Admits an operation, or says what is missing.
    pub fn try_enter(self: &Arc<Self>, mode: Mode) -> Entry {
        self.try_enter_with_pages(mode, None)
    }

    /// ... by which pages of an inode may get into the kernel's cache. If that is being invalidated they are remembered at once,
    /// as the operation may get to them, or the kernel to its reply, when nobody asks for them any more.
    pub fn try_enter_with_pages(self: &Arc<Self>, mode: Mode, pages_of: Option<u64>) -> Entry {
        let mut s = self.state.lock();
        if s.stage != Stage::Blocked && s.grant.is_some_and(|g| g.mode >= mode) {
            let cacheable = s.stage == Stage::Open;
            if cacheable {
                s.tickets += 1
            } else {
                s.late_tickets += 1;
                s.touched.extend(pages_of);
            }
            s.served = true;
            s.usage.operations += 1;
            return Entry::Admitted(Ticket { hold: self.clone(), cacheable });
        }
        if s.stage == Stage::Open && !s.revoking && s.acquiring.is_none() {
            s.acquiring = Some(mode);
            s.error = None;
            return Entry::Acquire(mode);
        }
        Entry::Wait
    }

    /// For the revocation itself: what it writes back before it changes the lock block.
    pub fn revokers_ticket(self: &Arc<Self>) -> Ticket {
        self.state.lock().late_tickets += 1;
        Ticket { hold: self.clone(), cacheable: false }
    }

    /// For another lock's revocation, which operations that are admitted here may be waiting for: as long as one of them
    /// is, so that this lock cannot be given up yet, it is admitted too.
    pub fn join(self: &Arc<Self>) -> Option<Ticket> {
        let mut s = self.state.lock();
        let held = s.grant.is_some_and(|g| g.mode == Mode::Exclusive) && (s.tickets > 0 || s.late_tickets > 0);
        held.then(|| {
            s.late_tickets += 1;
            Ticket { hold: self.clone(), cacheable: false }
        })
    }

    /// Waits until `check` gives something; it is asked again whenever the state changes.
    pub async fn wait_until<T>(&self, mut check: impl FnMut() -> Option<T>) -> T {
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if let Some(v) = check() {
                return v;
            }
            notified.await;
        }
    }

    /// Counts the caller as a waiting operation while the guard lives.
    pub fn waiting(&self) -> Waiting<'_> {
        self.state.lock().waiting += 1;
        Waiting(self)
    }

    /// An acquire ended well: operations may enter. True: it was demanded meanwhile, start a revocation task.
    pub fn granted(&self, grant: Grant) -> bool {
        let mut s = self.state.lock();
        s.grant = Some(grant);
        s.usage.acquired += 1;
        s.acquiring = None;
        s.served = false;
        let start = !s.revoking && s.target().is_some();
        if start {
            s.revoking = true;
        }
        drop(s);
        self.changed.notify_waiters();
        start
    }

    /// An acquire failed.
    pub fn acquire_failed(&self, why: FsError) {
        {
            let mut s = self.state.lock();
            s.acquiring = None;
            s.error = Some(why);
        }
        self.changed.notify_waiters();
    }

    /// Why the latest acquire failed.
    pub fn error(&self) -> Option<FsError> {
        self.state.lock().error.clone()
    }

    /// Another node wants the lock. True: start a revocation task.
    pub fn demand(&self, wanted: Mode) -> bool {
        let mut s = self.state.lock();
        if s.grant.is_none() && s.acquiring.is_none() {
            return false;
        }
        s.demanded = s.demanded.max(Some(wanted));
        let start = !s.revoking && s.target().is_some();
        if start {
            s.revoking = true;
        }
        start
    }

    /// What the running revocation must lower the lock to; `None`: nothing is left to do, and the revocation is over.
    pub fn next_target(&self) -> Option<Option<Mode>> {
        let mut s = self.state.lock();
        let target = s.target();
        if target.is_none() {
            s.revoking = false;
            s.demanded = None;
            drop(s);
            self.changed.notify_waiters();
        }
        target
    }

    /// Gives the lock up without a demand (unmount, unused domains). False if a revocation runs already or nothing is held.
    pub fn begin_giving_up(&self) -> bool {
        let mut s = self.state.lock();
        let start = !s.revoking && s.grant.is_some();
        if start {
            s.revoking = true;
            s.demanded = Some(Mode::Exclusive);
        }
        start
    }

    /// First stage: replies are not cacheable from now on; returns once the earlier ones have been given.
    pub async fn serve_uncached(&self) {
        {
            let mut s = self.state.lock();
            s.stage = Stage::Serving;
            s.touched.clear();
        }
        self.wait_until(|| (self.state.lock().tickets == 0).then_some(())).await;
    }

    /// Takes what was read or written since the last call; if nothing was, blocks new operations and returns `None`.
    pub fn block_or_touched(&self) -> Option<Vec<u64>> {
        let mut s = self.state.lock();
        let touched = std::mem::take(&mut s.touched);
        if touched.is_empty() {
            s.stage = Stage::Blocked;
            return None;
        }
        Some(touched.into_iter().collect())
    }

    /// Whether a waiter has been let down so far: nobody was admitted since the grant though somebody waits.
    pub fn starving(&self) -> bool {
        let s = self.state.lock();
        !s.served && s.waiting > 0
    }

    /// Waits for the last operations.
    pub async fn drained(&self) {
        self.wait_until(|| {
            let s = self.state.lock();
            (s.tickets == 0 && s.late_tickets == 0).then_some(())
        })
        .await;
    }

    /// Waits for the end of a revocation that is under way.
    pub async fn given_up(&self) {
        self.wait_until(|| (self.state.lock().stage == Stage::Open).then_some(())).await;
    }

    /// The lock block was changed: `mode` is what is left.
    pub fn lowered(&self, mode: Option<Mode>) {
        let mut s = self.state.lock();
        s.usage.given_up += 1;
        s.grant = mode.and_then(|m| s.grant.map(|g| Grant { mode: m, ..g }));
        s.stage = Stage::Open;
        s.touched.clear();
        drop(s);
        self.changed.notify_waiters();
    }

    /// The domain was freed by an operation just installed. Whoever is admitted before the lock has been given up must not
    /// take what the device still has there for the domain.
    pub fn emptied(&self) {
        if let Some(grant) = &mut self.state.lock().grant {
            grant.value.root = 0;
        }
    }

    /// Everything is lost (I12): wakes all waiters, admits nobody.
    pub fn lost(&self) {
        let mut s = self.state.lock();
        s.grant = None;
        s.acquiring = None;
        s.stage = Stage::Open;
        drop(s);
        self.changed.notify_waiters();
    }
}

impl State {
    fn target(&self) -> Option<Option<Mode>> {
        match (self.grant.map(|g| g.mode), self.demanded) {
            (Some(_), Some(Mode::Exclusive)) => Some(None),
            (Some(Mode::Exclusive), Some(Mode::Shared)) => Some(Some(Mode::Shared)),
            _ => None,
        }
    }
}

/// Counts a waiting operation for its lifetime, also when it is cancelled.
pub struct Waiting<'a>(&'a Hold);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl Ticket {
    /// Whether the kernel may cache the reply without limit.
    pub fn cacheable(&self) -> bool {
        self.cacheable
    }

    pub fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut s = self.hold.state.lock();
        if self.cacheable {
            s.tickets -= 1
        } else {
            s.late_tickets -= 1
        }
        let wake = s.stage != Stage::Open && (s.tickets == 0 || s.late_tickets == 0);
        drop(s);
        if wake {
            self.hold.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Arc<Hold> {
        let hold = Hold::new(LockId::Domain(3));
        hold.granted(Grant {
            mode: Mode::Exclusive,
            tenure: 7,
            previous_tenure: 0,
            value: cluster::LockValue::default(),
            open_elsewhere: false,
            after_crash: false,
        });
        hold
    }

    /// A reader that is admitted while the kernel's pages are being dropped may wait for others of the domain before it gets to
    /// what it reads: its pages are dropped nevertheless.
    #[tokio::test]
    async fn pages_are_remembered_at_admission() {
        let hold = held();
        assert_eq!(hold.busy(), None);
        hold.serve_uncached().await;
        let Entry::Admitted(late) = hold.try_enter_with_pages(Mode::Shared, Some(8)) else { panic!("not admitted") };
        assert!(!late.cacheable());
        let told = hold.busy().expect("a revocation and an operation");
        assert!(told.contains("Serving") && told.contains("1 operations have it"), "{told}");
        assert_eq!(hold.block_or_touched(), Some(vec![8]));
        assert_eq!(hold.block_or_touched(), None);
        assert!(matches!(hold.try_enter_with_pages(Mode::Shared, Some(9)), Entry::Wait));
    }
}
