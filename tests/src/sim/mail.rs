//! Mailboxes that all nodes share: messages are delivered, read, moved and removed by clients on all nodes at once.
//!
//! A message has one name at a time, and one client at a time works on it; between clients and nodes there is no other
//! order. Where it is, every live node must show. After the crash of the node that moved it last it is at one of the places
//! where it was since the last sync, whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fs_core::Rename;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::client::{FILE, WHO};
use super::reading::list;
use super::world::{Ack, Host, Outcome, Seat, Stop, World};

/// A directory of a mailbox: its number in [`Mail::dirs`].
type Dir = usize;
/// `None`: nowhere, not yet or not any more.
type Place = Option<(Dir, String)>;

const PARTS: [&str; 3] = ["tmp", "new", "cur"];

#[derive(Clone)]
struct Message {
    body: Arc<Vec<u8>>,
    /// Someone works on it.
    busy: bool,
    /// Where it was when it was last durable, and since then.
    base: Place,
    moves: Vec<(Ack, Place)>,
    /// Who made the moves, and what was under way when that node died.
    maker: Option<Arc<Host>>,
    pending: Option<Place>,
    /// The body is durable, if the message is.
    whole: bool,
    /// Grows with every change.
    changes: u64,
}

impl Message {
    fn place(&self) -> &Place {
        self.moves.last().map_or(&self.base, |(_, p)| p)
    }

    fn settle(&mut self, upto: Ack) {
        let n = self.moves.iter().take_while(|(ack, _)| *ack <= upto).count();
        if let Some((_, place)) = self.moves.drain(..n).next_back() {
            self.base = place;
        }
    }

    /// Its maker died with something not known to be durable.
    fn unresolved(&self) -> bool {
        self.maker.as_ref().is_some_and(|m| m.dead()) || self.pending.is_some()
    }
}

/// What the clients share.
pub struct Mail {
    /// Inodes of the directories: tmp, new and cur of each mailbox.
    dirs: Vec<u64>,
    messages: Mutex<BTreeMap<u64, Message>>,
}

/// The message that a file name belongs to.
fn number(name: &str) -> Option<u64> {
    name.strip_prefix('m')?.split(':').next()?.parse().ok()
}

fn body(id: u64, len: usize) -> Vec<u8> {
    let line = format!("message {id} of {len} bytes\n");
    line.bytes().cycle().take(len).collect()
}

impl Mail {
    /// Makes the mailboxes, durably.
    pub async fn make(world: &World, host: &Host, root: u64) -> Outcome<Arc<Self>> {
        let v = &host.volume;
        let mut dirs = Vec::new();
        for m in 0..world.setup.mailboxes {
            let name = format!("box{m}");
            let made = world.done(host, "mkdir", v.mkdir(WHO, root, name.as_bytes(), super::client::DIR)).await?;
            for part in PARTS {
                let op = v.mkdir(WHO, made.value.ino, part.as_bytes(), super::client::DIR);
                dirs.push(world.done(host, "mkdir", op).await?.value.ino);
            }
        }
        Ok(Arc::new(Self { dirs, messages: Mutex::default() }))
    }

    fn part(&self, rng: &mut StdRng, part: usize) -> Dir {
        rng.random_range(0..self.dirs.len() / PARTS.len()) * PARTS.len() + part
    }

    /// After the run: on this node every message must be where it was left, and nothing else may be there.
    pub async fn look(&self, world: &World, host: &Arc<Host>) -> Outcome<()> {
        let unresolved: Vec<u64> =
            self.messages.lock().iter().filter(|(_, m)| m.unresolved()).map(|(id, _)| *id).collect();
        for id in unresolved {
            self.resolve(world, host, id).await?;
        }
        for dir in 0..self.dirs.len() {
            self.scan(world, host, dir, true).await?;
        }
        Ok(())
    }

