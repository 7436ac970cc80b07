//! What clients of all nodes fight over: one dot-lock made with O_EXCL, and one log that all append records to.
//!
//! The lock excludes: while one that made it and has not removed it lives, nobody else can make it. Of the log no record
//! may be torn, overwritten or there twice, and none may be lost that was synced, or seen on another node, or whose node lives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use fs_core::WriteOptions;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::client::{FILE, WHO};
use super::world::{Host, Outcome, Seat, Stop, World};

const LOCK: &[u8] = b"mbox.lock";
const LOG_MOST: u64 = 100_000;
const HEAD: usize = 20;

#[derive(Default)]
struct DotLock {
    /// Who made it and has not begun to remove it.
    holder: Option<Arc<Host>>,
    /// Hosts that are making or removing it at the moment.
    busy: Vec<Arc<Host>>,
    /// Somebody removes what a dead holder left.
    breaking: bool,
}

struct Appended {
    host: Arc<Host>,
    offset: u64,
    len: usize,
    durable: bool,
}

/// What the clients share.
pub struct Shared {
    dir: u64,
    log: u64,
    lock: Mutex<DotLock>,
    records: Mutex<BTreeMap<u64, Appended>>,
    next: Mutex<u64>,
}

/// Says that a host is at the lock, also when its work is dropped.
struct Busy<'a>(&'a Shared, Arc<Host>);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut lock = self.0.lock.lock();
        if let Some(i) = lock.busy.iter().position(|h| Arc::ptr_eq(h, &self.1)) {
            lock.busy.remove(i);
        }
    }
}

struct Breaking<'a>(&'a Shared);

impl Drop for Breaking<'_> {
    fn drop(&mut self) {
        self.0.lock.lock().breaking = false;
    }
}

fn record(id: u64, len: usize) -> Vec<u8> {
    let mut r = format!("{id:012} {len:06} ").into_bytes();
    r.resize(len - 1, b'a' + (id % 26) as u8);
    r.push(b'\n');
    r
}

/// The records of a log with their offsets.
fn parse(log: &[u8]) -> Result<BTreeMap<u64, (u64, usize)>, String> {
    let (mut at, mut found) = (0, BTreeMap::new());
    while at < log.len() {
        let number = |from: usize, to: usize| {
            let digits = log.get(at + from..at + to).and_then(|d| std::str::from_utf8(d).ok());
            digits.and_then(|d| d.parse::<u64>().ok()).ok_or(format!("no record at {at} of {}", log.len()))
        };
        let (id, len) = (number(0, 12)?, number(13, 19)? as usize);
        if len < HEAD + 1 || log.get(at..at + len) != Some(&record(id, len)) {
            return Err(format!("record {id} at {at} is torn"));
        }
        if found.insert(id, (at as u64, len)).is_some() {
            return Err(format!("record {id} is there twice"));
        }
        at += len;
    }
    Ok(found)
}

impl Shared {
    /// Makes the directory and the log, to be synced by the caller.
    pub async fn make(world: &World, host: &Host, root: u64) -> Outcome<Arc<Self>> {
        let v = &host.volume;
        let dir = world.done(host, "mkdir", v.mkdir(WHO, root, b"shared", super::client::DIR)).await?.value.ino;
        let log = world.done(host, "create", v.mknod(WHO, dir, b"log", FILE, false)).await?.value.ino;
        Ok(Arc::new(Self { dir, log, lock: Mutex::default(), records: Mutex::default(), next: Mutex::new(1) }))
    }

