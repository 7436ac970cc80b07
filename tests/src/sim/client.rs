//! A client that has a directory tree to itself and works in it, on one node after the other.

use std::sync::Arc;
use std::time::Duration;

use fs_core::{Caller, Fallocate, NewNode, Rename, SetAttr, Volume, WriteOptions, XattrSet};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::reading::read_or_damaged;
use super::tree::{Bytes, Change, Id, Obj, ROOT, Seen, Tree};
use super::world::{Ack, Host, Outcome, Seat, Stop, World};

pub const WHO: Caller = Caller { uid: 1000, gid: 1000 };
pub const FILE: NewNode = NewNode { mode: 0o100644, umask: 0, rdev: 0 };
pub const DIR: NewNode = NewNode { mode: 0o755, umask: 0, rdev: 0 };
/// `tmp`, `new` and `cur` share their parent's domain.
const NAMES: [&str; 7] = ["a", "b", "c", "d", "new", "cur", "tmp"];
pub const ATTRIBUTE: &[u8] = b"user.sim";
const MOST_DIRS: usize = 9;
const MOST_BYTES: usize = 60_000;

pub struct Client {
    pub(super) world: Arc<World>,
    pub(super) name: String,
    rng: StdRng,
    pub(super) tree: Tree,
    /// Who made the changes that `tree` does not know to be durable.
    pub(super) maker: Option<Arc<Host>>,
    /// What was under way when the maker died, or met damage.
    pub(super) pending: Option<Change>,
    /// It has met damage, and does not go on.
    pub(super) struck: bool,
}

type Try<T> = Result<T, &'static str>;