    /// Lists a directory and compares it with what must be there.
    async fn scan(&self, world: &World, host: &Arc<Host>, dir: Dir, read: bool) -> Outcome<()> {
        let quiet = |m: &Message| !m.busy && !m.unresolved();
        let before: BTreeMap<u64, u64> =
            self.messages.lock().iter().filter(|(_, m)| quiet(m)).map(|(id, m)| (*id, m.changes)).collect();
        let what = format!("scan of mailbox directory {dir}");
        let names = list(world, host, &what, self.dirs[dir]).await?;
        let mut found = BTreeMap::new();
        for (name, ino) in &names {
            let Some(id) = number(name) else { return Err(world.fail(format!("{what}: stray name {name}"))) };
            // Moved during the listing it may be in it by both names.
            let still = |m: &Message| quiet(m) && before.get(&id) == Some(&m.changes);
            if found.insert(id, name.clone()).is_some() && self.messages.lock().get(&id).is_some_and(still) {
                return Err(world.fail(format!("{} {what}: message {id} is there twice", host.name())));
            }
            let wanted = self.messages.lock().get(&id).map(|m| m.body.clone());
            let Some(wanted) = wanted else { return Err(world.fail(format!("{what}: stray message {name}"))) };
            // Only what is delivered is whole, and it may be removed at any moment.
            if read && !dir.is_multiple_of(PARTS.len()) {
                match world.call(host, &what, host.volume.read(*ino, 0, 1 << 20)).await? {
                    Ok(got) if got.value == *wanted => {}
                    Ok(got) => {
                        let sizes = format!("{} of {} bytes", got.value.len(), wanted.len());
                        return Err(world.fail(format!("{} {what}: {name} is not whole: {sizes}", host.name())));
                    }
                    Err(fs_core::FsError::Stale) => {}
                    Err(e) => return Err(world.unexpected(host, &format!("{what}: {name}"), &e)),
                }
            }
        }
        let mut messages = self.messages.lock();
        for (id, m) in messages.iter_mut().filter(|(_, m)| quiet(m)) {
            if before.get(id) != Some(&m.changes) {
                continue;
            }
            let want = m.place().as_ref().filter(|(d, _)| *d == dir).map(|(_, n)| n);
            if want != found.get(id) {
                let e = format!("{} {what}: message {id} is {:?} there, not {want:?}", host.name(), found.get(id));
                drop(messages);
                return Err(world.fail(e));
            }
            // Another node has seen it.
            if want.is_some() && m.maker.as_ref().is_some_and(|maker| !Arc::ptr_eq(maker, host)) {
                m.settle(Ack::MAX);
                m.maker = None;
                world.note(format_args!("{} sees message {id} in {dir}", host.name()));
            }
        }
        Ok(())
    }

    /// Finds a message whose mover died.
    async fn resolve(&self, world: &World, host: &Arc<Host>, id: u64) -> Outcome<()> {
        let m = {
            let mut messages = self.messages.lock();
            let Some(m) = messages.get_mut(&id).filter(|m| !m.busy && m.unresolved()) else { return Ok(()) };
            m.busy = true;
            let durable = m.maker.as_ref().map_or(0, |maker| maker.promise.lock().durable);
            m.settle(durable);
            m.clone()
        };
        let result = self.find(world, host, id, &m).await;
        let mut messages = self.messages.lock();
        let Some(now) = messages.get_mut(&id) else { return Ok(()) };
        now.busy = false;
        now.changes += 1;
        let (place, whole) = result?;
        world.note(format_args!("{} finds message {id} at {place:?}", host.name()));
        world.totals.lock().verified += 1;
        now.pending = None;
        let own = now.maker.as_ref().is_some_and(|m| Arc::ptr_eq(m, host));
        if own && place == *now.place() {
            // Another node died before it could move the message. That its own node shows it makes nothing durable.
            return Ok(());
        }
        (now.base, now.maker, now.whole) = (place, None, whole);
        now.moves.clear();
        Ok(())
    }

    async fn find(&self, world: &World, host: &Arc<Host>, id: u64, m: &Message) -> Outcome<(Place, bool)> {
        let dead = m.maker.as_ref().filter(|maker| maker.dead());
        let mut places: Vec<(Ack, Place)> = vec![(0, m.base.clone())];
        places.extend(m.moves.iter().cloned());
        if dead.is_none() {
            // Its moves hold; only what another node had under way is open.
            places.drain(..places.len() - 1);
        }
        places.extend(m.pending.iter().map(|p| (Ack::MAX, p.clone())));
        let mut found = Vec::new();
        for (i, (_, place)) in places.iter().enumerate() {
            if places[..i].iter().any(|(_, p)| p == place) {
                continue;
            }
            let Some((dir, name)) = place else { continue };
            let what = format!("look for message {id}");
            let op = host.volume.lookup(self.dirs[*dir], name.as_bytes());
            let attr = world.done(host, &what, op).await?.value;
            if let Some(attr) = attr {
                let bytes = world.done(host, &what, host.volume.read(attr.ino, 0, 1 << 20)).await?.value;
                let whole = bytes == *m.body;
                if !whole && (m.whole || dir % PARTS.len() != 0 || !bytes.is_empty()) {
                    let e = format!("message {id} at {place:?} has {} of {} bytes", bytes.len(), m.body.len());
                    return Err(world.fail(e));
                }
                found.push((place.clone(), whole));
            }
        }
        let place = match found.len() {
            0 if places.iter().any(|(_, p)| p.is_none()) => (None, true),
            1 => found.remove(0),
            _ => {
                let e = format!("{}: message {id} is at {found:?}, not at one of {places:?}", host.name());
                return Err(world.fail(e));
            }
        };
        if let Some(maker) = dead {
            let fits: Vec<usize> = (0..places.len()).filter(|i| places[*i].1 == place.0).collect();
            let (least, most) = (fits[0], fits[fits.len() - 1]);
            let from = places[..=least].iter().map(|(a, _)| *a).rfind(|a| *a < Ack::MAX).unwrap_or(0);
            world.cut(maker, from, places.get(most + 1).map_or(Ack::MAX, |(a, _)| *a))?;
        }
        Ok(place)
    }
}