    fn begin(&self, host: &Arc<Host>) -> Option<Busy<'_>> {
        let mut lock = self.lock.lock();
        (!lock.breaking).then(|| {
            lock.busy.push(host.clone());
            Busy(self, host.clone())
        })
    }

    async fn take_turn(&self, world: &World, host: &Arc<Host>, rng: &mut StdRng) -> Outcome<()> {
        let made = {
            let Some(_busy) = self.begin(host) else { return Ok(()) };
            let op = host.volume.mknod(WHO, self.dir, LOCK, FILE, false);
            let made = world.tried(host, "O_EXCL", op).await?.map(|_| ());
            let mut lock = self.lock.lock();
            if made.is_ok() {
                if let Some(other) = lock.holder.as_ref().filter(|h| !h.dead()) {
                    let e = format!("{} made the lock that {} holds", host.name(), other.name());
                    drop(lock);
                    return Err(world.fail(e));
                }
                lock.holder = Some(host.clone());
            }
            made
        };
        match made {
            Ok(()) => {}
            Err("EEXIST") => return self.break_stale(world, host).await,
            Err("ENOSPC") if world.setup.small() => return Ok(()),
            Err(e) => return Err(world.fail(format!("{} O_EXCL: {e}", host.name()))),
        }
        world.note(format_args!("{} has the dot-lock", host.name()));
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..100))).await;
        if host.dead() {
            return Err(Stop::Down);
        }
        let Some(_busy) = self.begin(host) else {
            return Err(world.fail(format!("the lock of {} is being broken", host.name())));
        };
        self.lock.lock().holder = None;
        world.done(host, "removal of the lock", host.volume.unlink(self.dir, LOCK)).await.map(drop)
    }

    /// Removes what a dead holder left behind.
    async fn break_stale(&self, world: &World, host: &Arc<Host>) -> Outcome<()> {
        let _breaking = {
            let mut lock = self.lock.lock();
            let held = lock.holder.as_ref().is_some_and(|h| !h.dead());
            if held || lock.breaking || lock.busy.iter().any(|h| !h.dead()) {
                return Ok(());
            }
            lock.breaking = true;
            Breaking(self)
        };
        match world.tried(host, "breaking of the lock", host.volume.unlink(self.dir, LOCK)).await? {
            Ok(_) | Err("ENOENT") => Ok(()),
            Err(e) => Err(world.fail(format!("{} breaking of the lock: {e}", host.name()))),
        }
    }

    async fn append(&self, world: &World, host: &Arc<Host>, rng: &mut StdRng) -> Outcome<()> {
        let id = {
            let mut next = self.next.lock();
            *next += 1;
            *next
        };
        let len = [HEAD + 1, 100, 700, 3000, 9000][rng.random_range(0..5)];
        let how = WriteOptions { append: true, ..WriteOptions::default() };
        let bytes = record(id, len);
        let op = host.volume.write(self.log, 0, &bytes, how);
        let offset = match world.tried(host, "append", op).await? {
            Ok(at) => at.value,
            Err("ENOSPC") if world.setup.small() => return Ok(()),
            Err(e) => return Err(world.fail(format!("{} append: {e}", host.name()))),
        };
        world.note(format_args!("{} appends record {id} at {offset}", host.name()));
        self.records.lock().insert(id, Appended { host: host.clone(), offset, len, durable: false });
        if rng.random_bool(0.4) {
            let mine: Vec<u64> = {
                let records = self.records.lock();
                records.iter().filter(|(_, r)| Arc::ptr_eq(&r.host, host)).map(|(id, _)| *id).collect()
            };
            world.done(host, "fsync of the log", host.volume.fsync(self.log, false)).await?;
            let mut records = self.records.lock();
            mine.iter().for_each(|id| {
                if let Some(r) = records.get_mut(id) {
                    r.durable = true;
                }
            });
        }
        Ok(())
    }

    /// Reads the log on a node.
    pub async fn check(&self, world: &World, host: &Arc<Host>) -> Outcome<()> {
        // Those acknowledged by now.
        let before: Vec<u64> = self.records.lock().keys().copied().collect();
        let log = world.done(host, "read of the log", host.volume.read(self.log, 0, 1 << 20)).await?.value;
        let found = parse(&log).map_err(|e| world.fail(format!("{} log: {e}", host.name())))?;
        let mut records = self.records.lock();
        for id in before {
            let Some(r) = records.get_mut(&id) else { continue };
            let there = found.get(&id) == Some(&(r.offset, r.len));
            if there {
                // That its own node shows it makes nothing durable.
                r.durable |= !Arc::ptr_eq(&r.host, host);
            } else if r.durable || !r.host.dead() {
                let e = format!("record {id} of {} at {} is lost: {:?}", r.host.name(), r.offset, found.get(&id));
                drop(records);
                return Err(world.fail(format!("{} log: {e}", host.name())));
            } else {
                records.remove(&id);
            }
        }
        Ok(())
    }
}

/// One of those who fight.
pub struct Racer {
    world: Arc<World>,
    shared: Arc<Shared>,
    rng: StdRng,
}

impl Racer {
    pub fn new(world: Arc<World>, shared: Arc<Shared>, index: usize) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(48 + index as u64));
        Self { world, shared, rng }
    }

    pub async fn live(mut self) {
        while let Some(seat) = self.world.seat(&mut self.rng).await {
            if self.work(&seat).await == Err(Stop::Failed) {
                return;
            }
        }
    }

    async fn work(&mut self, seat: &Seat) -> Outcome<()> {
        let (host, world, shared) = (&seat.host, self.world.clone(), self.shared.clone());
        let mut size = 0;
        while !world.over() && !host.retiring.load(Relaxed) {
            match self.rng.random_range(0..100) {
                0..3 => return Ok(()),
                3..45 => shared.take_turn(&world, host, &mut self.rng).await?,
                45..85 if size < LOG_MOST => {
                    shared.append(&world, host, &mut self.rng).await?;
                    size = shared.records.lock().values().map(|r| r.offset).max().unwrap_or(0);
                }
                _ => shared.check(&world, host).await?,
            }
            let pause = self.rng.random_range(0..=world.setup.think_ms);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if host.dead() {
                return Err(Stop::Down);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_doubled_records_are_told() {
        let mut log = [record(1, 30), record(2, 600)].concat();
        assert_eq!(parse(&log).unwrap().len(), 2);
        log.extend(record(1, 30));
        assert!(parse(&log).unwrap_err().contains("twice"));
        assert!(parse(&log[..100]).unwrap_err().contains("torn"));
        log[40] = 0;
        assert!(parse(&log).is_err());
        assert!(parse(&[0; 512]).is_err());
    }
}
