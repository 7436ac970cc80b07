//! Names against inodes, across domains: link counts, types, parents, and whether every directory hangs from the root.

use std::collections::BTreeSet;

use cluster::LockId;
use journal::block::BlockKind;

use super::domain::{DIRECTORY, file_type, inode_text};
use super::reader::{DomainNodes, Reader};
use super::report::{Report, name_text};
use crate::format::domain::DomainHeader;
use crate::format::item::{Dirent, Inode, Key, Kind, ino_domain, ino_local};
use crate::tree::{self, Root};
use crate::volume::ROOT_INO;

/// Names that have something wrong, kept until their text can be looked up.
const MAX_SUSPECTS: usize = 2000;

/// A name whose inode may lie in another domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct External {
    pub target: u64,
    pub parent: u64,
    pub cookie: u64,
    pub file_type: u8,
}

/// An inode whose own domain does not have as many names for it as it should have.
pub(crate) struct Need {
    pub ino: u64,
    pub names: u32,
    pub seen: u32,
    pub mode: u32,
    pub parent: u64,
}

/// A directory that is not removed.
pub(crate) struct Dir {
    pub ino: u64,
    pub parent: u64,
}

#[derive(Clone, Copy)]
enum Wrong {
    Missing,
    Type,
    Parent(u64),
}

/// Collected over all domains; its size goes with the names that cross domains, and with the directories.
#[derive(Default)]
pub(crate) struct Links {
    pub external: Vec<External>,
    pub needs: Vec<Need>,
    pub dirs: Vec<Dir>,
    /// Domains of which a part could not be read: what is missing there is not reported again.
    pub broken: BTreeSet<u32>,
    /// Domains that have such a name, or the inode that it leads to.
    pub damaged: BTreeSet<u32>,
    suspects: Vec<(External, Wrong)>,
    suspects_dropped: u64,
}

impl Links {
    fn suspect(&mut self, name: External, wrong: Wrong) {
        self.damaged.extend([ino_domain(name.parent), ino_domain(name.target)]);
        if self.suspects.len() < MAX_SUSPECTS {
            self.suspects.push((name, wrong));
        } else {
            self.suspects_dropped += 1;
        }
    }

    /// The name's inode is not there.
    pub fn missing(&mut self, name: External) {
        self.suspect(name, Wrong::Missing);
    }

    /// The name's inode is there: do they fit?
    pub fn compare(&mut self, name: &External, mode: u32, parent: u64) {
        if name.file_type != file_type(mode) {
            self.suspect(*name, Wrong::Type);
        }
        if file_type(mode) == DIRECTORY && parent != name.parent {
            self.suspect(*name, Wrong::Parent(parent));
        }
    }

    /// Every domain has been read: matches the names that cross domains, then walks the directories.
    pub async fn finish(mut self, r: &Reader, headers: &[(u32, u64)], report: &mut Report) {
        self.external.sort_unstable();
        self.needs.sort_unstable_by_key(|n| n.ino);
        let external = std::mem::take(&mut self.external);
        let needs = std::mem::take(&mut self.needs);
        let mut rest = external.as_slice();
        for need in &needs {
            // Names of inodes that need none: they are gone, or have all their names already.
            let before = rest.partition_point(|e| e.target < need.ino);
            self.surplus(&rest[..before], r, headers, report).await;
            rest = &rest[before..];
            let n = rest.partition_point(|e| e.target == need.ino);
            for name in &rest[..n] {
                self.compare(name, need.mode, need.parent);
            }
            rest = &rest[n..];
            let seen = u64::from(need.seen) + n as u64;
            // A domain of which a part is missing may have the rest of the names.
            if seen > need.names.into() || (seen < need.names.into() && self.broken.is_empty()) {
                let text = format!("should have {} names, has {seen}", need.names);
                report.violation(inode_text(need.ino), text);
                self.damaged.insert(ino_domain(need.ino));
            }
        }
        self.surplus(rest, r, headers, report).await;
        for (name, wrong) in std::mem::take(&mut self.suspects) {
            let place = place(&name, r, headers, report).await;
            let target = inode_text(name.target);
            match wrong {
                Wrong::Missing => report.violation(place, format!("refers to {target}, which is not there")),
                Wrong::Type => report.violation(place, format!("has another file type than its {target}")),
                Wrong::Parent(p) => {
                    report.violation(place, format!("leads to directory {target}, whose parent is {}", inode_text(p)));
                }
            }
        }
        report.violation_count += self.suspects_dropped;
        self.walk(report);
        report.damaged.append(&mut self.damaged);
    }

