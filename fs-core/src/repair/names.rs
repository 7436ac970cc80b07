//! Corrects what the domains show together: names without inodes, inodes without names, directories that do not hang from
//! the root, counts. Inodes that nothing leads to are named in `lost+found` of the root directory.

use std::collections::{BTreeMap, BTreeSet};

use super::Log;
use super::beyond::Beyond;
use super::load::{Domain, Loaded};
use super::objects::add_entry;
use crate::check::reader::Reader;
use crate::check::{inode_text, name_text};
use crate::format::item::{Dirent, Inode, Key, Kind, ino, ino_domain, ino_local, mode_bits};
use crate::format::layout::ROOT_DOMAIN;
use crate::volume::ROOT_INO;

const DIRECTORY: u8 = 4;
const LOST: &[u8] = b"lost+found";

struct Name {
    dir: u64,
    cookie: u64,
    target: u64,
}

fn file_type(mode: u32) -> u8 {
    (mode >> 12 & 0o17) as u8
}

/// Gives the domains that have to be changed too: if they are not among those that are loaded, nothing that was corrected counts.
pub(super) async fn correct(v: &mut Loaded, r: &Reader, log: &mut Log) -> BTreeSet<u32> {
    let mut inodes: BTreeMap<u64, Inode> = BTreeMap::new();
    for (id, d) in &v.domains {
        for (k, value) in d.items.iter().filter(|(k, _)| k.kind == Kind::Inode as u8) {
            if let Ok(i) = Inode::decode(value) {
                inodes.insert(ino(*id, k.object), i);
            }
        }
    }
    if v.domains.contains_key(&ROOT_DOMAIN) && !inodes.get(&ROOT_INO).is_some_and(Inode::is_dir) {
        log.lose("root directory".into(), "made anew".into());
        if let Some(old) = inodes.remove(&ROOT_INO) {
            // Not a directory: whatever contents it had cannot have a name.
            drop_object(v, ROOT_INO, old.is_dir());
        }
        inodes.insert(
            ROOT_INO,
            Inode { mode: mode_bits::S_IFDIR | 0o755, links: 2, parent: ROOT_INO, ..Inode::default() },
        );
    }
    let beyond = Beyond::new(v, r, &inodes).await;
    let mut touched = beyond.strange.clone();
    let names = names(v, &inodes, &beyond, &mut touched, log);
    let mut f = Tree { v, inodes, beyond, names, touched, log };
    f.reach();
    f.finish();
    f.touched
}

fn drop_object(v: &mut Loaded, number: u64, keep_entries: bool) {
    let Some(d) = v.domains.get_mut(&ino_domain(number)) else { return };
    let keys: Vec<Key> = d.items.keys().filter(|k| k.object == ino_local(number)).copied().collect();
    for k in keys {
        if !(keep_entries && k.kind == Kind::Dirent as u8) {
            d.remove(&k);
        }
    }
}

/// All names that lead to an inode of a loaded domain or stand in one, with the right type; a directory keeps one.
fn names(
    v: &mut Loaded,
    inodes: &BTreeMap<u64, Inode>,
    beyond: &Beyond,
    touched: &mut BTreeSet<u32>,
    log: &mut Log,
) -> Vec<Name> {
    let inode = |number: u64| inodes.get(&number).or_else(|| beyond.inodes.get(&number));
    let mut all = Vec::new();
    let mut wrong: Vec<(u32, Key, Option<Dirent>)> = Vec::new();
    for (id, d) in &v.domains {
        for (k, value) in d.items.iter().filter(|(k, _)| k.kind == Kind::Dirent as u8) {
            let Ok(e) = Dirent::decode(value) else { continue };
            let dir = ino(*id, k.object);
            match inode(e.ino) {
                None => wrong.push((*id, *k, None)),
                Some(i) => {
                    if file_type(i.mode) != e.file_type {
                        wrong.push((*id, *k, Some(Dirent { file_type: file_type(i.mode), ..e.clone() })));
                    }
                    all.push((Name { dir, cookie: k.offset, target: e.ino }, i.is_dir(), i.parent == dir, e.name));
                }
            }
        }
    }
    for (id, k, fixed) in wrong {
        let Some(d) = v.domains.get_mut(&id) else { continue };
        let place = inode_text(ino(id, k.object));
        match fixed {
            None => {
                let name = d.items.get(&k).and_then(|x| Dirent::decode(x).ok()).map_or_else(Vec::new, |e| e.name);
                log.lose(place, format!("name {} dropped, its inode is not there", name_text(&name)));
                d.remove(&k);
            }
            Some(e) => {
                log.mend(place, format!("file type of name {} corrected", name_text(&e.name)));
                d.put(k, e.encode());
            }
        }
    }
    for n in &beyond.names {
        match inode(n.target) {
            Some(i) if file_type(i.mode) == n.file_type => {
                let name = Name { dir: n.parent, cookie: n.cookie, target: n.target };
                all.push((name, i.is_dir(), i.parent == n.parent, Vec::new()));
            }
            _ => {
                touched.insert(ino_domain(n.parent));
            }
        }
    }
    // The name that a directory's own record of its parent agrees with is kept before others.
    let mut kept: BTreeMap<u64, (usize, bool)> = BTreeMap::new();
    for (n, (name, _, agrees, _)) in all.iter().enumerate().filter(|(_, x)| x.1) {
        let k = kept.entry(name.target).or_insert((n, *agrees));
        if !k.1 && *agrees {
            *k = (n, true);
        }
    }
    let mut out = Vec::new();
    for (n, (name, is_dir, _, text)) in all.into_iter().enumerate() {
        if is_dir && kept.get(&name.target).is_some_and(|k| k.0 != n) {
            let why = format!("second name {} of directory {} dropped", name_text(&text), inode_text(name.target));
            log.mend(inode_text(name.dir), why);
            drop_name(v, &name, touched);
        } else {
            out.push(name);
        }
    }
    out
}

