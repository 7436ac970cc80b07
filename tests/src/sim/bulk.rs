//! Clients that write in bulk, each in a directory of its own: until the volume is full, or so many changes at once that the journal is.
//!
//! Files are written at their ends alone, so one has a prefix of what was written. `ENOSPC` leaves a file as it was, costs nothing that
//! was acknowledged, and removing files never gets it. After the death of a node each file has one of the lengths since its last
//! sync; it may be missing if its name was not synced, or there again if its removal was not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use fs_core::{Volume, WriteOptions, XattrSet};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;

use super::client::{FILE, WHO};
use super::reading::list;
use super::world::{Ack, Host, Outcome, Stop, World};

/// Bytes written at once, by who fills the volume, and of one of its files.
const CHUNK: usize = 48_000;
const MOST_BYTES: usize = 600_000;
/// Changes under way at once in a burst.
const AT_ONCE: usize = 48;
/// Bytes of an attribute that each file of a burst gets: they go through the journal at once, contents when they are written back.
const ATTRIBUTE_BYTES: usize = 3000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Large files, until nothing is free.
    Fill,
    /// Many small ones, whose contents go through the journal.
    Burst,
}

#[derive(Clone, Debug)]
struct File {
    ino: u64,
    /// The lengths that it may have, the latest last.
    lens: Vec<usize>,
    /// The name is durable.
    sure: bool,
    /// The removal has begun, or has been acknowledged.
    removed: bool,
}

#[derive(Default)]
struct Files {
    by_name: BTreeMap<String, File>,
    next: u64,
}

pub struct Bulk {
    world: Arc<World>,
    name: String,
    dir: u64,
    kind: Kind,
    rng: StdRng,
    files: Arc<Mutex<Files>>,
    /// Who made what is not known to be durable.
    maker: Option<Arc<Host>>,
}

fn body(name: &str, len: usize) -> Vec<u8> {
    let line = format!("{name} goes on, ");
    line.bytes().cycle().take(len).collect()
}

