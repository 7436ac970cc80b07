//! The model of a directory tree that one client works on, and what of it may be there after a crash.
//!
//! The tree is a state that is known to be durable and the changes since, each with the number under which it was
//! acknowledged. After a crash some prefix of the changes must be there, not shorter than what was synced. Contents reach
//! the device later than names do: in the state after a prefix a file has the contents of some moment between its last
//! sync and the end of that prefix. Where contents were written over older ones in place, newer ones may show through, by
//! sectors; cutting a file short writes zeros over the rest of its last block.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::world::Ack;

pub type Id = u64;
pub type Bytes = Arc<Vec<u8>>;

/// The unit that a device writes whole.
const SECTOR: usize = 512;
/// The unit in which contents are written: what lies in the last one beyond the end of a file that was cut is zeros.
const BLOCK: usize = 4096;
/// Contents up to this size lie in the tree as long as the file never had blocks, and change as a whole.
const INLINE: usize = 1024;
pub const ROOT: Id = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Contents since the last that are known to be durable, oldest first.
    pub versions: Vec<(Ack, Bytes)>,
    /// It has, or had, blocks of its own.
    pub blocks: bool,
    pub mode: u32,
    pub xattr: Option<Bytes>,
}

impl File {
    pub fn now(&self) -> &Bytes {
        &self.versions[self.versions.len() - 1].1
    }

