//! Files that clients keep open while others, on all nodes, remove them, put others in their place, cut them short and add
//! to them.
//!
//! Whoever has a file open reads what it has, whatever becomes of its name, as long as his own node lives. Every change of
//! contents is synced at once, so a file has one of two contents only while a change is under way, or after the death of the node
//! that made it, until somebody has looked. That the space of files without a name comes back is for the end of the run to see.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use fs_core::{FsError, Rename, SetAttr, WriteOptions};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::client::{DIR, FILE, WHO};
use super::reading::list;
use super::tree::Bytes;
use super::world::{Host, Outcome, Seat, Stop, World};

/// Directories, each with a lock of its own, and names in each.
const DIRS: usize = 2;
const NAMES: usize = 4;
/// Files that one client has open at most.
const MOST_OPEN: usize = 5;
const MOST_BYTES: usize = 200_000;
/// Files are cut at the ends of blocks alone: nothing of what is cut off has to be written over with zeros.
const BLOCK: usize = 4096;

struct File {
    /// All contents it has had, and may have had.
    versions: Vec<Bytes>,
    /// The oldest that it may have now.
    first: usize,
    /// A change is under way.
    busy: bool,
    /// Who made the last one died in it.
    unresolved: bool,
    /// Grows whenever anything of this does.
    changes: u64,
}

impl File {
    fn new(contents: Bytes) -> Self {
        Self { versions: vec![contents], first: 0, busy: false, unresolved: false, changes: 0 }
    }

    /// It has what was added last.
    fn settle(&mut self) {
        self.first = self.versions.len() - 1;
        self.unresolved = false;
    }
}

/// What the clients share.
pub struct Opened {
    dirs: Vec<u64>,
    /// By inode number: durable files that have or had one of the names.
    files: Mutex<BTreeMap<u64, File>>,
    next: Mutex<u64>,
}

enum Change {
    Cut(usize),
    Append(Vec<u8>),
}

fn body(id: u64, len: usize) -> Vec<u8> {
    let line = format!("file {id} of {len} bytes, ");
    line.bytes().cycle().take(len).collect()
}

impl Opened {
    /// Makes the directories, to be synced by the caller.
    pub async fn make(world: &World, host: &Host, root: u64) -> Outcome<Arc<Self>> {
        let mut dirs = Vec::new();
        for d in 0..DIRS {
            let name = format!("opened{d}");
            dirs.push(world.done(host, "mkdir", host.volume.mkdir(WHO, root, name.as_bytes(), DIR)).await?.value.ino);
        }
        Ok(Arc::new(Self { dirs, files: Mutex::default(), next: Mutex::new(1) }))
    }

    fn any_name(&self, rng: &mut StdRng) -> (u64, String) {
        (self.dirs[rng.random_range(0..DIRS)], format!("o{}", rng.random_range(0..NAMES)))
    }

    /// Reads a file and compares; false: it is gone.
    async fn read(&self, world: &World, host: &Host, ino: u64) -> Outcome<bool> {
        let begun = self.files.lock().get(&ino).map(|f| (f.first, f.changes));
        let what = format!("read of {ino:#x}");
        let got = match world.call(host, &what, host.volume.read(ino, 0, 1 << 20)).await? {
            Ok(got) => got.value,
            Err(FsError::Stale) => return Ok(false),
            Err(e) => return Err(world.unexpected(host, &what, &e)),
        };
        let mut files = self.files.lock();
        let (Some((from, changes)), Some(f)) = (begun, files.get_mut(&ino)) else {
            drop(files);
            return Err(world.fail(format!("{} {what}: nobody made that file", host.name())));
        };
        if !f.versions[from..].iter().any(|v| **v == got) {
            let sizes: Vec<usize> = f.versions[from..].iter().map(|v| v.len()).collect();
            let found = String::from_utf8_lossy(&got[..got.len().min(30)]).into_owned();
            drop(files);
            let e = format!("has {} bytes ({found:?}), sizes allowed are {sizes:?}", got.len());
            return Err(world.fail(format!("{} {what}: {e}", host.name())));
        }
        if f.unresolved && !f.busy && f.changes == changes {
            // Whoever read it had the lock, so the dead node's journal has been replayed: it stays so.
            f.versions.push(Arc::new(got));
            f.settle();
            f.changes += 1;
            world.totals.lock().verified += 1;
        }
        Ok(true)
    }