fn drop_name(v: &mut Loaded, n: &Name, touched: &mut BTreeSet<u32>) {
    match v.domains.get_mut(&ino_domain(n.dir)) {
        Some(d) => d.remove(&Key::new(ino_local(n.dir), Kind::Dirent, n.cookie)),
        None => {
            touched.insert(ino_domain(n.dir));
        }
    }
}

struct Tree<'a> {
    v: &'a mut Loaded,
    inodes: BTreeMap<u64, Inode>,
    beyond: Beyond,
    names: Vec<Name>,
    touched: BTreeSet<u32>,
    log: &'a mut Log,
}

impl Tree<'_> {
    fn is_dir(&self, number: u64) -> bool {
        let i = self.inodes.get(&number).or_else(|| self.beyond.inodes.get(&number));
        i.is_some_and(Inode::is_dir) || self.beyond.is_dir(number)
    }

    /// Makes everything hang from the root.
    fn reach(&mut self) {
        let mut edges = self.beyond.edges();
        let mut named: BTreeSet<u64> = BTreeSet::new();
        let mut has_entries = BTreeSet::new();
        for n in &self.names {
            named.insert(n.target);
            has_entries.insert(n.dir);
            if self.is_dir(n.target) {
                edges.push((n.dir, n.target));
            }
        }
        edges.sort_unstable();
        let mut reached = BTreeSet::new();
        walk(ROOT_INO, &edges, &mut reached);
        let all: Vec<(u64, Inode)> = self.inodes.iter().map(|(n, i)| (*n, *i)).collect();
        // First what has no name at all, then what only hangs from itself.
        for (number, i) in &all {
            let orphan = i.links == 0 && !(i.is_dir() && has_entries.contains(number));
            if *number != ROOT_INO && !named.contains(number) && !orphan {
                self.lose(*number, i);
                if i.is_dir() {
                    walk(*number, &edges, &mut reached);
                }
            }
        }
        for (number, i) in &all {
            if i.is_dir() && named.contains(number) && !reached.contains(number) {
                if let Some(at) = self.names.iter().position(|n| n.target == *number) {
                    let n = self.names.swap_remove(at);
                    self.log.mend(inode_text(*number), "was its own ancestor".into());
                    drop_name(self.v, &n, &mut self.touched);
                }
                self.lose(*number, i);
                walk(*number, &edges, &mut reached);
            }
        }
        // Whose name was lost, or who hangs only from itself, in a domain that is not loaded.
        let beyond = self.beyond.dirs.iter().filter(|d| !reached.contains(&d.ino));
        self.touched.extend(beyond.map(|d| ino_domain(d.ino)));
    }

    /// Names an inode in lost+found.
    fn lose(&mut self, number: u64, i: &Inode) {
        let dir = self.lost_found();
        let mut name = format!("#{number}");
        let Some(d) = self.v.domains.get_mut(&ino_domain(dir)) else {
            self.touched.insert(ino_domain(dir));
            return;
        };
        while taken(d, dir, name.as_bytes()) {
            name.push('~');
        }
        let e = Dirent { ino: number, file_type: file_type(i.mode), name: name.clone().into_bytes() };
        if add_entry(d, ino_local(dir), &e) {
            self.log.mend(inode_text(number), format!("had no name, is now lost+found/{name}"));
            self.names.push(Name { dir, cookie: 0, target: number });
        }
    }

    fn lost_found(&mut self) -> u64 {
        // Named by the caller as what it takes.
        let Some(root) = self.v.domains.get_mut(&ROOT_DOMAIN) else { return ROOT_INO };
        let mut name = LOST.to_vec();
        loop {
            match entry(root, ROOT_INO, &name) {
                Some(e) if e.file_type == DIRECTORY => return e.ino,
                Some(_) => name.push(b'~'),
                None => break,
            }
        }
        let last = root.items.keys().next_back().map_or(0, |k| k.object);
        let local = root.header.next_local.max(last + 1).max(2);
        let number = ino(ROOT_DOMAIN, local);
        let now = self.inodes.get(&ROOT_INO).map(|r| r.mtime).unwrap_or_default();
        let i = Inode {
            mode: mode_bits::S_IFDIR | 0o700,
            links: 2,
            parent: ROOT_INO,
            generation: root.tenure,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            ..Inode::default()
        };
        root.put(Key::new(local, Kind::Inode, 0), i.encode().to_vec());
        add_entry(root, ino_local(ROOT_INO), &Dirent { ino: number, file_type: DIRECTORY, name });
        self.inodes.insert(number, i);
        self.names.push(Name { dir: ROOT_INO, cookie: 0, target: number });
        number
    }

    /// Link counts, counts of directories, parents, orphans.
    fn finish(&mut self) {
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        let mut sizes: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
        let mut parents: BTreeMap<u64, u64> = BTreeMap::new();
        for n in &self.names {
            *links.entry(n.target).or_default() += 1;
            let s = sizes.entry(n.dir).or_default();
            s.0 += 1;
            if self.is_dir(n.target) {
                s.1 += 1;
                parents.insert(n.target, n.dir);
            }
        }
        parents.insert(ROOT_INO, ROOT_INO);
        let misled = parents.iter().filter(|(t, p)| self.beyond.inodes.get(t).is_some_and(|i| i.parent != **p));
        self.touched.extend(misled.map(|(t, _)| ino_domain(*t)));
        self.touched.extend(self.beyond.miscounted(&links).map(ino_domain));
        let mut orphans = BTreeSet::new();
        for (number, old) in &self.inodes {
            let mut i = *old;
            let named = links.get(number).copied().unwrap_or(0);
            if i.is_dir() {
                let (size, subdirs) = sizes.get(number).copied().unwrap_or_default();
                (i.size, i.subdirs) = (size, subdirs);
                i.links = if named > 0 || *number == ROOT_INO { 2 + subdirs } else { 0 };
                i.parent = parents.get(number).copied().unwrap_or(i.parent);
            } else {
                i.links = named;
            }
            if i.links == 0 {
                orphans.insert(*number);
            }
            let Some(d) = self.v.domains.get_mut(&ino_domain(*number)) else { continue };
            let key = Key::new(ino_local(*number), Kind::Inode, 0);
            let value = i.encode().to_vec();
            if d.items.get(&key) != Some(&value) {
                self.log.mend(inode_text(*number), "links, counts and parent corrected".into());
                d.put(key, value);
            }
        }
        for (id, d) in &mut self.v.domains {
            let known: Vec<Key> = d
                .items
                .range(Key::new(0, Kind::Orphan, 0)..=Key::new(0, Kind::Orphan, u64::MAX))
                .map(|x| *x.0)
                .collect();
            for k in &known {
                if k.offset >> 40 != 0 || !orphans.contains(&ino(*id, k.offset)) {
                    self.log.mend(format!("domain {id}"), format!("orphan {} dropped, it is none", k.offset));
                    d.remove(k);
                }
            }
            for o in orphans.range(ino(*id, 0)..ino(*id + 1, 0)) {
                let key = Key::new(0, Kind::Orphan, ino_local(*o));
                if !d.items.contains_key(&key) {
                    self.log.mend(inode_text(*o), "without links, will be freed".into());
                    d.put(key, Vec::new());
                }
            }
        }
    }
}

/// Follows edges, (from, to) in order.
fn walk(from: u64, edges: &[(u64, u64)], reached: &mut BTreeSet<u64>) {
    let mut todo = vec![from];
    while let Some(d) = todo.pop() {
        if reached.insert(d) {
            let first = edges.partition_point(|e| e.0 < d);
            todo.extend(edges.iter().skip(first).take_while(|e| e.0 == d).map(|e| e.1));
        }
    }
}

fn entry(d: &Domain, dir: u64, name: &[u8]) -> Option<Dirent> {
    let cookie = crate::format::item::name_cookie(name);
    let key = |c| Key::new(ino_local(dir), Kind::Dirent, c);
    let range = key(cookie)..=key(cookie + crate::format::item::INDEX_MAX);
    d.items.range(range).filter_map(|(_, v)| Dirent::decode(v).ok()).find(|e| e.name == name)
}

fn taken(d: &Domain, dir: u64, name: &[u8]) -> bool {
    entry(d, dir, name).is_some()
}