/// Works on the mailboxes, with other clients on all nodes.
pub struct Mailer {
    world: Arc<World>,
    mail: Arc<Mail>,
    name: String,
    rng: StdRng,
    next: u64,
}

impl Mailer {
    pub fn new(world: Arc<World>, mail: Arc<Mail>, index: usize) -> Self {
        let rng = StdRng::seed_from_u64(world.setup.seed.wrapping_mul(64).wrapping_add(32 + index as u64));
        Self { world, mail, name: format!("d{index}"), rng, next: index as u64 * 1_000_000 }
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
        while !self.world.over() && !host.retiring.load(std::sync::atomic::Ordering::Relaxed) {
            match self.rng.random_range(0..100) {
                0..3 => return Ok(()),
                3..40 => self.deliver(host).await?,
                40..80 => self.handle(host).await?,
                80..90 => {
                    let dir = self.rng.random_range(0..self.mail.dirs.len());
                    let read = self.rng.random_bool(0.3);
                    self.mail.scan(&self.world, host, dir, read).await?;
                }
                90..97 => {
                    let dir = self.rng.random_range(0..self.mail.dirs.len());
                    self.fsync(host, self.mail.dirs[dir]).await?;
                }
                _ => {
                    let latest = self.world.latest();
                    self.world.done(host, "sync", host.volume.sync()).await?;
                    self.world.note(format_args!("{} {} sync [{latest}]", host.name(), self.name));
                    host.synced(latest);
                }
            }
            let pause = self.rng.random_range(0..=self.world.setup.think_ms);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if host.dead() {
                return Err(Stop::Down);
            }
        }
        Ok(())
    }

    async fn fsync(&self, host: &Host, ino: u64) -> Outcome<()> {
        let latest = self.world.latest();
        self.world.done(host, &format!("{} fsync", self.name), host.volume.fsync(ino, false)).await?;
        self.world.note(format_args!("{} {} fsync of {ino:#x} [{latest}]", host.name(), self.name));
        host.fsynced(latest);
        Ok(())
    }

    /// Moves a message that is ours, by `op`, to `place`. `None`: its last mover died, and it is no longer where it was.
    async fn change<T>(
        &self,
        host: &Arc<Host>,
        id: u64,
        place: Place,
        what: &str,
        op: impl Future<Output = fs_core::Result<T>>,
    ) -> Outcome<Option<T>> {
        let set_pending = |p: Option<Place>| {
            if let Some(m) = self.mail.messages.lock().get_mut(&id) {
                m.pending = p;
            }
        };
        set_pending(Some(place.clone()));
        let what = format!("{} {what} of message {id} to {place:?}", self.name);
        let done = match self.world.tried(host, &what, op).await? {
            Ok(done) => done,
            Err("ENOSPC") if place.is_some() && self.world.setup.small() => {
                set_pending(None);
                return Ok(None);
            }
            Err(errno) => {
                set_pending(None);
                let lost = self.mail.messages.lock().get(&id).is_some_and(|m| m.unresolved());
                return if lost { Ok(None) } else { Err(self.world.fail(format!("{} {what}: {errno}", host.name()))) };
            }
        };
        let ack = self.world.ack();
        self.world.note(format_args!("{} {what} [{ack}]", host.name()));
        if let Some(m) = self.mail.messages.lock().get_mut(&id) {
            m.pending = None;
            if m.maker.as_ref().is_some_and(|maker| !Arc::ptr_eq(maker, host)) {
                // Another node made the earlier moves, and this one saw them.
                m.settle(Ack::MAX);
            } else {
                m.settle(host.promise.lock().durable);
            }
            m.maker = Some(host.clone());
            m.moves.push((ack, place));
            m.changes += 1;
        }
        Ok(Some(done))
    }