    /// A new file under a name that nobody else uses yet, durable. It is open.
    async fn create(&self, world: &World, host: &Host, rng: &mut StdRng) -> Outcome<(u64, u64, String)> {
        let id = {
            let mut next = self.next.lock();
            *next += 1;
            *next
        };
        let (dir, name) = (self.dirs[rng.random_range(0..DIRS)], format!("t{id}"));
        let made = world.done(host, "create", host.volume.mknod(WHO, dir, name.as_bytes(), FILE, true)).await?;
        // What keeps the reply keeps the domain.
        let ino = made.map(|m| m.ino).value;
        let contents = body(id, [10, 700, 4096, 9000, 40_000, 150_000][rng.random_range(0..6)]);
        world.done(host, "write", host.volume.write(ino, 0, &contents, WriteOptions::default())).await?;
        world.done(host, "fsync", host.volume.fsync(ino, false)).await?;
        self.files.lock().insert(ino, File::new(Arc::new(contents)));
        Ok((ino, dir, name))
    }

    /// Changes a file that is there; `open`: it must be.
    async fn change(&self, world: &World, host: &Host, ino: u64, rng: &mut StdRng, open: bool) -> Outcome<()> {
        // Also finds out what a dead node left.
        let there = self.read(world, host, ino).await?;
        self.must(world, host, ino, open, there)?;
        let change = {
            let mut files = self.files.lock();
            let Some(f) = files.get_mut(&ino).filter(|f| there && !f.busy && !f.unresolved) else { return Ok(()) };
            let old = f.versions[f.versions.len() - 1].clone();
            let change = match rng.random_bool(0.5) {
                true => Change::Cut(rng.random_range(0..=old.len() / BLOCK) * BLOCK),
                false => Change::Append(body(ino, [5, 900, 30_000][rng.random_range(0..3)])),
            };
            let mut new = (*old).clone();
            match &change {
                Change::Cut(len) => new.truncate(*len),
                Change::Append(more) => new.extend_from_slice(more),
            }
            if new.len() > MOST_BYTES {
                return Ok(());
            }
            f.versions.push(Arc::new(new));
            (f.busy, f.changes) = (true, f.changes + 1);
            change
        };
        let done = self.carry_out(world, host, ino, &change).await;
        if let Some(f) = self.files.lock().get_mut(&ino) {
            (f.busy, f.changes) = (false, f.changes + 1);
            match done {
                Ok(true) => f.settle(),
                // Its removal may be undone by the death of the node that removed it: then it is there as it was, or changed.
                Ok(false) | Err(_) => f.unresolved = true,
            }
        }
        self.must(world, host, ino, open, done?)
    }

    async fn carry_out(&self, world: &World, host: &Host, ino: u64, change: &Change) -> Outcome<bool> {
        let v = &host.volume;
        let (what, done) = match change {
            Change::Cut(len) => {
                let set = SetAttr { size: Some(*len as u64), ..SetAttr::default() };
                let what = format!("cut of {ino:#x} to {len}");
                let done = world.call(host, &what, v.setattr(ino, set)).await?.map(drop);
                (what, done)
            }
            Change::Append(more) => {
                let how = WriteOptions { append: true, ..WriteOptions::default() };
                let what = format!("append to {ino:#x}");
                let done = world.call(host, &what, v.write(ino, 0, more, how)).await?.map(drop);
                (what, done)
            }
        };
        let done = match done {
            Ok(()) => world.call(host, &what, v.fsync(ino, false)).await?,
            e => e,
        };
        match done {
            Ok(()) => {
                world.note(format_args!("{} {what}", host.name()));
                Ok(true)
            }
            Err(FsError::Stale) => Ok(false),
            Err(e) => Err(world.unexpected(host, &what, &e)),
        }
    }

    /// A file that somebody on this node has open cannot be gone.
    fn must(&self, world: &World, host: &Host, ino: u64, open: bool, there: bool) -> Outcome<()> {
        match open && !there {
            true => Err(world.fail(format!("{}: {ino:#x} is gone, though it is open here", host.name()))),
            false => Ok(()),
        }
    }

    /// After the run.
    pub async fn look(&self, world: &World, host: &Host) -> Outcome<()> {
        for dir in &self.dirs {
            for (name, ino) in list(world, host, "look at what was open", *dir).await? {
                // What was not durable when its node died may be there in part.
                let known = self.files.lock().contains_key(&ino);
                if (known || name.starts_with('o')) && !self.read(world, host, ino).await? {
                    return Err(world.fail(format!("{}: {name} has no inode", host.name())));
                }
            }
        }
        Ok(())
    }
}

/// One of the clients.
pub struct Opener {
    world: Arc<World>,
    shared: Arc<Opened>,
    name: String,
    rng: StdRng,
    /// Inode numbers of what it has open on the node where it works.
    open: Vec<u64>,
}

