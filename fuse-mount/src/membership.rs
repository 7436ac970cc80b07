//! The mount's membership of the volume, which may end and begin anew while the mount point stays.
//!
//! A node that lapsed, or whose journal cannot be written, is dead to the others. Its volume is abandoned like after a
//! crash and a new one is opened, with a new incarnation. To the users of the mount:
//!
//! | phase | requests | kernel's caches |
//! |-------|----------|-----------------|
//! | `Open` | served | good while locks are held |
//! | `Lapsed` | wait, [`PATIENCE`] at most, then EIO; pages written back from memory maps fail at once | are being dropped |
//! | `Back` | reads of pages are served: dropping the caches waits for them; the others still wait | are dropped once more |
//!
//! What was under way when the membership ended gets EIO. Acknowledged changes that were not durable are gone, as after a
//! crash; an fsync that would vouch for them fails (I11, see [`crate::lost`]).

use std::sync::Arc;
use std::time::Duration;

use fs_core::{FsError, ROOT_INO, Remains, Volume};
use fuse_session::Op;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::file_locks::LockedThrough;
use crate::interrupt::Interrupt;
use crate::kernel_cache::KnownInodes;
use crate::lost::Losses;

/// How long requests wait for a membership.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between attempts to become a member again.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A membership that lasted this long makes the next pause short again.
const STABLE: Duration = Duration::from_secs(60);

enum Phase {
    Open(Arc<Volume>),
    Lapsed,
    Back(Arc<Volume>),
}

struct State {
    phase: Phase,
    /// How many memberships came before this one. Part of the handle of every open file.
    epoch: u64,
    /// Opens so far.
    opens: u64,
    /// Requests being served by this membership.
    under_way: usize,
}

/// The current membership, and the way to the next.
pub struct Membership {
    state: Mutex<State>,
    changed: Notify,
    known: Arc<KnownInodes>,
    pub losses: Losses,
    pub locked_through: LockedThrough,
}

/// A request's right to be served by a membership; it ends with this.
pub struct Pass {
    pub volume: Arc<Volume>,
    epoch: u64,
    pub membership: Arc<Membership>,
}

/// Of a handle, the bits that number opens; those above are the epoch.
const OPEN_BITS: u32 = 40;

/// The membership in which a handle was given.
pub fn epoch_of(handle: u64) -> u64 {
    handle >> OPEN_BITS
}

impl Pass {
    /// The handle of what this request opens, for the kernel to name it by: no other has it.
    pub fn handle(&self) -> u64 {
        let mut s = self.membership.state.lock();
        s.opens += 1;
        self.epoch << OPEN_BITS | s.opens & ((1 << OPEN_BITS) - 1)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut s = self.membership.state.lock();
        // No pass of an earlier epoch is left when the epoch changes.
        s.under_way -= 1;
        let wake = s.under_way == 0 && !matches!(s.phase, Phase::Open(_));
        drop(s);
        if wake {
            self.membership.changed.notify_waiters();
        }
    }
}

/// How a request behaves while there is no membership.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Holds a page of the kernel's cache locked, which dropping the caches waits for.
    HoldsPage,
    /// Brings a page from a memory map: out of date, and dropping the caches waits for it.
    WrittenBack,
    /// Ends something; nobody waits for it, and it must not get lost.
    Ends,
    Other,
}

fn kind(op: &Op) -> Kind {
    match op {
        Op::Read { .. } | Op::Readlink => Kind::HoldsPage,
        Op::Write { write_flags, .. } if write_flags & fuse_session::abi::WRITE_CACHE != 0 => Kind::WrittenBack,
        Op::Release { .. } | Op::Releasedir { .. } => Kind::Ends,
        _ => Kind::Other,
    }
}