impl Bulk {
    pub fn new(world: Arc<World>, kind: Kind, index: usize, dir: u64) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(44 + index as u64));
        Self { world, name: format!("b{index}"), dir, kind, rng, files: Arc::default(), maker: None }
    }

    /// Works until the run is over, and returns itself for the final check.
    pub async fn live(mut self) -> Self {
        while let Some(seat) = self.world.seat(&mut self.rng).await {
            if self.work(&seat.host).await == Err(Stop::Failed) {
                break;
            }
        }
        self
    }

    async fn work(&mut self, host: &Arc<Host>) -> Outcome<()> {
        self.look(host).await?;
        self.maker = Some(host.clone());
        while !self.world.over() && !host.retiring.load(Relaxed) {
            match self.rng.random_range(0..100) {
                0..4 => return Ok(()),
                4..10 => self.sync(host).await?,
                10..20 => self.look(host).await?,
                _ if self.kind == Kind::Fill => self.fill(host).await?,
                _ => self.burst(host).await?,
            }
            let pause = self.rng.random_range(0..=self.world.setup.think_ms);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if host.dead() {
                return Err(Stop::Down);
            }
        }
        Ok(())
    }

    // ---- looking -----------------------------------------------------------------------------------------------

    /// Compares all files with what they must or may be.
    pub async fn look(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let elsewhere = self.maker.as_ref().is_none_or(|m| !Arc::ptr_eq(m, host));
        let what = format!("{} looks", self.name);
        let mut found = BTreeMap::new();
        for (name, ino) in list(&self.world, host, &what, self.dir).await? {
            let got = self.world.done(host, &what, host.volume.read(ino, 0, 1 << 20)).await?.value;
            if got != body(&name, got.len()) {
                return Err(self.wrong(host, format!("{name} has {} bytes that are not its own", got.len())));
            }
            found.insert(name, (ino, got.len()));
        }
        // Perhaps while this one looked.
        let crashed = self.maker.as_ref().is_some_and(|m| m.dead());
        if let Some(e) = self.compare(&found, crashed) {
            return Err(self.wrong(host, e));
        }
        if crashed {
            self.world.note(format_args!("{} finds {} files", self.name, found.len()));
            self.world.totals.lock().verified += 1;
            self.maker = None;
        }
        if crashed || elsewhere {
            // What a recovery found, or another node shows, is durable.
            let file = |(ino, len): (u64, usize)| File { ino, lens: vec![len], sure: true, removed: false };
            self.files.lock().by_name = found.into_iter().map(|(name, f)| (name, file(f))).collect();
        }
        Ok(())
    }

    fn compare(&self, found: &BTreeMap<String, (u64, usize)>, crashed: bool) -> Option<String> {
        let files = self.files.lock();
        if let Some(stray) = found.keys().find(|n| !files.by_name.contains_key(*n)) {
            return Some(format!("{stray} should not be there"));
        }
        for (name, f) in &files.by_name {
            let latest = &f.lens[f.lens.len() - 1..];
            let may = if crashed { &f.lens[..] } else { latest };
            match found.get(name) {
                None if f.removed || crashed && !f.sure => {}
                None => return Some(format!("{name} is missing")),
                Some(_) if f.removed && !crashed => return Some(format!("{name} was removed")),
                Some((ino, _)) if *ino != f.ino && f.ino != 0 => {
                    return Some(format!("{name} is {ino:#x} instead of {:#x}", f.ino));
                }
                Some((_, len)) if !may.contains(len) => {
                    return Some(format!("{name} has {len} bytes, allowed are {may:?}"));
                }
                Some(_) => {}
            }
        }
        None
    }

    fn wrong(&self, host: &Host, what: String) -> Stop {
        self.world.fail(format!("{} on {}: {what}", self.name, host.name()))
    }

    // ---- changing ----------------------------------------------------------------------------------------------

    async fn sync(&self, host: &Host) -> Outcome<()> {
        let latest: Ack = self.world.latest();
        self.world.done(host, "sync", host.volume.sync()).await?;
        self.world.note(format_args!("{} {} sync [{latest}]", host.name(), self.name));
        host.synced(latest);
        let mut files = self.files.lock();
        files.by_name.retain(|_, f| !f.removed);
        for f in files.by_name.values_mut() {
            f.lens.drain(..f.lens.len() - 1);
            f.sure = true;
        }
        Ok(())
    }

    fn task(&self, host: &Arc<Host>) -> Task {
        Task {
            world: self.world.clone(),
            host: host.clone(),
            dir: self.dir,
            files: self.files.clone(),
            kind: self.kind,
        }
    }

    fn names(&self) -> Vec<String> {
        self.files.lock().by_name.iter().filter(|(_, f)| !f.removed).map(|(n, _)| n.clone()).collect()
    }

    /// Adds a file. When there is no room for it, makes some.
    async fn fill(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let len = self.rng.random_range(1..=MOST_BYTES);
        let (task, room) = (self.task(host), self.task(host).make(len).await?);
        if room {
            return Ok(());
        }
        self.world.note(format_args!("{} {} finds the volume full", host.name(), self.name));
        self.world.totals.lock().full += 1;
        if self.rng.random_bool(0.3) {
            // What was accepted has its place.
            self.sync(host).await?;
        }
        let share = [0.1, 0.5, 1.0][self.rng.random_range(0..3)];
        for name in self.names() {
            if self.rng.random_bool(share) {
                task.remove(&name).await?;
            }
        }
        Ok(())
    }

    /// Many changes at once, of which nobody waits for another.
    async fn burst(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let mut names = self.names();
        for _ in 0..self.rng.random_range(1..8) {
            let mut tasks = JoinSet::new();
            for _ in 0..AT_ONCE {
                let task = self.task(host);
                if names.len() > 120 || !names.is_empty() && self.rng.random_bool(0.3) {
                    let name = names.swap_remove(self.rng.random_range(0..names.len()));
                    tasks.spawn(async move { task.remove(&name).await.map(|()| true) });
                } else {
                    let len = [100, 900, 1000, 3000][self.rng.random_range(0..4)];
                    tasks.spawn(async move { task.make(len).await });
                }
            }
            while let Some(done) = tasks.join_next().await {
                done.map_err(|e| self.world.fail(format!("a task ended: {e}")))??;
            }
            let j = host.volume.journal_stats();
            let (used, times) = (j.used * 100 / j.size.max(1), j.checkpoints);
            self.world.note(format_args!("{}'s journal is {used} % full, {times} checkpoints so far", host.name()));
        }
        Ok(())
    }
}

