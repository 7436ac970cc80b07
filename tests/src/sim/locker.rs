//! Processes that lock a file which all nodes share: `fcntl` ranges and `flock`, waiting or not, interrupted at times.
//!
//! No two live holders may conflict, whoever dies, and every wait ends. One that holds a lock and wants more may be refused
//! for the sake of a circle of waits; one that holds nothing never.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use fs_core::{FileLock, FsError, Space};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::client::{DIR, FILE, WHO};
use super::world::{Host, Outcome, Seat, Stop, World};

const BYTES: u64 = 6;
/// A wait that was not woken looks by itself after 3 seconds.
const LOOKS: Duration = Duration::from_secs(7);

struct Held {
    host: Arc<Host>,
    lock: FileLock,
}

/// What the processes share: the file, and who holds what.
pub struct Locked {
    file: u64,
    held: Mutex<Vec<Held>>,
}

fn conflict(a: &FileLock, b: &FileLock) -> bool {
    a.space == b.space && a.owner != b.owner && a.first <= b.last && b.first <= a.last && (a.exclusive || b.exclusive)
}

impl Locked {
    pub async fn make(world: &World, host: &Host, root: u64) -> Outcome<Arc<Self>> {
        let v = &host.volume;
        let dir = world.done(host, "mkdir", v.mkdir(WHO, root, b"locked", DIR)).await?.value.ino;
        let file = world.done(host, "create", v.mknod(WHO, dir, b"mbox", FILE, false)).await?.value.ino;
        Ok(Arc::new(Self { file, held: Mutex::default() }))
    }

    fn granted(&self, world: &World, host: &Arc<Host>, lock: FileLock) -> Outcome<()> {
        let mut held = self.held.lock();
        held.retain(|h| !h.host.dead());
        if let Some(other) = held.iter().find(|h| conflict(&h.lock, &lock)) {
            let e = format!("{} got {lock:?} while {} holds {:?}", host.name(), other.host.name(), other.lock);
            drop(held);
            return Err(world.fail(e));
        }
        held.push(Held { host: host.clone(), lock });
        Ok(())
    }

    /// Before an unlock, or a new lock, is asked for.
    fn over(&self, owner: u64) {
        self.held.lock().retain(|h| h.lock.owner != owner);
    }
}

/// One of the processes.
pub struct Locker {
    world: Arc<World>,
    shared: Arc<Locked>,
    owner: u64,
    rng: StdRng,
}

impl Locker {
    pub fn new(world: Arc<World>, shared: Arc<Locked>, index: usize) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(56 + index as u64));
        Self { world, shared, owner: index as u64 + 1, rng }
    }

    pub async fn live(mut self) {
        while let Some(seat) = self.world.seat(&mut self.rng).await {
            if self.work(&seat).await == Err(Stop::Failed) {
                return;
            }
        }
    }

    async fn work(&mut self, seat: &Seat) -> Outcome<()> {
        let host = &seat.host;
        while !self.world.over() && !host.retiring.load(Relaxed) && self.rng.random_range(0..100) > 2 {
            let space = if self.rng.random_bool(0.6) { Space::Record } else { Space::Flock };
            if self.lock(host, space, false).await? {
                self.pause(host, 60).await?;
                if self.rng.random_bool(0.2) {
                    self.lock(host, space, true).await?;
                    self.pause(host, 30).await?;
                }
            }
            self.shared.over(self.owner);
            let what = format!("unlock of owner {}", self.owner);
            let v = host.volume.clone();
            self.world.done(host, &what, v.unlock(self.shared.file, FileLock::all_of(space, self.owner))).await?;
            self.pause(host, self.world.setup.think_ms).await?;
        }
        Ok(())
    }

    async fn pause(&mut self, host: &Host, most: u64) -> Outcome<()> {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..=most))).await;
        if host.dead() { Err(Stop::Down) } else { Ok(()) }
    }

    /// True if the lock was granted.
    async fn lock(&mut self, host: &Arc<Host>, space: Space, more: bool) -> Outcome<bool> {
        let (first, last) = match space {
            Space::Flock => (0, fs_core::TO_THE_END),
            Space::Record => {
                let (a, b) = (self.rng.random_range(0..BYTES), self.rng.random_range(0..BYTES));
                (a.min(b), a.max(b))
            }
        };
        let exclusive = self.rng.random_bool(0.5);
        let want = FileLock { space, owner: self.owner, first, last, exclusive, pid: self.owner as u32 };
        let (v, file) = (host.volume.clone(), self.shared.file);
        let what = format!("lock {want:?}");
        let wait = self.rng.random_bool(0.75);
        if more {
            // What it had may be given up, or replaced, by the time this is granted.
            self.shared.over(self.owner);
        }
        let got = if wait {
            let after = match self.rng.random_bool(0.2) {
                true => Duration::from_millis(self.rng.random_range(0..500)),
                false => Duration::from_secs(100_000),
            };
            let patience = self.world.setup.patience() + LOOKS;
            let op = v.lock(file, want, tokio::time::sleep(after));
            self.world.call_within(host, &what, patience, op).await?
        } else {
            self.world.call(host, &what, v.try_lock(file, want)).await?
        };
        match got {
            Ok(()) => {
                self.world.note(format_args!("{} has {what}", host.name()));
                self.shared.granted(&self.world, host, want)?;
                Ok(true)
            }
            Err(FsError::Interrupted) if wait => Ok(false),
            Err(FsError::Locked) if !wait => Ok(false),
            Err(FsError::Deadlock) if more => Ok(false),
            Err(e) => Err(self.world.unexpected(host, &what, &e)),
        }
    }
}
