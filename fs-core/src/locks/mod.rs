//! File locks of processes on all nodes: `fcntl` and `flock`.
//!
//! The node that holds a domain exclusively keeps the domain's file locks in memory, so that a lock that no other node asks
//! for costs nothing but a call. When it gives the domain up, what is live is written into the tree, with slot and
//! incarnation of each owner's node. Whoever finds an obstacle puts its wait into the table and waits without holding the domain; who
//! removes the obstacle, on whatever node, sees the wait and asks its node to look. A dead node's entries do not count.

mod domain;
mod table;
#[cfg(test)]
mod table_tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster::{Grant, LockId, Mode, NodeId};

use domain::{Asked, View, Waiter};
pub use domain::{DomainLocks, WaitsFor};
pub use table::{Entry, Lock, Owner, Space, TO_THE_END};

use crate::alloc::Purpose;
use crate::domain::Domain;
use crate::error::{FsError, Result};
use crate::format::file_lock;
use crate::format::item::{Key, Kind, ino_domain, ino_local};
use crate::hold::Ticket;
use crate::txn::{Plan, Txn};
use crate::volume::Volume;

/// A wait looks by itself this often, should it not have been woken, and passes then those who are ahead of it but get no
/// further: what they wait for may be what this one's owner holds elsewhere.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Entries read at once.
const AT_ONCE: usize = 512;

/// A lock as a process asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLock {
    pub space: Space,
    /// The process's table of files, or the open file description, as this node numbers them.
    pub owner: u64,
    pub first: u64,
    /// Included; [`TO_THE_END`] for a lock without end.
    pub last: u64,
    pub exclusive: bool,
    pub pid: u32,
}

impl FileLock {
    /// Of whatever an owner has in one space of a file.
    pub fn all_of(space: Space, owner: u64) -> Self {
        Self { space, owner, first: 0, last: TO_THE_END, exclusive: false, pid: 0 }
    }
}

/// A lock in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldLock {
    pub first: u64,
    pub last: u64,
    pub exclusive: bool,
    /// `None`: held on another node.
    pub pid: Option<u32>,
}

/// A wait that ends with the operation, also when that is dropped.
struct Waiting<'a> {
    volume: &'a Volume,
    domain: Arc<Domain>,
    number: u64,
}