impl Opener {
    pub fn new(world: Arc<World>, shared: Arc<Opened>, index: usize) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(40 + index as u64));
        Self { world, shared, name: format!("o{index}"), rng, open: Vec::new() }
    }

    pub async fn live(mut self) {
        while let Some(seat) = self.world.seat(&mut self.rng).await {
            let done = match self.work(&seat.host).await {
                Ok(()) => self.close_all(&seat).await,
                e => e,
            };
            if done == Err(Stop::Failed) {
                return;
            }
            // What was open on a node that died is closed.
            self.open.clear();
        }
    }

    async fn work(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let (world, shared) = (self.world.clone(), self.shared.clone());
        while !world.over() && !host.retiring.load(Relaxed) {
            match self.rng.random_range(0..100) {
                0..3 => return Ok(()),
                3..28 => self.open(host).await?,
                28..48 => {
                    if let Some(ino) = self.some_open() {
                        let there = shared.read(&world, host, ino).await?;
                        shared.must(&world, host, ino, true, there)?;
                    }
                }
                48..63 => self.replace(host).await?,
                63..75 => self.unlink(host).await?,
                75..80 => {
                    let (dir, name) = shared.any_name(&mut self.rng);
                    let found = world.done(host, "lookup", host.volume.lookup(dir, name.as_bytes())).await?.value;
                    if let Some(ino) = found.map(|a| a.ino) {
                        shared.change(&world, host, ino, &mut self.rng, false).await?;
                    }
                }
                80..86 => {
                    if let Some(ino) = self.some_open() {
                        shared.change(&world, host, ino, &mut self.rng, true).await?;
                    }
                }
                _ => {
                    if let Some(ino) = self.some_open() {
                        self.close(host, ino).await?;
                    }
                }
            }
            let pause = self.rng.random_range(0..=world.setup.think_ms);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if host.dead() {
                return Err(Stop::Down);
            }
        }
        Ok(())
    }

    fn some_open(&mut self) -> Option<u64> {
        (!self.open.is_empty()).then(|| self.open[self.rng.random_range(0..self.open.len())])
    }

    async fn open(&mut self, host: &Arc<Host>) -> Outcome<()> {
        if self.open.len() == MOST_OPEN {
            return Ok(());
        }
        let (dir, name) = self.shared.any_name(&mut self.rng);
        let v = &host.volume;
        let found = self.world.done(host, "lookup", v.lookup(dir, name.as_bytes())).await?.value;
        let Some(ino) = found.map(|a| a.ino) else { return Ok(()) };
        let what = format!("{} open of {name}, {ino:#x}", self.name);
        match self.world.call(host, &what, v.open(ino)).await?.map(drop) {
            Ok(()) => {}
            // Removed in between.
            Err(FsError::Stale) => return Ok(()),
            Err(e) => return Err(self.world.unexpected(host, &what, &e)),
        }
        self.world.note(format_args!("{} {what}", host.name()));
        self.open.push(ino);
        let there = self.shared.read(&self.world, host, ino).await?;
        self.shared.must(&self.world, host, ino, true, there)
    }

    /// Puts a new file in the place of what has a name, if anything has.
    async fn replace(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let (ino, from, name) = self.shared.create(&self.world, host, &mut self.rng).await?;
        self.open.push(ino);
        let (to, new) = self.shared.any_name(&mut self.rng);
        let what = format!("{} rename of {ino:#x} to {new}", self.name);
        let op = host.volume.rename(from, name.as_bytes(), to, new.as_bytes(), Rename::Replace);
        self.world.done(host, &what, op).await?;
        self.world.note(format_args!("{} {what}", host.name()));
        if self.open.len() > MOST_OPEN || self.rng.random_bool(0.7) {
            self.close(host, ino).await?;
        }
        Ok(())
    }

    async fn unlink(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let (dir, name) = self.shared.any_name(&mut self.rng);
        let what = format!("{} removal of {name} in {dir:#x}", self.name);
        match self.world.tried(host, &what, host.volume.unlink(dir, name.as_bytes())).await?.map(drop) {
            Ok(()) => self.world.note(format_args!("{} {what}", host.name())),
            Err("ENOENT") => {}
            Err(e) => return Err(self.world.fail(format!("{} {what}: {e}", host.name()))),
        }
        Ok(())
    }

    async fn close(&mut self, host: &Arc<Host>, ino: u64) -> Outcome<()> {
        let there = self.shared.read(&self.world, host, ino).await?;
        self.shared.must(&self.world, host, ino, true, there)?;
        if let Some(i) = self.open.iter().position(|o| *o == ino) {
            self.open.remove(i);
        }
        self.world.note(format_args!("{} {} closes {ino:#x}", host.name(), self.name));
        self.world.call(host, "close", host.volume.release(ino)).await
    }

    /// Before it goes elsewhere.
    async fn close_all(&mut self, seat: &Seat) -> Outcome<()> {
        while let Some(ino) = self.open.last().copied() {
            self.close(&seat.host, ino).await?;
        }
        Ok(())
    }
}