impl Client {
    pub fn new(world: Arc<World>, index: usize, root: u64) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(index as u64));
        Self { world, name: format!("c{index}"), rng, tree: Tree::new(root), maker: None, pending: None, struck: false }
    }

    /// Works until the run is over, and returns itself for the final check.
    pub async fn live(mut self) -> Self {
        while let Some(seat) = self.world.seat(&mut self.rng).await {
            match self.work(&seat).await {
                Ok(()) | Err(Stop::Down) => {}
                Err(Stop::Failed) => break,
            }
        }
        self
    }

    async fn work(&mut self, seat: &Seat) -> Outcome<()> {
        let host = &seat.host;
        self.look(host).await?;
        self.maker = Some(host.clone());
        while !self.world.over() && !host.retiring.load(std::sync::atomic::Ordering::Relaxed) {
            self.note_durable();
            match self.rng.random_range(0..1000) {
                0..8 => return Ok(()),
                8..24 => self.look_elsewhere().await?,
                _ => self.operation(host).await?,
            }
            if self.rng.random_bool(0.7) {
                let most = self.world.setup.think_ms;
                let pause = Duration::from_millis(self.rng.random_range(0..=most));
                tokio::time::sleep(pause).await;
                if host.dead() {
                    return Err(Stop::Down);
                }
            }
        }
        Ok(())
    }

    /// What other clients' syncs on this node made durable of ours.
    pub(super) fn note_durable(&mut self) {
        if let Some(maker) = &self.maker {
            let p = *maker.promise.lock();
            self.tree.settle(p.durable, p.synced);
        }
    }

    // ---- looking -----------------------------------------------------------------------------------------------

    /// Reads the whole tree and compares it with what it must or may be.
    pub async fn look(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let seen = self.read(host).await?;
        self.note_durable();
        let dead = self.maker.as_ref().filter(|m| m.dead()).cloned();
        match dead {
            None => self
                .tree
                .check_now(&seen)
                .map_err(|e| self.world.fail(format!("{} on {}: {e}", self.name, host.name())))?,
            Some(maker) => {
                let pending = self.pending.take();
                let found = self.tree.check_crashed(&seen, pending).map_err(|e| {
                    self.world.fail(format!("{} on {}, after {} died: {e}", self.name, host.name(), maker.name()))
                })?;
                self.world.note(format_args!(
                    "{}: {} had {} of {} changes left",
                    self.name,
                    maker.name(),
                    found.changes,
                    found.of
                ));
                self.world.totals.lock().verified += 1;
                self.world.cut(&maker, found.from, found.to)?;
                self.maker = None;
            }
        }
        // What another node shows is durable, and so is what a recovery found.
        if self.maker.as_ref().is_none_or(|m| !Arc::ptr_eq(m, host)) {
            self.tree.settle_all();
        }
        Ok(())
    }

    /// Another node must show the same, which makes it durable.
    async fn look_elsewhere(&mut self) -> Outcome<()> {
        let Some(seat) = self.world.seat(&mut self.rng).await else { return Ok(()) };
        self.world.note(format_args!("{} looks on {}", self.name, seat.host.name()));
        match self.look(&seat.host).await {
            // That it died is nothing to us.
            Err(Stop::Down) => {}
            r => r?,
        }
        match &self.maker {
            Some(m) if !m.dead() => Ok(()),
            _ => Err(Stop::Down),
        }
    }

    pub(super) async fn read(&self, host: &Host) -> Outcome<Seen> {
        let root = self.tree.inos[&ROOT];
        let what = format!("{} reads its tree", self.name);
        // Every operation for itself must end in time.
        read_or_damaged(&self.world, host, &what, root).await
    }

    // ---- changing ----------------------------------------------------------------------------------------------

    fn ino(&self, id: Id) -> u64 {
        self.tree.inos[&id]
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.rng.random_range(0..of.len())]
    }

    fn any_name(&mut self) -> (Id, String) {
        let dirs = self.tree.now.dirs();
        (self.pick(&dirs), self.pick(&NAMES).to_string())
    }

    /// A name that exists, if possible.
    fn some_name(&mut self) -> (Id, String) {
        for _ in 0..4 {
            let (dir, name) = self.any_name();
            if self.tree.now.dir(dir).contains_key(&name) {
                return (dir, name);
            }
        }
        self.any_name()
    }

    fn some_file(&mut self) -> Option<Id> {
        let files = self.tree.now.files();
        (!files.is_empty()).then(|| self.pick(&files))
    }

    fn named(&self, dir: Id, name: &str) -> Option<Id> {
        self.tree.now.dir(dir).get(name).copied()
    }

    /// Runs a change that must succeed or be refused as `want` says.
    async fn change<T>(
        &mut self,
        host: &Host,
        change: Change,
        want: Try<()>,
        op: impl Future<Output = fs_core::Result<T>>,
    ) -> Outcome<Option<T>> {
        let what = format!("{} {}", self.name, super::tree::brief(&change));
        if want.is_ok() {
            self.pending = Some(change.clone());
        }
        let got = self.world.tried(host, &what, op).await?;
        self.pending = None;
        if matches!(got, Err("ENOSPC")) && self.world.setup.small() && may_need_space(&change) {
            return Ok(None);
        }
        let shown = got.as_ref().map(|_| ()).map_err(|e| *e);
        if shown != want {
            return Err(self.world.fail(format!("{} {what}: {shown:?} instead of {want:?}", host.name())));
        }
        if want.is_ok() {
            let ack = self.world.ack();
            self.world.note(format_args!("{} {what} [{ack}]", host.name()));
            self.tree.acked(ack, change);
        }
        Ok(got.ok())
    }

    pub(super) async fn operation(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let v = host.volume.clone();
        match self.rng.random_range(0..100) {
            0..16 => self.create(host, &v).await,
            16..22 => self.mkdir(host, &v).await,
            22..25 => self.symlink(host, &v).await,
            25..32 => self.unlink(host, &v).await,
            32..36 => self.rmdir(host, &v).await,
            36..46 => self.rename(host, &v).await,
            46..50 => self.link(host, &v).await,
            50..66 => self.write(host, &v).await,
            66..70 => self.resize(host, &v).await,
            70..73 => self.attributes(host, &v).await,
            73..78 => self.check_one(host, &v).await,
            78..80 => self.unlinked_but_open(host, &v).await,
            80..94 => self.fsync(host, &v).await,
            94..97 => self.deliver(host, &v).await,
            _ => self.sync(host, &v).await,
        }
    }

    async fn create(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.any_name();
        let id = self.tree.next;
        self.tree.next += 1;
        let want = if self.named(dir, &name).is_some() { Err("EEXIST") } else { Ok(()) };
        let change = Change::Create { dir, name: name.clone(), id, mode: FILE.mode };
        let op = v.mknod(WHO, self.ino(dir), name.as_bytes(), FILE, false);
        if let Some(ino) = self.change(host, change, want, op).await?.map(|made| made.value.ino) {
            self.tree.inos.insert(id, ino);
            if self.rng.random_bool(0.6) {
                self.write_to(host, v, id).await?;
            }
        }
        Ok(())
    }

    async fn mkdir(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        if self.tree.now.dirs().len() >= MOST_DIRS {
            return Ok(());
        }
        let (dir, name) = self.any_name();
        let id = self.tree.next;
        self.tree.next += 1;
        let want = if self.named(dir, &name).is_some() { Err("EEXIST") } else { Ok(()) };
        let change = Change::Mkdir { dir, name: name.clone(), id };
        let op = v.mkdir(WHO, self.ino(dir), name.as_bytes(), DIR);
        if let Some(ino) = self.change(host, change, want, op).await?.map(|made| made.value.ino) {
            self.tree.inos.insert(id, ino);
        }
        Ok(())
    }

    async fn symlink(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.any_name();
        let id = self.tree.next;
        self.tree.next += 1;
        let want = if self.named(dir, &name).is_some() { Err("EEXIST") } else { Ok(()) };
        let target = "t".repeat(self.rng.random_range(1..1500));
        let change = Change::Symlink { dir, name: name.clone(), id, target: target.clone() };
        let op = v.symlink(WHO, self.ino(dir), name.as_bytes(), target.as_bytes());
        if let Some(ino) = self.change(host, change, want, op).await?.map(|made| made.value.ino) {
            self.tree.inos.insert(id, ino);
        }
        Ok(())
    }

    async fn unlink(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.some_name();
        let want = match self.named(dir, &name) {
            None => Err("ENOENT"),
            Some(id) if self.tree.now.is_dir(id) => Err("EISDIR"),
            Some(_) => Ok(()),
        };
        let op = v.unlink(self.ino(dir), name.as_bytes());
        self.change(host, Change::Unlink { dir, name: name.clone() }, want, op).await?;
        Ok(())
    }

    async fn rmdir(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.some_name();
        let want = match self.named(dir, &name) {
            None => Err("ENOENT"),
            Some(id) if !self.tree.now.is_dir(id) => Err("ENOTDIR"),
            Some(id) if !self.tree.now.dir(id).is_empty() => Err("ENOTEMPTY"),
            Some(_) => Ok(()),
        };
        let op = v.rmdir(self.ino(dir), name.as_bytes());
        self.change(host, Change::Rmdir { dir, name: name.clone() }, want, op).await?;
        Ok(())
    }

    async fn rename(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let ((dir, name), (to, new)) = (self.some_name(), self.any_name());
        let (source, target) = (self.named(dir, &name), self.named(to, &new));
        let how = self.pick(&[Rename::Replace, Rename::Replace, Rename::NoReplace, Rename::Exchange]);
        let now = &self.tree.now;
        let into_itself = |what: Option<Id>, at: Id| what.is_some_and(|w| now.is_dir(w) && now.inside(at, w));
        let want = match (source, target) {
            (None, _) => Err("ENOENT"),
            _ if dir != to && into_itself(source, to) => Err("EINVAL"),
            _ if dir != to && how == Rename::Exchange && into_itself(target, dir) => Err("EINVAL"),
            (_, Some(_)) if how == Rename::NoReplace => Err("EEXIST"),
            (_, None) if how == Rename::Exchange => Err("ENOENT"),
            (Some(s), Some(t)) if how != Rename::Exchange && s != t => match (now.is_dir(s), now.is_dir(t)) {
                (true, false) => Err("ENOTDIR"),
                (false, true) => Err("EISDIR"),
                (true, true) if !now.dir(t).is_empty() => Err("ENOTEMPTY"),
                _ => Ok(()),
            },
            _ => Ok(()),
        };
        let (from_ino, to_ino) = (self.ino(dir), self.ino(to));
        if source.is_some() && source == target && want.is_ok() {
            // The same file by both names: nothing happens.
            let op = v.rename(from_ino, name.as_bytes(), to_ino, new.as_bytes(), how);
            self.world.done(host, "rename of a file onto itself", op).await?;
            return Ok(());
        }
        let change = match how {
            Rename::Exchange => Change::Exchange { dir, name: name.clone(), to, new: new.clone() },
            _ => Change::Rename { dir, name: name.clone(), to, new: new.clone() },
        };
        let op = v.rename(from_ino, name.as_bytes(), to_ino, new.as_bytes(), how);
        self.change(host, change, want, op).await?;
        Ok(())
    }

    async fn link(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let Some(id) = self.some_file() else { return Ok(()) };
        let (dir, name) = self.any_name();
        let want = if self.named(dir, &name).is_some() { Err("EEXIST") } else { Ok(()) };
        let op = v.link(self.ino(id), self.ino(dir), name.as_bytes());
        self.change(host, Change::Link { id, dir, name: name.clone() }, want, op).await?;
        Ok(())
    }

    fn contents(&self, id: Id) -> Bytes {
        match &self.tree.now.objs[&id] {
            Obj::File(f) => f.now().clone(),
            other => panic!("object {id} of the model is not a file: {other:?}"),
        }
    }

    /// Bytes that tell where they come from.
    fn fresh_bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut word: u64 = self.rng.random();
        for chunk in bytes.chunks_mut(8) {
            word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let of = (word ^ word >> 29).to_le_bytes();
            chunk.copy_from_slice(&of[..chunk.len()]);
        }
        bytes
    }

    async fn write(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        match self.some_file() {
            Some(id) => self.write_to(host, v, id).await,
            None => Ok(()),
        }
    }

    async fn write_to(&mut self, host: &Arc<Host>, v: &Volume, id: Id) -> Outcome<()> {
        let old = self.contents(id);
        let len = self.pick(&[10usize, 300, 900, 5000, 12_000, 30_000]);
        let append = self.rng.random_bool(0.5) || old.is_empty();
        let offset = match append {
            true => old.len(),
            false => self.rng.random_range(0..old.len() + 6000),
        };
        if offset + len > MOST_BYTES {
            return Ok(());
        }
        let data = self.fresh_bytes(len);
        let mut contents = (*old).clone();
        contents.resize(contents.len().max(offset + len), 0);
        contents[offset..offset + len].copy_from_slice(&data);
        let how = WriteOptions { append, ..WriteOptions::default() };
        let at = if append { 0 } else { offset as u64 };
        let op = v.write(self.ino(id), at, &data, how);
        let change = Change::Write { id, contents: Arc::new(contents) };
        if let Some(at) = self.change(host, change, Ok(()), op).await?
            && at.value != offset as u64
        {
            let what = format!("{} write went to {} instead of {offset}", host.name(), at.value);
            return Err(self.world.fail(what));
        }
        Ok(())
    }

    async fn resize(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let Some(id) = self.some_file() else { return Ok(()) };
        let mut contents = (*self.contents(id)).clone();
        if self.rng.random_bool(0.3) && !contents.is_empty() {
            let from = self.rng.random_range(0..contents.len());
            let to = self.rng.random_range(from + 1..=contents.len());
            contents[from..to].fill(0);
            let how = Fallocate { keep_size: true, punch_hole: true, zero_range: false };
            let op = v.fallocate(self.ino(id), from as u64, (to - from) as u64, how);
            self.change(host, Change::Write { id, contents: Arc::new(contents) }, Ok(()), op).await?;
            return Ok(());
        }
        let size = if self.rng.random_bool(0.3) { 0 } else { self.rng.random_range(0..20_000) };
        contents.resize(size, 0);
        let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
        let op = v.setattr(self.ino(id), set);
        self.change(host, Change::Resize { id, contents: Arc::new(contents) }, Ok(()), op).await?;
        Ok(())
    }

    async fn attributes(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let Some(id) = self.some_file() else { return Ok(()) };
        let ino = self.ino(id);
        if self.rng.random_bool(0.5) {
            let bits = self.pick(&[0o600, 0o640, 0o755]);
            let op = v.setattr(ino, SetAttr { mode: Some(bits), ..SetAttr::default() });
            self.change(host, Change::Mode { id, mode: 0o100000 | bits }, Ok(()), op).await?;
            return Ok(());
        }
        let len = self.pick(&[1usize, 100, 3000, 9000]);
        let value = self.fresh_bytes(len);
        let change = Change::Xattr { id, value: Some(Arc::new(value.clone())) };
        self.change(host, change, Ok(()), v.setxattr(ino, ATTRIBUTE, &value, XattrSet::Any)).await?;
        Ok(())
    }

    async fn check_one(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let Some(id) = self.some_file() else { return Ok(()) };
        let (want, ino) = (self.contents(id), self.ino(id));
        let what = format!("{} read {ino:#x}", self.name);
        let got = self.world.done(host, &what, v.read(ino, 0, 1 << 20)).await?.value;
        if got != *want {
            return Err(self.world.fail(format!(
                "{} {what}: {} bytes differ from {}",
                host.name(),
                got.len(),
                want.len()
            )));
        }
        Ok(())
    }

    /// A file stays readable and writable until it is closed.
    async fn unlinked_but_open(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.some_name();
        let Some(id) = self.named(dir, &name).filter(|id| matches!(self.tree.now.objs[id], Obj::File(_))) else {
            return Ok(());
        };
        if self.tree.now.links(id) > 1 {
            return Ok(());
        }
        let (ino, mut want) = (self.ino(id), (*self.contents(id)).clone());
        self.world.done(host, "open", v.open(ino)).await?;
        let op = v.unlink(self.ino(dir), name.as_bytes());
        self.change(host, Change::Unlink { dir, name: name.clone() }, Ok(()), op).await?;
        let more = self.fresh_bytes(700);
        want.extend_from_slice(&more);
        let append = WriteOptions { append: true, ..WriteOptions::default() };
        match self.world.tried(host, "write of an unlinked file", v.write(ino, 0, &more, append)).await?.map(drop) {
            Ok(()) => {}
            Err("ENOSPC") if self.world.setup.small() => want.truncate(want.len() - more.len()),
            Err(e) => return Err(self.world.fail(format!("{} write of an unlinked file: {e}", host.name()))),
        }
        let pause = Duration::from_millis(self.rng.random_range(0..200));
        tokio::time::sleep(pause).await;
        let got = self.world.done(host, "read of an unlinked file", v.read(ino, 0, 1 << 20)).await?.value;
        if got != want {
            return Err(self.world.fail(format!("{} {}: an unlinked file lost its contents", host.name(), self.name)));
        }
        self.world.call(host, "close", v.release(ino)).await
    }

    async fn fsync(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let latest = self.world.latest();
        let file = if self.rng.random_bool(0.8) { self.some_file() } else { None };
        let dirs = self.tree.now.dirs();
        let id = file.unwrap_or_else(|| self.pick(&dirs));
        let what = format!("{} fsync of {id}", self.name);
        self.world.done(host, &what, v.fsync(self.ino(id), false)).await?;
        self.world.note(format_args!("{} {what} [{latest}]", host.name()));
        host.fsynced(latest);
        self.note_durable();
        self.tree.settle_file(id, latest);
        Ok(())
    }

    async fn sync(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let latest = self.world.latest();
        let (what, patience) = (format!("{} sync", self.name), self.world.setup.patience_with_floods());
        let done = self.world.call_within(host, &what, patience, v.sync()).await?;
        done.map_err(|e| self.world.unexpected(host, &what, &e))?;
        self.world.note(format_args!("{} {} sync [{latest}]", host.name(), self.name));
        host.synced(latest);
        Ok(())
    }

    /// As a mail server does it: whatever has been acknowledged at the end is durable.
    async fn deliver(&mut self, host: &Arc<Host>, v: &Volume) -> Outcome<()> {
        let (dir, name) = self.any_name();
        let (to, new) = self.any_name();
        if self.named(dir, &name).is_some() || self.named(to, &new).is_some() || (dir, &name) == (to, &new) {
            return Ok(());
        }
        let id = self.tree.next;
        self.tree.next += 1;
        let change = Change::Create { dir, name: name.clone(), id, mode: FILE.mode };
        let op = v.mknod(WHO, self.ino(dir), name.as_bytes(), FILE, true);
        let made = self.change(host, change, Ok(()), op).await?;
        // What keeps the reply keeps the domain.
        let Some(ino) = made.map(|m| m.value.ino) else { return Ok(()) };
        self.tree.inos.insert(id, ino);
        self.write_to(host, v, id).await?;
        let latest = self.world.latest();
        self.world.done(host, "fsync", v.fsync(ino, false)).await?;
        host.fsynced(latest);
        self.note_durable();
        self.tree.settle_file(id, latest);
        self.world.call(host, "close", v.release(ino)).await?;
        let change = Change::Rename { dir, name: name.clone(), to, new: new.clone() };
        let op = v.rename(self.ino(dir), name.as_bytes(), self.ino(to), new.as_bytes(), Rename::NoReplace);
        self.change(host, change, Ok(()), op).await?;
        let latest: Ack = self.world.latest();
        self.world.done(host, "fsync", v.fsync(self.ino(to), false)).await?;
        host.fsynced(latest);
        Ok(())
    }
}

/// What a full volume may refuse: all but what frees space.
fn may_need_space(change: &Change) -> bool {
    !matches!(change, Change::Unlink { .. } | Change::Rmdir { .. })
}