impl Waiting<'_> {
    /// True: the lock was granted meanwhile.
    fn give_up(&self) -> bool {
        let granted = self.domain.locks.give_up(self.number, &self.volume.waits_for);
        if !granted {
            self.volume.look_soon(&self.domain, None);
        }
        granted
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Volume {
    /// Sets a lock, or fails with [`FsError::Locked`].
    pub async fn try_lock(&self, ino: u64, want: FileLock) -> Result<()> {
        match self.ask(ino, want, false).await? {
            Asked::Refused => Err(FsError::Locked),
            _ => Ok(()),
        }
    }

    /// Sets a lock, after waiting for it if need be, without holding the domain. [`FsError::Interrupted`] if `interrupted`
    /// comes first: then nothing has changed.
    pub async fn lock(&self, ino: u64, want: FileLock, interrupted: impl Future<Output = ()>) -> Result<()> {
        tokio::pin!(interrupted);
        let asked = tokio::select! {
            biased;
            asked = self.ask(ino, want, true) => asked?,
            () = &mut interrupted => return Err(FsError::Interrupted),
        };
        let (number, waiter) = match asked {
            Asked::Granted | Asked::Refused => return Ok(()),
            Asked::Deadlock => return Err(FsError::Deadlock),
            Asked::Waits(number, waiter) => (number, waiter),
        };
        let waiting = Waiting { volume: self, domain: self.domain(ino_domain(ino)), number };
        self.wait(&waiting, &waiter, interrupted).await
    }

    async fn wait(&self, waiting: &Waiting<'_>, waiter: &Waiter, interrupted: impl Future<Output = ()>) -> Result<()> {
        tokio::pin!(interrupted);
        loop {
            tokio::select! {
                biased;
                () = waiter.granted() => return Ok(()),
                why = self.failed() => return Err(why),
                () = &mut interrupted => {
                    return if waiting.give_up() { Ok(()) } else { Err(FsError::Interrupted) };
                }
                () = tokio::time::sleep(LOOK_AGAIN) => self.look_soon(&waiting.domain, Some(waiting.number)),
            }
        }
    }

    /// Takes a lock, or a part of it, from its owner.
    pub async fn unlock(&self, ino: u64, lock: FileLock) -> Result<()> {
        match self.begin_unlock(ino, lock) {
            true => self.finish_unlocks(ino).await,
            false => Ok(()),
        }
    }

    /// The first half of an unlock, which waits for nothing: all that is asked from now on finds the lock gone. False: nothing
    /// of the kind is held. Otherwise [`Self::finish_unlocks`] must follow, or waiters would not be woken.
    pub fn begin_unlock(&self, ino: u64, lock: FileLock) -> bool {
        self.domain(ino_domain(ino)).locks.end(self.of(ino, lock))
    }

    /// Carries out what was begun on the file.
    pub async fn finish_unlocks(&self, ino: u64) -> Result<()> {
        let domain = self.domain(ino_domain(ino));
        let _ticket = self.enter_locks(&domain).await?;
        let wake = domain.locks.look(None, &self.view(&|n| self.node.has_ended(n)));
        self.wake(&domain, wake);
        Ok(())
    }

    /// The lock that `want` would have to wait for.
    pub async fn test_lock(&self, ino: u64, want: FileLock) -> Result<Option<HeldLock>> {
        let domain = self.domain(ino_domain(ino));
        let want = self.of(ino, want);
        let _ticket = self.enter_locks(&domain).await?;
        let (found, wake) = domain.locks.in_the_way(&want, &self.view(&|n| self.node.has_ended(n)));
        self.wake(&domain, wake);
        Ok(found.map(|l| HeldLock {
            first: l.first,
            last: l.last,
            exclusive: l.exclusive,
            pid: (l.owner.node == self.node()).then_some(l.pid),
        }))
    }

    async fn ask(&self, ino: u64, want: FileLock, wait: bool) -> Result<Asked> {
        let domain = self.domain(ino_domain(ino));
        let want = self.of(ino, want);
        let _ticket = self.enter_locks(&domain).await?;
        let (asked, wake) = domain.locks.ask(want, wait, &self.view(&|n| self.node.has_ended(n)));
        self.wake(&domain, wake);
        Ok(asked)
    }

    fn of(&self, ino: u64, l: FileLock) -> Lock {
        let owner = Owner { node: self.node(), id: l.owner };
        let FileLock { space, first, last, exclusive, pid, .. } = l;
        Lock { file: ino_local(ino), space, owner, first, last, exclusive, pid }
    }

    fn view<'a>(&'a self, ended: &'a dyn Fn(NodeId) -> bool) -> View<'a> {
        View { me: self.node(), ended, waits_for: &self.waits_for }
    }

    fn wake(&self, domain: &Domain, nodes: BTreeSet<NodeId>) {
        for node in nodes {
            self.node.wake(node, domain.lock_id());
        }
    }

    // ---- the table and the tree --------------------------------------------------------------------------------

    /// Admits to the domain's locks. Not an operation on files: also where the mount is read-only.
    async fn enter_locks(&self, domain: &Arc<Domain>) -> Result<Ticket> {
        let ticket = self.enter(&domain.hold, Mode::Exclusive).await?;
        if domain.hold.grant().is_some_and(|g| domain.locks.is_current(&g)) {
            return Ok(ticket);
        }
        drop(ticket);
        let mut tx = Txn::begin(self, &Plan::write(&[domain.id], Purpose::Reclaim)).await?;
        let grant = domain.hold.grant().ok_or(FsError::NeedDomain(domain.id))?;
        // Another operation may have read it since.
        if !domain.locks.is_current(&grant) {
            self.load_locks(&mut tx, domain, &grant).await?;
        }
        // Nothing is installed; the ticket is what is wanted.
        let (_, tickets) = tx.install();
        tickets.into_iter().next().ok_or(FsError::NeedDomain(domain.id))
    }

    async fn load_locks(&self, tx: &mut Txn<'_>, domain: &Domain, grant: &Grant) -> Result<()> {
        let mut stored = BTreeMap::new();
        if tx.header(domain.id).await?.file_locks > 0 {
            let mut from = Some(0);
            while let Some(first) = from {
                let (from_key, to_key) = (Key::new(0, Kind::FileLock, first), Key::new(0, Kind::FileLock, u64::MAX));
                let items = tx.scan(domain.id, from_key, to_key, AT_ONCE).await?;
                from = items.last().filter(|_| items.len() == AT_ONCE).and_then(|(k, _)| k.offset.checked_add(1));
                for (key, value) in items {
                    let entry = file_lock::decode(&value).map_err(|e| FsError::format(LockId::Domain(domain.id), e))?;
                    stored.insert(key.offset, entry);
                }
            }
        }
        domain.locks.loaded(stored, grant.tenure);
        Ok(())
    }

    /// Before the domain is given up, its operations being blocked: writes down what is live.
    pub(crate) async fn store_locks(&self, domain: &Arc<Domain>) -> Result<()> {
        let exclusive = domain.hold.grant().filter(|g| g.mode == Mode::Exclusive);
        let Some((now, stored)) = exclusive.and_then(|g| domain.locks.unstored(g.tenure)) else { return Ok(()) };
        let mut plan = Plan::write(&[domain.id], Purpose::Reclaim);
        loop {
            let mut tx = Txn::within_revocation(self, domain.clone(), &plan).await?;
            let r = store(&mut tx, domain.id, &now, &stored).await;
            if self.finish(tx, r, &mut plan).await?.is_some() {
                domain.locks.stored(now);
                return Ok(());
            }
        }
    }

    // ---- being woken -------------------------------------------------------------------------------------------

    /// Looks what can be granted in a domain, in the background.
    pub(crate) fn look_soon(&self, domain: &Arc<Domain>, overtakes: Option<u64>) {
        let Some(volume) = self.me.upgrade() else { return };
        let domain = domain.clone();
        tokio::spawn(async move {
            // A failure is that of the waits, too, which see it themselves.
            if let Ok(_ticket) = volume.enter_locks(&domain).await {
                let wake = domain.locks.look(overtakes, &volume.view(&|n| volume.node.has_ended(n)));
                volume.wake(&domain, wake);
            }
        });
    }

    /// Another node removed an obstacle.
    pub(crate) fn look_if_waiting(&self, id: LockId) {
        if let LockId::Domain(d) = id {
            let domain = self.domains.lock().get(&d).cloned();
            if let Some(domain) = domain.filter(|d| d.locks.anyone_waits()) {
                self.look_soon(&domain, None);
            }
        }
    }

    /// A node ended, perhaps, and its locks with it.
    pub(crate) fn look_everywhere(&self) {
        let domains: Vec<_> = self.domains.lock().values().filter(|d| d.locks.anyone_waits()).cloned().collect();
        for d in domains {
            self.look_soon(&d, None);
        }
    }
}

async fn store(tx: &mut Txn<'_>, id: u32, now: &BTreeMap<u64, Entry>, stored: &BTreeMap<u64, Entry>) -> Result<()> {
    for n in stored.keys().filter(|n| !now.contains_key(n)) {
        tx.del(id, &Key::new(0, Kind::FileLock, *n)).await?;
    }
    for (n, entry) in now.iter().filter(|(n, e)| stored.get(n) != Some(e)) {
        tx.put(id, &Key::new(0, Kind::FileLock, *n), &file_lock::encode(entry)).await?;
    }
    tx.header(id).await?.file_locks = now.len() as u64;
    Ok(())
}