    async fn surplus(&mut self, names: &[External], r: &Reader, headers: &[(u32, u64)], report: &mut Report) {
        let mut last = None;
        for name in names {
            if self.broken.contains(&ino_domain(name.target)) {
                continue;
            }
            if !report.has_room() || self.suspects.len() >= MAX_SUSPECTS {
                self.damaged.extend([ino_domain(name.parent), ino_domain(name.target)]);
                self.suspects_dropped += 1;
                continue;
            }
            match lookup(r, headers, name.target).await {
                Some(i) => {
                    self.compare(name, i.mode, i.parent);
                    if last != Some(name.target) {
                        let text = format!("has more names than its {} links", i.links);
                        report.violation(inode_text(name.target), text);
                        self.damaged.insert(ino_domain(name.target));
                    }
                }
                None => self.missing(*name),
            }
            last = Some(name.target);
        }
    }

    /// Whether every directory's parents lead to the root. Each has one name, in its parent, so no other way needs looking at.
    fn walk(&mut self, report: &mut Report) {
        self.dirs.sort_unstable_by_key(|d| d.ino);
        let dirs = &self.dirs;
        let find = |ino: u64| dirs.binary_search_by_key(&ino, |d| d.ino).ok();
        if find(ROOT_INO).is_none() && !self.broken.contains(&ino_domain(ROOT_INO)) {
            report.violation("volume", "has no root directory");
            self.damaged.insert(ino_domain(ROOT_INO));
        }
        // 0 not seen, 1 on the way now, 2 done
        let mut state = vec![0u8; dirs.len()];
        let mut way = Vec::new();
        for start in 0..dirs.len() {
            let mut next = Some(start);
            while let Some(at) = next.take() {
                match state.get_mut(at) {
                    Some(s @ 0) => *s = 1,
                    Some(1) => {
                        let text = "is its own ancestor: nothing leads to it from the root";
                        if let Some(d) = dirs.get(at) {
                            report.violation(inode_text(d.ino), text);
                            self.damaged.extend([ino_domain(d.ino), ino_domain(d.parent)]);
                        }
                        break;
                    }
                    _ => break,
                }
                way.push(at);
                let Some(d) = dirs.get(at) else { break };
                if d.ino == ROOT_INO {
                    if d.parent != ROOT_INO {
                        report.violation("root directory", format!("has a parent: {}", inode_text(d.parent)));
                        self.damaged.insert(ino_domain(d.ino));
                    }
                    break;
                }
                next = find(d.parent);
                if next.is_none() && !self.broken.contains(&ino_domain(d.parent)) {
                    let text = format!("its parent, {}, is not a directory that is there", inode_text(d.parent));
                    report.violation(inode_text(d.ino), text);
                    self.damaged.insert(ino_domain(d.ino));
                }
            }
            for at in way.drain(..) {
                if let Some(s) = state.get_mut(at) {
                    *s = 2;
                }
            }
        }
    }
}

/// The tree of a domain, read anew.
async fn root(r: &Reader, headers: &[(u32, u64)], domain: u32) -> Option<Root> {
    let at = headers.binary_search_by_key(&domain, |h| h.0).ok()?;
    let (_, block) = *headers.get(at)?;
    let b = r.one(block).await.ok()?;
    r.verify(block, &b, LockId::Domain(domain), BlockKind::DomainHeader).ok()?;
    Some(DomainHeader::decode(&b).ok()?.tree())
}

pub(crate) async fn lookup(r: &Reader, headers: &[(u32, u64)], number: u64) -> Option<Inode> {
    let domain = ino_domain(number);
    let root = root(r, headers, domain).await?;
    let key = Key::new(ino_local(number), Kind::Inode, 0);
    let value = tree::get(&DomainNodes { reader: r, domain }, root, &key).await.ok()??;
    Inode::decode(&value).ok()
}

/// The directory and the name, if that can be read.
async fn place(name: &External, r: &Reader, headers: &[(u32, u64)], report: &Report) -> String {
    let dir = inode_text(name.parent);
    let domain = ino_domain(name.parent);
    if report.has_room()
        && let Some(root) = root(r, headers, domain).await
    {
        let key = Key::new(ino_local(name.parent), Kind::Dirent, name.cookie);
        if let Ok(Some(v)) = tree::get(&DomainNodes { reader: r, domain }, root, &key).await
            && let Ok(e) = Dirent::decode(&v)
        {
            return format!("{dir}, name {}", name_text(&e.name));
        }
    }
    format!("{dir}, entry {}", name.cookie)
}