impl Membership {
    pub fn new(volume: Arc<Volume>, known: Arc<KnownInodes>) -> Arc<Self> {
        let state = State { phase: Phase::Open(volume), epoch: 0, opens: 0, under_way: 0 };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Notify::new(),
            known,
            losses: Losses::default(),
            locked_through: LockedThrough::default(),
        })
    }

    fn try_admit(self: &Arc<Self>, kind: Kind) -> Option<Pass> {
        let mut s = self.state.lock();
        let volume = match &s.phase {
            Phase::Open(volume) => volume.clone(),
            Phase::Back(volume) if kind == Kind::HoldsPage => volume.clone(),
            Phase::Back(_) | Phase::Lapsed => return None,
        };
        s.under_way += 1;
        Some(Pass { volume, epoch: s.epoch, membership: self.clone() })
    }

    /// Lets a request in, after waiting for a membership if need be. `Err` is what to answer.
    pub async fn admit(self: &Arc<Self>, op: &Op, interrupt: &Interrupt) -> Result<Pass, i32> {
        let kind = kind(op);
        if let Some(pass) = self.try_admit(kind) {
            return Ok(pass);
        }
        match kind {
            Kind::WrittenBack => Err(libc::EIO),
            Kind::Ends => Ok(self.admitted(kind).await),
            Kind::HoldsPage | Kind::Other => {
                tokio::select! {
                    biased;
                    pass = self.admitted(kind) => Ok(pass),
                    () = interrupt.came() => Err(libc::EINTR),
                    () = tokio::time::sleep(PATIENCE) => Err(libc::EIO),
                }
            }
        }
    }

    async fn admitted(self: &Arc<Self>, kind: Kind) -> Pass {
        self.until(|| self.try_admit(kind)).await
    }

    async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(done) = ready() {
                return done;
            }
            changed.await;
        }
    }

    /// The volume, while there is a membership.
    pub fn volume(&self) -> Option<Arc<Volume>> {
        match &self.state.lock().phase {
            Phase::Open(volume) | Phase::Back(volume) => Some(volume.clone()),
            Phase::Lapsed => None,
        }
    }

    /// Keeps the mount a member: whenever the membership fails, opens the volume anew with `open`. Ends when the volume is left.
    pub async fn keep<F, E>(self: Arc<Self>, mut open: impl FnMut() -> F)
    where
        F: Future<Output = Result<Arc<Volume>, E>>,
        E: std::fmt::Display,
    {
        let mut pause = FIRST_PAUSE;
        while let Some(volume) = self.volume() {
            let since = Instant::now();
            let why = volume.failed().await;
            if why.is_leaving() {
                return;
            }
            if since.elapsed() > STABLE {
                pause = FIRST_PAUSE;
            }
            tracing::error!(node = %volume.node(), "no longer a member of the volume: {why}");
            let mut left = self.give_up(volume).await;
            let volume = loop {
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
                let opened = match open().await {
                    Ok(volume) => self.find_stale(&volume, &mut left).await.map(|()| volume).map_err(|e| e.to_string()),
                    Err(e) => Err(e.to_string()),
                };
                match opened {
                    Ok(volume) => break volume,
                    Err(e) => tracing::warn!("cannot become a member again yet: {e}"),
                }
            };
            self.begin_anew(volume, left).await;
        }
    }

    /// From the failure of a membership until nothing is left of it.
    async fn give_up(&self, volume: Arc<Volume>) -> Remains {
        // Our reference goes with the phase: the device must be closed before others can recover the slot.
        self.state.lock().phase = Phase::Lapsed;
        // Not waited for: it may wait for reads, which wait for the next membership.
        drop(self.forget_all());
        volume.abandon();
        self.until(|| (self.state.lock().under_way == 0).then_some(())).await;
        volume.remains()
    }

    /// Inodes made in the last moments may be gone and their numbers mean others now (with other generations): who still has
    /// one open must not write into somebody else's file.
    async fn find_stale(&self, volume: &Arc<Volume>, left: &mut Remains) -> fs_core::Result<()> {
        for domain in &left.lost {
            for (ino, generation) in self.known.of_domain(*domain) {
                let same = match volume.getattr(ino).await {
                    Ok(held) => held.value.inode.generation == generation,
                    Err(FsError::NotFound | FsError::Stale) => false,
                    Err(e) => {
                        volume.abandon();
                        return Err(e);
                    }
                };
                // The root is never given by name.
                if !same && ino != ROOT_INO {
                    self.known.is_gone(ino);
                    left.open.remove(&ino);
                }
            }
        }
        Ok(())
    }

    async fn begin_anew(&self, volume: Arc<Volume>, left: Remains) {
        volume.adopt_open(&left.open);
        {
            let mut s = self.state.lock();
            if !left.lost.is_empty() {
                tracing::error!(domains = ?left.lost, "changes of the last moments were lost; who made them gets EIO from fsync");
            }
            self.losses.happened(&left, s.epoch);
            s.epoch += 1;
            s.phase = Phase::Back(volume.clone());
        }
        self.changed.notify_waiters();
        if let Err(e) = self.forget_all().await {
            tracing::error!("a thread that notifies the kernel ended: {e}");
        }
        let node = volume.node();
        self.state.lock().phase = Phase::Open(volume);
        self.changed.notify_waiters();
        tracing::warn!(%node, "a member of the volume again");
    }

    fn forget_all(&self) -> tokio::task::JoinHandle<()> {
        let known = self.known.clone();
        tokio::task::spawn_blocking(move || known.forget_all())
    }
}