/// One change on a node.
struct Task {
    world: Arc<World>,
    host: Arc<Host>,
    dir: u64,
    files: Arc<Mutex<Files>>,
    kind: Kind,
}

impl Task {
    fn with<T>(&self, name: &str, f: impl FnOnce(&mut File) -> T) -> Option<T> {
        self.files.lock().by_name.get_mut(name).map(f)
    }

    /// Writes a new file; false: there was no room for all of it.
    async fn make(&self, len: usize) -> Outcome<bool> {
        let v: &Volume = &self.host.volume;
        let name = {
            let mut files = self.files.lock();
            files.next += 1;
            let name = format!("f{}", files.next);
            files.by_name.insert(name.clone(), File { ino: 0, lens: vec![0], sure: false, removed: false });
            name
        };
        let op = v.mknod(WHO, self.dir, name.as_bytes(), FILE, false);
        // What keeps the reply keeps the domain.
        let made = self.world.tried(&self.host, &format!("create of {name}"), op).await?.map(|m| m.value.ino);
        let ino = match made {
            Ok(ino) => ino,
            Err("ENOSPC") if self.world.setup.small() => {
                self.files.lock().by_name.remove(&name);
                return Ok(false);
            }
            Err(e) => return Err(self.world.fail(format!("{} create of {name}: {e}", self.host.name()))),
        };
        self.with(&name, |f| f.ino = ino);
        if self.kind == Kind::Burst {
            let op = v.setxattr(ino, b"user.burst", &[7; ATTRIBUTE_BYTES], XattrSet::Any);
            self.world.done(&self.host, "setxattr", op).await?;
        }
        let (all, mut at) = (body(&name, len), 0);
        while at < len {
            let end = len.min(at + CHUNK);
            self.with(&name, |f| f.lens.push(end));
            let op = v.write(ino, at as u64, &all[at..end], WriteOptions::default());
            match self.world.tried(&self.host, &format!("write of {name}"), op).await?.map(drop) {
                Ok(()) => {
                    at = end;
                    self.world.note(format_args!("{} {name}, {ino:#x}, has {at} bytes", self.host.name()));
                }
                Err("ENOSPC") if self.world.setup.small() => {
                    self.with(&name, |f| f.lens.pop());
                    return self.unchanged(&name, ino, at).await.map(|()| false);
                }
                Err(e) => return Err(self.world.fail(format!("{} write of {name}: {e}", self.host.name()))),
            }
        }
        Ok(true)
    }

    async fn unchanged(&self, name: &str, ino: u64, len: usize) -> Outcome<()> {
        let attr = self.world.done(&self.host, "getattr", self.host.volume.getattr(ino)).await?.value;
        match attr.inode.size == len as u64 {
            true => Ok(()),
            false => Err(self.world.fail(format!("after ENOSPC {name} has {} bytes, not {len}", attr.inode.size))),
        }
    }

    async fn remove(&self, name: &str) -> Outcome<()> {
        self.with(name, |f| f.removed = true);
        let what = format!("removal of {name}");
        self.world.done(&self.host, &what, self.host.volume.unlink(self.dir, name.as_bytes())).await?;
        self.world.note(format_args!("{} {what}", self.host.name()));
        Ok(())
    }
}