    fn settle(&mut self, upto: Ack) {
        let durable = self.versions.iter().rposition(|(ack, _)| *ack <= upto).unwrap_or(0);
        self.versions.drain(..durable);
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obj {
    Dir(BTreeMap<String, Id>),
    File(File),
    Link(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Create {
        dir: Id,
        name: String,
        id: Id,
        mode: u32,
    },
    Mkdir {
        dir: Id,
        name: String,
        id: Id,
    },
    Symlink {
        dir: Id,
        name: String,
        id: Id,
        target: String,
    },
    Link {
        id: Id,
        dir: Id,
        name: String,
    },
    Unlink {
        dir: Id,
        name: String,
    },
    Rmdir {
        dir: Id,
        name: String,
    },
    Rename {
        dir: Id,
        name: String,
        to: Id,
        new: String,
    },
    Exchange {
        dir: Id,
        name: String,
        to: Id,
        new: String,
    },
    Mode {
        id: Id,
        mode: u32,
    },
    Xattr {
        id: Id,
        value: Option<Bytes>,
    },
    /// The contents that a write leads to.
    Write {
        id: Id,
        contents: Bytes,
    },
    /// The same, but as a change of the inode: in order with the names.
    Resize {
        id: Id,
        contents: Bytes,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub objs: BTreeMap<Id, Obj>,
}

impl State {
    pub fn new() -> Self {
        Self { objs: BTreeMap::from([(ROOT, Obj::Dir(BTreeMap::new()))]) }
    }

    pub fn dir(&self, id: Id) -> &BTreeMap<String, Id> {
        match &self.objs[&id] {
            Obj::Dir(names) => names,
            other => panic!("object {id} of the model is not a directory: {other:?}"),
        }
    }

    fn names(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        match self.objs.get_mut(&id) {
            Some(Obj::Dir(names)) => names,
            other => panic!("object {id} of the model is not a directory: {other:?}"),
        }
    }

    fn file(&mut self, id: Id) -> &mut File {
        match self.objs.get_mut(&id) {
            Some(Obj::File(f)) => f,
            other => panic!("object {id} of the model is not a file: {other:?}"),
        }
    }

    pub fn is_dir(&self, id: Id) -> bool {
        matches!(self.objs[&id], Obj::Dir(_))
    }

    pub fn dirs(&self) -> Vec<Id> {
        self.objs.iter().filter(|(_, o)| matches!(o, Obj::Dir(_))).map(|(id, _)| *id).collect()
    }

    pub fn files(&self) -> Vec<Id> {
        self.objs.iter().filter(|(_, o)| matches!(o, Obj::File(_))).map(|(id, _)| *id).collect()
    }

    pub fn links(&self, id: Id) -> usize {
        let dirs = self.objs.values().filter_map(|o| if let Obj::Dir(names) = o { Some(names) } else { None });
        dirs.flat_map(|d| d.values()).filter(|n| **n == id).count()
    }

    /// Whether `dir` lies in `of` or is it.
    pub fn inside(&self, dir: Id, of: Id) -> bool {
        dir == of
            || matches!(&self.objs[&of], Obj::Dir(names) if names.values().any(|n| self.is_dir(*n) && self.inside(dir, *n)))
    }

    fn drop_if_unnamed(&mut self, id: Id) {
        if self.links(id) == 0 {
            self.objs.remove(&id);
        }
    }

    pub fn apply(&mut self, ack: Ack, change: &Change) {
        match change.clone() {
            Change::Create { dir, name, id, mode } => {
                let file = File { versions: vec![(ack, Bytes::default())], blocks: false, mode, xattr: None };
                self.objs.insert(id, Obj::File(file));
                self.names(dir).insert(name, id);
            }
            Change::Mkdir { dir, name, id } => {
                self.objs.insert(id, Obj::Dir(BTreeMap::new()));
                self.names(dir).insert(name, id);
            }
            Change::Symlink { dir, name, id, target } => {
                self.objs.insert(id, Obj::Link(target));
                self.names(dir).insert(name, id);
            }
            Change::Link { id, dir, name } => {
                self.names(dir).insert(name, id);
            }
            Change::Unlink { dir, name } | Change::Rmdir { dir, name } => {
                if let Some(id) = self.names(dir).remove(&name) {
                    self.drop_if_unnamed(id);
                }
            }
            Change::Rename { dir, name, to, new } => {
                if let Some(id) = self.names(dir).remove(&name)
                    && let Some(old) = self.names(to).insert(new, id)
                {
                    self.drop_if_unnamed(old);
                }
            }
            Change::Exchange { dir, name, to, new } => {
                let (a, b) = (self.dir(dir)[&name], self.dir(to)[&new]);
                self.names(dir).insert(name, b);
                self.names(to).insert(new, a);
            }
            Change::Mode { id, mode } => self.file(id).mode = mode,
            Change::Xattr { id, value } => self.file(id).xattr = value,
            Change::Write { id, contents } => {
                let f = self.file(id);
                f.blocks |= contents.len() > INLINE;
                f.versions.push((ack, contents));
            }
            Change::Resize { id, contents } => {
                let f = self.file(id);
                f.blocks |= contents.len() > INLINE;
                f.versions = vec![(ack, contents)];
            }
        }
    }
}

/// What a node showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Dir {
        ino: u64,
        names: BTreeMap<String, Seen>,
    },
    File {
        ino: u64,
        contents: Bytes,
        mode: u32,
        links: u32,
        xattr: Option<Bytes>,
    },
    Link {
        ino: u64,
        target: String,
    },
    /// An error said that it is damaged.
    Damaged,
}

impl Seen {
    /// Whether some of it is damaged.
    pub fn has_damage(&self) -> bool {
        match self {
            Seen::Damaged => true,
            Seen::Dir { names, .. } => names.values().any(Seen::has_damage),
            _ => false,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Tree {
    base: State,
    changes: Vec<(Ack, Change)>,
    /// With all changes.
    pub now: State,
    pub inos: BTreeMap<Id, u64>,
    pub next: Id,
}

/// Which prefix of the changes was found after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub changes: usize,
    pub of: usize,
    /// All changes up to this one are there.
    pub from: Ack,
    /// Those from this one on are not.
    pub to: Ack,
}

impl Tree {
    pub fn new(root_ino: u64) -> Self {
        let s = State::new();
        Self { base: s.clone(), changes: Vec::new(), now: s, inos: BTreeMap::from([(ROOT, root_ino)]), next: ROOT + 1 }
    }

    pub fn acked(&mut self, ack: Ack, change: Change) {
        self.now.apply(ack, &change);
        self.changes.push((ack, change));
    }

    /// Changes of names and inodes up to `names` are durable, contents up to `contents`.
    pub fn settle(&mut self, names: Ack, contents: Ack) {
        let n = self.changes.iter().take_while(|(ack, _)| *ack <= names).count();
        for (ack, change) in self.changes.drain(..n) {
            self.base.apply(ack, &change);
        }
        for s in [&mut self.base, &mut self.now] {
            for o in s.objs.values_mut() {
                if let Obj::File(f) = o {
                    f.settle(contents);
                }
            }
        }
    }

    /// The contents of one file up to `upto` are durable; what is not in `base` yet is no worse for it.
    pub fn settle_file(&mut self, id: Id, upto: Ack) {
        for s in [&mut self.base, &mut self.now] {
            if let Some(Obj::File(f)) = s.objs.get_mut(&id) {
                f.settle(upto);
            }
        }
    }

    /// What a live node shows must be the latest state.
    pub fn check_now(&self, seen: &Seen) -> Result<(), String> {
        Match::new(&self.latest(), &BTreeMap::new(), &self.inos).object(ROOT, seen, "")
    }

    /// The latest state alone, without what contents were before.
    fn latest(&self) -> State {
        let mut latest = self.now.clone();
        for o in latest.objs.values_mut() {
            if let Obj::File(f) = o {
                f.settle(Ack::MAX);
            }
        }
        latest
    }

    /// As [`Tree::check_now`], while a change may be half done.
    pub fn check_half_done(&self, seen: &Seen, pending: &Change) -> Result<(), String> {
        let mut both = self.latest();
        both.apply(Ack::MAX, pending);
        let mut late = BTreeMap::new();
        if let Change::Write { id, contents } | Change::Resize { id, contents } = pending {
            let old = match &self.now.objs[id] {
                Obj::File(f) => f.now().clone(),
                _ => Bytes::default(),
            };
            both.file(*id).versions = vec![(0, old.clone()), (Ack::MAX, contents.clone())];
            late.insert(*id, vec![old, contents.clone()]);
        }
        self.check_now(seen).or_else(|e| {
            let also = Match::new(&both, &late, &self.inos).object(ROOT, seen, "");
            also.map_err(|f| format!("before {}: {e}; after it: {f}", brief(pending)))
        })
    }

    /// Everything so far is durable.
    pub fn settle_all(&mut self) {
        self.settle(Ack::MAX, Ack::MAX);
    }

    /// After the crash of the node that made the changes: which prefix of them, and of `pending` that was under way, is
    /// what another node shows. The model goes on from there.
    pub fn check_crashed(&mut self, seen: &Seen, pending: Option<Change>) -> Result<Found, String> {
        if let Some(change) = pending {
            self.changes.push((Ack::MAX, change));
        }
        let late = self.contents_by_file();
        let (mut state, mut fits, mut whys) = (self.base.clone(), Vec::new(), Vec::new());
        for k in 0..=self.changes.len() {
            if k > 0 {
                let (ack, change) = &self.changes[k - 1];
                state.apply(*ack, change);
            }
            let mut m = Match::new(&state, &late, &self.inos);
            match m.object(ROOT, seen, "") {
                Ok(()) => fits.push((k, m.adopt())),
                Err(e) => whys.push(format!("after {k} of {} changes: {e}", self.changes.len())),
            }
        }
        let Some((k, (state, inos))) = fits.last().cloned() else {
            let changes: Vec<_> = self.changes.iter().map(|(a, c)| format!("    {a}: {}", brief(c))).collect();
            return Err(format!(
                "no state that was allowed: {}\n  changes since the durable state:\n{}",
                whys.join("\n  "),
                changes.join("\n")
            ));
        };
        let least = fits.first().map_or(k, |f| f.0);
        // What was under way has no number.
        let from = self.changes[..least].iter().map(|(a, _)| *a).rfind(|a| *a < Ack::MAX).unwrap_or(0);
        let to = self.changes.get(k).map_or(Ack::MAX, |(a, _)| *a);
        let found = Found { changes: k, of: self.changes.len(), from, to };
        (self.base, self.now, self.inos) = (state.clone(), state, inos);
        self.changes.clear();
        Ok(found)
    }

    /// All contents that files have had since the durable state.
    fn contents_by_file(&self) -> BTreeMap<Id, Vec<Bytes>> {
        let mut all: BTreeMap<Id, Vec<Bytes>> = BTreeMap::new();
        // Of these the last block has been cut, and is zeros beyond the end.
        let mut cut = BTreeSet::new();
        for (id, o) in &self.base.objs {
            if let Obj::File(f) = o {
                all.insert(*id, f.versions.iter().map(|(_, c)| c.clone()).collect());
            }
        }
        for (_, change) in &self.changes {
            match change {
                Change::Create { id, .. } => all.entry(*id).or_default().push(Bytes::default()),
                Change::Write { id, contents } | Change::Resize { id, contents } => {
                    let of = all.entry(*id).or_default();
                    let blocks = matches!(self.base.objs.get(id), Some(Obj::File(f)) if f.blocks)
                        || of.iter().any(|old| old.len() > INLINE);
                    if blocks && of.last().is_some_and(|old| old.len() > contents.len()) {
                        cut.insert(*id);
                    }
                    of.push(contents.clone());
                    if cut.contains(id) && !contents.len().is_multiple_of(BLOCK) {
                        let mut whole = (**contents).clone();
                        whole.resize(contents.len().next_multiple_of(BLOCK), 0);
                        of.push(Arc::new(whole));
                    }
                }
                _ => {}
            }
        }
        all
    }
}

pub fn brief(c: &Change) -> String {
    match c {
        Change::Write { id, contents } => format!("Write {{ id: {id}, {} bytes }}", contents.len()),
        Change::Resize { id, contents } => format!("Resize {{ id: {id}, {} bytes }}", contents.len()),
        Change::Xattr { id, value } => format!("Xattr {{ id: {id}, {:?} bytes }}", value.as_ref().map(|v| v.len())),
        c => format!("{c:?}"),
    }
}

/// Compares a state with what was seen, and remembers what belongs to what.
struct Match<'a> {
    state: &'a State,
    late: &'a BTreeMap<Id, Vec<Bytes>>,
    inos: BTreeMap<Id, u64>,
    ids: BTreeMap<u64, Id>,
    contents: BTreeMap<Id, Bytes>,
}

impl<'a> Match<'a> {
    fn new(state: &'a State, late: &'a BTreeMap<Id, Vec<Bytes>>, inos: &BTreeMap<Id, u64>) -> Self {
        let inos: BTreeMap<_, _> =
            inos.iter().filter(|(id, _)| state.objs.contains_key(id)).map(|(i, n)| (*i, *n)).collect();
        let ids = inos.iter().map(|(id, ino)| (*ino, *id)).collect();
        Self { state, late, inos, ids, contents: BTreeMap::new() }
    }

    fn object(&mut self, id: Id, seen: &Seen, path: &str) -> Result<(), String> {
        let (Seen::Dir { ino, .. } | Seen::File { ino, .. } | Seen::Link { ino, .. }) = seen else { return Ok(()) };
        let (was, whose) = (*self.inos.entry(id).or_insert(*ino), *self.ids.entry(*ino).or_insert(id));
        if was != *ino || whose != id {
            return Err(format!("{path} is inode {ino:#x} instead of {was:#x}"));
        }
        match (&self.state.objs[&id], seen) {
            (Obj::Dir(names), Seen::Dir { names: found, .. }) => {
                for (name, id) in names {
                    let Some(seen) = found.get(name) else { return Err(format!("{path}/{name} is missing")) };
                    self.object(*id, seen, &format!("{path}/{name}"))?;
                }
                match found.keys().find(|n| !names.contains_key(*n)) {
                    Some(more) => Err(format!("{path}/{more} should not be there")),
                    None => Ok(()),
                }
            }
            (Obj::Link(target), Seen::Link { target: found, .. }) if target == found => Ok(()),
            (Obj::File(f), Seen::File { contents, mode, links, xattr, .. }) => {
                let want = self.state.links(id);
                if *links as usize != want {
                    return Err(format!("{path} has {links} links instead of {want}"));
                }
                if *mode != f.mode || *xattr != f.xattr {
                    return Err(format!(
                        "{path} has mode {mode:o} instead of {:o}, or its attribute has {:?} instead of {:?} bytes",
                        f.mode,
                        xattr.as_ref().map(|x| x.len()),
                        f.xattr.as_ref().map(|x| x.len())
                    ));
                }
                let late = self.late.get(&id).map_or(&[][..], |l| l);
                may_be(f, late, contents).map_err(|e| format!("{path}: {e}"))?;
                self.contents.insert(id, contents.clone());
                Ok(())
            }
            _ => Err(format!("{path} is of another kind")),
        }
    }

    /// The state with the contents that were found.
    fn adopt(self) -> (State, BTreeMap<Id, u64>) {
        let mut state = self.state.clone();
        for (id, contents) in self.contents {
            if let Some(Obj::File(f)) = state.objs.get_mut(&id) {
                f.versions = vec![(0, contents)];
            }
        }
        (state, self.inos)
    }
}

/// Whether a file may have these contents. `late`: all that were ever written since it was synced.
fn may_be(f: &File, late: &[Bytes], found: &Bytes) -> Result<(), String> {
    if f.versions.iter().any(|(_, v)| v == found) {
        return Ok(());
    }
    let sizes: Vec<_> = f.versions.iter().map(|(_, v)| v.len()).collect();
    let wrong = |what: String| Err(format!("{what}; it has {} bytes, sizes allowed are {sizes:?}", found.len()));
    if late.len() < 2 || !f.blocks && late.iter().all(|v| v.len() <= INLINE) {
        return wrong(first_difference(f.now(), found));
    }
    let mut why = "its size was never that".to_string();
    for (_, at) in f.versions.iter().filter(|(_, v)| v.len() == found.len()) {
        // What is older than the size cannot show: contents are durable before the size is.
        let from = late.iter().position(|v| Arc::ptr_eq(v, at)).unwrap_or(0);
        let alien = found.chunks(SECTOR).enumerate().find(|(i, chunk)| {
            let start = i * SECTOR;
            !late[from..].iter().any(|v| v.get(start..start + chunk.len()) == Some(*chunk))
        });
        match alien {
            None => return Ok(()),
            Some((i, _)) => why = format!("sector {i} has contents that it never had; {}", first_difference(at, found)),
        }
    }
    wrong(why)
}

fn first_difference(want: &[u8], found: &[u8]) -> String {
    match want.iter().zip(found).position(|(a, b)| a != b) {
        Some(i) => format!("byte {i} is {:#x} instead of {:#x}", found[i], want[i]),
        None => format!("{} bytes instead of {}", found.len(), want.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(b: u8, len: usize) -> Bytes {
        Arc::new(vec![b; len])
    }

    fn file(versions: &[Bytes]) -> File {
        let versions = versions.iter().cloned().enumerate().map(|(i, v)| (i as Ack, v)).collect();
        File { versions, blocks: true, mode: 0, xattr: None }
    }

    #[test]
    fn contents_may_be_a_mixture_by_sectors_of_what_was_written_over() {
        let (a, b) = (bytes(1, 4096), bytes(2, 4096));
        let late = [a.clone(), b.clone()];
        let mut mixed = vec![1; 4096];
        mixed[512..1024].fill(2);
        let f = file(&late[..1]);
        assert!(may_be(&f, &late, &Arc::new(mixed.clone())).is_ok());
        assert!(may_be(&f, &late[..1], &Arc::new(mixed.clone())).is_err());
        mixed[512] = 1;
        assert!(may_be(&f, &late, &Arc::new(mixed)).is_err());
        assert!(may_be(&f, &late, &bytes(1, 4095)).is_err());
    }

    #[test]
    fn a_prefix_of_the_changes_is_found_and_nothing_else() {
        let create = |name: &str, id| Change::Create { dir: ROOT, name: name.into(), id, mode: 0 };
        let mut t = Tree::new(1);
        t.acked(1, create("a", 1));
        t.acked(2, create("b", 2));
        t.acked(3, create("c", 3));
        t.settle(1, 0);
        let seen = |names: &[&str]| Seen::Dir {
            ino: 1,
            names: names
                .iter()
                .enumerate()
                .map(|(i, n)| {
                    let (contents, ino) = (Bytes::default(), 10 + i as u64);
                    (n.to_string(), Seen::File { ino, contents, mode: 0, links: 1, xattr: None })
                })
                .collect(),
        };
        assert!(t.clone().check_crashed(&seen(&[]), None).is_err(), "a was durable");
        assert!(t.clone().check_crashed(&seen(&["a", "c"]), None).is_err(), "c came after b");
        let found = t.clone().check_crashed(&seen(&["a", "b"]), None).unwrap();
        assert_eq!((found.changes, found.from, found.to), (1, 2, 3));
        let pending = create("d", 4);
        assert!(t.clone().check_crashed(&seen(&["a", "b", "c", "d"]), Some(pending)).is_ok());
        assert!(t.check_now(&seen(&["a", "b"])).is_err());
        assert!(t.check_now(&seen(&["a", "b", "c"])).is_ok());
    }
}