    async fn deliver(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let id = self.next;
        self.next += 1;
        let len = [0, 40, 800, 3000, 9000, 20_000][self.rng.random_range(0..6)];
        let message = Message {
            body: Arc::new(body(id, len)),
            busy: true,
            base: None,
            moves: Vec::new(),
            maker: None,
            pending: None,
            whole: false,
            changes: 0,
        };
        self.mail.messages.lock().insert(id, message);
        let done = self.deliver_it(host, id).await;
        self.free(id);
        done
    }

    fn free(&self, id: u64) {
        if let Some(m) = self.mail.messages.lock().get_mut(&id) {
            m.busy = false;
            m.changes += 1;
        }
    }

    async fn deliver_it(&mut self, host: &Arc<Host>, id: u64) -> Outcome<()> {
        let v = &host.volume;
        let tmp = self.mail.part(&mut self.rng, 0);
        let name = format!("m{id}");
        let body = self.mail.messages.lock().get(&id).map(|m| m.body.clone()).unwrap_or_default();
        let op = v.mknod(WHO, self.mail.dirs[tmp], name.as_bytes(), FILE, true);
        let made = self.change(host, id, Some((tmp, name.clone())), "create", op).await?;
        // What keeps the reply keeps the domain.
        let Some(ino) = made.map(|m| m.value.ino) else { return Ok(()) };
        if !body.is_empty() {
            let op = v.write(ino, 0, &body, fs_core::WriteOptions::default());
            let what = format!("{} write of message {id}", self.name);
            match self.world.tried(host, &what, op).await?.map(drop) {
                Ok(()) => {}
                // Not accepted: what was begun is removed like any message.
                Err("ENOSPC") if self.world.setup.small() => {
                    return self.world.call(host, "close", v.release(ino)).await;
                }
                Err(e) => return Err(self.world.fail(format!("{} {what}: {e}", host.name()))),
            }
        }
        self.fsync(host, ino).await?;
        if let Some(m) = self.mail.messages.lock().get_mut(&id) {
            m.whole = true;
        }
        self.world.call(host, "close", v.release(ino)).await?;
        let op =
            v.rename(self.mail.dirs[tmp], name.as_bytes(), self.mail.dirs[tmp + 1], name.as_bytes(), Rename::NoReplace);
        self.change(host, id, Some((tmp + 1, name.clone())), "delivery", op).await?;
        if self.rng.random_bool(0.8) {
            self.fsync(host, self.mail.dirs[tmp + 1]).await?;
        }
        Ok(())
    }

    /// Takes a message and does something with it.
    async fn handle(&mut self, host: &Arc<Host>) -> Outcome<()> {
        let (unresolved, idle): (Vec<u64>, Vec<u64>) = {
            let messages = self.mail.messages.lock();
            let free = messages.iter().filter(|(_, m)| !m.busy);
            let of = |wanted: fn(&Message) -> bool| free.clone().filter(move |(_, m)| wanted(m)).map(|(id, _)| *id);
            (of(|m| m.unresolved()).collect(), of(|m| !m.unresolved() && m.place().is_some()).collect())
        };
        for id in unresolved {
            self.mail.resolve(&self.world, host, id).await?;
        }
        if idle.is_empty() {
            return Ok(());
        }
        let id = idle[self.rng.random_range(0..idle.len())];
        let place = {
            let mut messages = self.mail.messages.lock();
            let Some(m) = messages.get_mut(&id).filter(|m| !m.busy && !m.unresolved()) else { return Ok(()) };
            m.busy = true;
            m.place().clone()
        };
        let done = match place {
            Some((dir, name)) => self.handle_it(host, id, dir, name).await,
            None => Ok(()),
        };
        self.free(id);
        done
    }

    async fn handle_it(&mut self, host: &Arc<Host>, id: u64, dir: Dir, name: String) -> Outcome<()> {
        let v = &host.volume;
        let at = self.mail.dirs[dir];
        if dir.is_multiple_of(PARTS.len()) || self.rng.random_bool(0.3) {
            self.change(host, id, None, "removal", v.unlink(at, name.as_bytes())).await?;
        } else {
            // To cur of this mailbox or another, seen or not.
            let to = self.mail.part(&mut self.rng, 2);
            let new = format!("m{id}:2,{}", ["", "S", "RS"][self.rng.random_range(0..3)]);
            if (to, &new) == (dir, &name) {
                return Ok(());
            }
            let op = v.rename(at, name.as_bytes(), self.mail.dirs[to], new.as_bytes(), Rename::NoReplace);
            self.change(host, id, Some((to, new.clone())), "move", op).await?;
        }
        if self.rng.random_bool(0.2) {
            self.fsync(host, at).await?;
        }
        Ok(())
    }
}
