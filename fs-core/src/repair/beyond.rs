//! What lies beyond the domains that are loaded: the other domains' names and inodes, as far as names and counts of the loaded ones
//! depend on them. Nothing of it can be changed; a domain in which something would have to be is loaded in another round.

use std::collections::{BTreeMap, BTreeSet};

use super::load::Loaded;
use crate::check::links::{Dir, External, Links, Need, lookup};
use crate::check::reader::Reader;
use crate::format::item::{Dirent, Inode, Kind, ino_domain, mode_bits};

pub(super) struct Beyond {
    /// Names of other domains that lead to another domain than their own, by what they lead to; only those that concern a
    /// loaded one, or an inode in `inodes`.
    pub names: Vec<External>,
    /// All directories of other domains, ascending.
    pub dirs: Vec<Dir>,
    /// Inodes of other domains that names of loaded ones lead to.
    pub inodes: BTreeMap<u64, Inode>,
    /// Domains with names or inodes that do not fit together, none of them loaded.
    pub strange: BTreeSet<u32>,
    /// Inodes of other domains of which not all names are in their own, ascending: how many are elsewhere.
    needs: Vec<(u64, u32)>,
    /// Names of other domains that lead to directories of other domains: (parent, directory).
    far: Vec<(u64, u64)>,
    /// How many names in other domains, but their own, lead to the inodes in `needs` and `inodes`.
    far_names: BTreeMap<u64, u32>,
}

impl Beyond {
    pub async fn new(v: &mut Loaded, r: &Reader, loaded: &BTreeMap<u64, Inode>) -> Self {
        let Links { external, needs, mut dirs, .. } = std::mem::take(&mut v.links);
        dirs.sort_unstable_by_key(|d| d.ino);
        let elsewhere = |n: &Need| (n.ino, n.names.saturating_sub(n.seen));
        let mut needs: Vec<(u64, u32)> = needs.iter().map(elsewhere).collect();
        needs.sort_unstable();
        let mut b = Beyond {
            names: Vec::new(),
            dirs,
            inodes: BTreeMap::new(),
            strange: BTreeSet::new(),
            needs,
            far: Vec::new(),
            far_names: BTreeMap::new(),
        };
        for d in v.domains.values() {
            for value in d.items.iter().filter(|(k, _)| k.kind == Kind::Dirent as u8).map(|x| x.1) {
                let Ok(e) = Dirent::decode(value) else { continue };
                if loaded.contains_key(&e.ino) || b.inodes.contains_key(&e.ino) || !v.is_other(ino_domain(e.ino)) {
                    continue;
                }
                let dir = b.dirs.binary_search_by_key(&e.ino, |d| d.ino).ok().and_then(|at| b.dirs.get(at));
                let inode = match dir {
                    Some(d) => Some(Inode { mode: mode_bits::S_IFDIR, links: 2, parent: d.parent, ..Inode::default() }),
                    None => lookup(r, &v.others, e.ino).await,
                };
                b.inodes.extend(inode.map(|i| (e.ino, i)));
            }
        }
        for n in external {
            if !v.is_other(ino_domain(n.target)) || b.inodes.contains_key(&n.target) {
                b.names.push(n);
            } else {
                // An inode that has names elsewhere lacks some in its own domain.
                if !b.has_need(n.target) {
                    b.strange.extend([ino_domain(n.parent), ino_domain(n.target)]);
                }
                *b.far_names.entry(n.target).or_default() += 1;
                if n.file_type == 4 {
                    b.far.push((n.parent, n.target));
                }
            }
        }
        // A directory's name in its own domain.
        let own = b.inodes.iter().filter(|(n, i)| i.is_dir() && !b.has_need(**n));
        let own = own.map(|(n, i)| External { target: *n, parent: i.parent, cookie: 0, file_type: 4 });
        let own: Vec<External> = own.collect();
        b.names.extend(own);
        b
    }

    fn has_need(&self, number: u64) -> bool {
        self.needs.binary_search_by_key(&number, |n| n.0).is_ok()
    }

    pub fn is_dir(&self, number: u64) -> bool {
        self.dirs.binary_search_by_key(&number, |d| d.ino).is_ok()
    }

    /// Which directory of other domains leads to which, by names that are in other domains and not among [`names`](Self::names).
    pub fn edges(&self) -> Vec<(u64, u64)> {
        let own = self.dirs.iter().filter(|d| !self.has_need(d.ino) && !self.inodes.contains_key(&d.ino));
        own.map(|d| (d.parent, d.ino)).chain(self.far.iter().copied()).collect()
    }

    /// Inodes of other domains that do not have as many names as they should. `named` counts the names in loaded domains and
    /// those among [`names`](Self::names).
    pub fn miscounted<'a>(&'a self, named: &'a BTreeMap<u64, u32>) -> impl Iterator<Item = u64> + 'a {
        let seen = |n: u64| named.get(&n).copied().unwrap_or(0) + self.far_names.get(&n).copied().unwrap_or(0);
        let needing = self.needs.iter().filter(move |(n, want)| seen(*n) != *want).map(|n| n.0);
        // Of the others all names are in their own domain; of a directory that one is among `names`.
        let seen = move |n: u64, i: &Inode| {
            named.get(&n).copied().unwrap_or(0) + self.far_names.get(&n).copied().unwrap_or(0) != u32::from(i.is_dir())
        };
        let sated = self.inodes.iter().filter(move |(n, i)| !self.has_need(**n) && seen(**n, i)).map(|x| *x.0);
        needing.chain(sated)
    }
}
