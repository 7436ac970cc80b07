//! The items of one domain, in the order of keys: inodes, contents, names.

use crate::format::domain::DomainHeader;
use crate::format::file_lock;
use crate::format::item::{
    Dirent, ExtentItem, INDEX_BITS, INDEX_MAX, INLINE_MAX, Inode, Key, Kind, LOCAL_BITS, PIECE_MAX, decode_xattr_piece,
    ino, ino_domain, ino_local, name_cookie, xattr_offset,
};
use crate::format::layout::{BLOCK, FIRST_SLOT_DOMAIN};
use crate::volume::ROOT_INO;

use super::links::{Dir, External, Links, Need};
use super::report::{Report, name_text};
use super::space::Space;

/// Largest file: offsets are signed 64-bit numbers.
const MAX_SIZE: u64 = i64::MAX as u64;

/// File types as names carry them: st_mode >> 12.
pub(super) const DIRECTORY: u8 = 4;
/// Fifo, character device, directory, block device, file, symbolic link, socket.
const FILE_TYPES: [u8; 7] = [1, 2, DIRECTORY, 6, 8, 10, 12];

pub(super) fn file_type(mode: u32) -> u8 {
    (mode >> 12 & 0o17) as u8
}

/// A name of this domain whose inode is of this domain too.
struct LocalName {
    target: u64,
    parent: u64,
    cookie: u64,
    file_type: u8,
}

/// What is remembered of an inode until the domain's names are known.
struct Summary {
    local: u64,
    links: u32,
    mode: u32,
    parent: u64,
    names: u32,
}

/// The inode whose items are being met.
#[derive(Default)]
struct Object {
    local: u64,
    inode: Option<Inode>,
    /// There is no inode that can be read, and that has been said.
    stray: bool,
    inline: u64,
    pieces: u64,
    blocks: u64,
    /// First file block behind the latest extent.
    extents_end: u64,
    entries: u64,
    subdirs: u64,
    /// Names of the latest hash: only those can be the same.
    same_hash: Vec<Vec<u8>>,
    xattr: Option<Xattr>,
}

/// The extended attribute whose pieces are being met.
struct Xattr {
    name: Vec<u8>,
    pieces: u8,
    met: u8,
}

/// The check of one domain, fed with its items.
pub(super) struct DomainCheck {
    domain: u32,
    slot_domain: bool,
    object: Object,
    inodes: Vec<Summary>,
    names: Vec<LocalName>,
    orphans: Vec<u64>,
    file_locks: u64,
}

/// What all domains together are checked against.
pub(super) struct Shared<'a> {
    pub space: &'a mut Space,
    pub links: &'a mut Links,
    pub report: &'a mut Report,
}

impl Shared<'_> {
    /// A domain in which something is wrong, if there are more violations than there were.
    pub fn mark(&mut self, before: u64, domain: u32) {
        if self.report.violation_count != before {
            self.report.damaged.insert(domain);
        }
    }
}

impl DomainCheck {
    pub fn new(domain: u32, nodes: u16) -> Self {
        let slots = FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(nodes);
        Self {
            domain,
            slot_domain: slots.contains(&domain),
            object: Object::default(),
            inodes: Vec::new(),
            names: Vec::new(),
            orphans: Vec::new(),
            file_locks: 0,
        }
    }

    fn ino(&self, local: u64) -> u64 {
        ino(self.domain, local)
    }

    fn place(&self) -> String {
        inode_text(self.ino(self.object.local))
    }

    /// The next item; keys ascend.
    pub fn item(&mut self, key: Key, value: &[u8], s: &mut Shared<'_>) {
        if key.object >= 1 << LOCAL_BITS {
            s.report.violation(
                format!("domain {}", self.domain),
                format!("item of object {} has no inode number", key.object),
            );
            return;
        }
        if key.object != self.object.local {
            self.finish_object(s);
            self.object = Object { local: key.object, ..Object::default() };
        }
        if key.object == 0 {
            return self.domain_record(key, value, s.space, s.report);
        }
        if key.kind == Kind::Inode as u8 {
            return self.inode(key, value, s.report);
        }
        if self.object.inode.is_none() && !self.object.stray {
            self.object.stray = true;
            s.report.violation(self.place(), format!("has items (kind {}), but no inode", key.kind));
        }
        match key.kind {
            k if k == Kind::Xattr as u8 => self.xattr(key, value, s.report),
            k if k == Kind::Inline as u8 => self.inline(key, value, s.report),
            k if k == Kind::Extent as u8 => self.extent(key, value, s.space, s.report),
            k if k == Kind::Dirent as u8 => self.dirent(key, value, s),
            k => s.report.violation(self.place(), format!("item of unknown kind {k}")),
        }
    }

    /// Object 0: the domain's own records.
    fn domain_record(&mut self, key: Key, value: &[u8], space: &mut Space, report: &mut Report) {
        let d = self.domain;
        let place = || format!("domain {d}");
        match key.kind {
            k if k == Kind::Orphan as u8 => self.orphans.push(key.offset),
            k if k == Kind::DeferredFree as u8 && self.slot_domain => match <[u8; 8]>::try_from(value) {
                Ok(len) => {
                    let who = || format!("domain {d}, deferred free");
                    space.claim(key.offset, u64::from_le_bytes(len), report, &who);
                }
                Err(_) => report.violation(place(), "a deferred free has no length"),
            },
            k if k == Kind::Leftover as u8 && self.slot_domain => {
                if key.offset >= u64::from(space.layout.domains()) {
                    report.violation(place(), format!("says that domain {} has leftovers: there is none", key.offset));
                }
            }
            k if k == Kind::FileLock as u8 => {
                self.file_locks += 1;
                if let Err(e) = file_lock::decode(value) {
                    report.violation(place(), format!("file lock {}: {e}", key.offset));
                }
            }
            k => report.violation(place(), format!("record of kind {k} does not belong here")),
        }
    }

    fn inode(&mut self, key: Key, value: &[u8], report: &mut Report) {
        if key.offset != 0 {
            return report.violation(self.place(), "second inode item");
        }
        let inode = match Inode::decode(value) {
            Ok(i) => i,
            Err(e) => {
                self.object.stray = true;
                return report.violation(self.place(), e);
            }
        };
        if !FILE_TYPES.contains(&file_type(inode.mode)) || inode.mode > 0o177777 {
            report.violation(self.place(), format!("mode {:o} is of no file type", inode.mode));
        }
        for t in [inode.atime, inode.mtime, inode.ctime, inode.btime] {
            if t.nanos >= 1_000_000_000 {
                report.violation(self.place(), format!("a time stamp has {} nanoseconds", t.nanos));
            }
        }
        self.object.inode = Some(inode);
    }

    fn xattr(&mut self, key: Key, value: &[u8], report: &mut Report) {
        let (name, pieces, _) = match decode_xattr_piece(value) {
            Ok(p) => p,
            Err(e) => return report.violation(self.place(), e),
        };
        let place = || format!("{}, attribute {}", inode_text(ino(self.domain, self.object.local)), name_text(name));
        if name.is_empty() || pieces == 0 {
            report.violation(place(), "has no name or no pieces");
        }
        if key.offset & !0xff != xattr_offset(name) {
            report.violation(place(), "lies under the hash of another name");
        }
        let same = self.object.xattr.as_ref().is_some_and(|x| x.name == name);
        if same {
            if let Some(x) = &mut self.object.xattr {
                if x.pieces != pieces {
                    report.violation(place(), "its pieces disagree about their number");
                }
                x.met = x.met.saturating_add(1);
            }
        } else {
            let name = name.to_vec();
            self.finish_xattr(report);
            self.object.xattr = Some(Xattr { name, pieces, met: 1 });
        }
    }

    fn finish_xattr(&mut self, report: &mut Report) {
        // An inode without links is freed in steps, which may stop anywhere.
        let dying = self.object.inode.is_some_and(|i| i.links == 0);
        if let Some(x) = self.object.xattr.take().filter(|x| x.met != x.pieces && !dying) {
            let place = format!("{}, attribute {}", self.place(), name_text(&x.name));
            report.violation(place, format!("has {} of {} pieces", x.met, x.pieces));
        }
    }

    fn inline(&mut self, key: Key, value: &[u8], report: &mut Report) {
        let o = &mut self.object;
        let bad = key.offset != o.pieces || value.len() > PIECE_MAX;
        o.pieces += 1;
        o.inline += value.len() as u64;
        if bad {
            report.violation(self.place(), format!("inline contents: piece {} of {} bytes", key.offset, value.len()));
        }
    }

    fn extent(&mut self, key: Key, value: &[u8], space: &mut Space, report: &mut Report) {
        let e = match ExtentItem::decode(value) {
            Ok(e) => e,
            Err(e) => return report.violation(self.place(), e),
        };
        let file_block = key.offset;
        if file_block < self.object.extents_end {
            report.violation(self.place(), format!("extent at file block {file_block} overlaps the one before it"));
        }
        let end = file_block.saturating_add(e.len.into());
        if end > MAX_SIZE / BLOCK + 1 {
            report.violation(self.place(), format!("extent at file block {file_block} lies beyond any file"));
        }
        self.object.extents_end = end;
        self.object.blocks = self.object.blocks.saturating_add(e.len.into());
        let me = self.ino(self.object.local);
        space.claim(e.start, e.len.into(), report, &|| format!("{}, file block {file_block}", inode_text(me)));
    }

    fn dirent(&mut self, key: Key, value: &[u8], s: &mut Shared<'_>) {
        let dir = self.object.local;
        let e = match Dirent::decode(value) {
            Ok(e) => e,
            Err(e) => return s.report.violation(self.place(), format!("{e}, at cookie {}", key.offset)),
        };
        let place = || format!("{}, name {}", inode_text(ino(self.domain, dir)), name_text(&e.name));
        if e.name == b"." || e.name == b".." {
            s.report.violation(place(), "is a name that no entry may have");
        }
        let cookie = name_cookie(&e.name);
        if !(cookie..=cookie + INDEX_MAX).contains(&key.offset) {
            s.report.violation(place(), "lies under the hash of another name, so it cannot be found");
        }
        let o = &mut self.object;
        if o.same_hash.first().is_some_and(|n| name_cookie(n) >> INDEX_BITS != key.offset >> INDEX_BITS) {
            o.same_hash.clear();
        }
        if o.same_hash.contains(&e.name) {
            s.report.violation(place(), "is there twice");
        }
        o.same_hash.push(e.name.clone());
        o.entries += 1;
        let is_dir = e.file_type == DIRECTORY;
        o.subdirs += u64::from(is_dir);
        if e.ino == ROOT_INO {
            s.report.violation(place(), "refers to the root directory");
        } else if ino_domain(e.ino) == self.domain {
            let name = LocalName { target: ino_local(e.ino), parent: dir, cookie: key.offset, file_type: e.file_type };
            self.names.push(name);
        } else {
            let parent = self.ino(dir);
            s.links.external.push(External { target: e.ino, parent, cookie: key.offset, file_type: e.file_type });
        }
    }

    /// All items of one inode are known.
    fn finish_object(&mut self, s: &mut Shared<'_>) {
        self.finish_xattr(s.report);
        let place = self.place();
        let o = &self.object;
        let Some(i) = o.inode else { return };
        let mut bad = |text: String| s.report.violation(&place, text);
        if i.blocks != o.blocks {
            bad(format!("counts {} blocks, its extents have {}", i.blocks, o.blocks));
        }
        if i.is_dir() {
            if i.size != o.entries {
                bad(format!("counts {} entries, has {}", i.size, o.entries));
            }
            if u64::from(i.subdirs) != o.subdirs {
                bad(format!("counts {} subdirectories, has {}", i.subdirs, o.subdirs));
            }
            if i.links != 0 && u64::from(i.links) != 2 + o.subdirs {
                bad(format!("has {} links, {} subdirectories make {}", i.links, o.subdirs, 2 + o.subdirs));
            }
            if i.links == 0 && o.entries > 0 {
                bad("is removed, but not empty".into());
            }
        } else if o.entries > 0 {
            bad("has entries, but is not a directory".into());
        }
        if !i.is_file() && o.blocks > 0 {
            bad("has blocks, but is not a file".into());
        }
        if !i.is_file() && !i.is_symlink() && o.pieces > 0 {
            bad("has inline contents, but is neither file nor symbolic link".into());
        }
        if i.is_symlink() && i.links > 0 && (i.size != o.inline || i.size == 0) {
            bad(format!("symbolic link of {} bytes has a target of {}", i.size, o.inline));
        }
        if i.is_file() {
            if i.size > MAX_SIZE {
                bad(format!("is {} bytes long: no file can be", i.size));
            }
            let inline = i.is_inline();
            if inline && o.blocks > 0 {
                bad("is inline and has blocks too".into());
            }
            if !inline && o.pieces > 0 {
                bad("has inline contents, but says that it has not".into());
            }
            if inline && (o.inline > i.size || o.inline > INLINE_MAX as u64 || i.size > INLINE_MAX as u64) {
                bad(format!("inline file of {} bytes has {} of contents", i.size, o.inline));
            }
        }
        let r = &mut s.report;
        if i.is_file() {
            r.files += 1;
            r.bytes = r.bytes.saturating_add(i.size);
        } else if i.is_dir() {
            r.dirs += 1;
        } else if i.is_symlink() {
            r.symlinks += 1;
        } else {
            r.specials += 1;
        }
        self.inodes.push(Summary { local: o.local, links: i.links, mode: i.mode, parent: i.parent, names: 0 });
    }

    /// All items of the domain are known. `whole` is false if a part of the tree could not be read: then what seems to be
    /// missing may be there.
    pub fn finish(mut self, header: &DomainHeader, whole: bool, s: &mut Shared<'_>) {
        self.finish_object(s);
        let d = self.domain;
        let place = format!("domain {d}");
        if let Some(last) = self.inodes.last().filter(|l| l.local >= header.next_local) {
            let text = format!("its next inode is number {}, but it has {}", header.next_local, last.local);
            s.report.violation(&place, text);
        }
        if whole {
            self.counts(header, &place, s.report);
        }
        for n in std::mem::take(&mut self.names) {
            let parent = ino(d, n.parent);
            match self.inodes.binary_search_by_key(&n.target, |i| i.local) {
                Ok(at) => {
                    let Some(i) = self.inodes.get_mut(at) else { continue };
                    i.names = i.names.saturating_add(1);
                    let name = External { target: ino(d, n.target), parent, cookie: n.cookie, file_type: n.file_type };
                    s.links.compare(&name, i.mode, i.parent);
                }
                Err(_) if whole => s.links.missing(External {
                    target: ino(d, n.target),
                    parent,
                    cookie: n.cookie,
                    file_type: n.file_type,
                }),
                Err(_) => {}
            }
        }
        for i in &self.inodes {
            let number = ino(d, i.local);
            let is_dir = file_type(i.mode) == DIRECTORY;
            let names = match (number, is_dir, i.links) {
                (ROOT_INO, ..) | (_, _, 0) => 0,
                (_, true, _) => 1,
                (_, false, links) => links,
            };
            if i.names != names {
                s.links.needs.push(Need { ino: number, names, seen: i.names, mode: i.mode, parent: i.parent });
            }
            if is_dir && i.links > 0 {
                s.links.dirs.push(Dir { ino: number, parent: i.parent });
            }
        }
    }

    /// The header's counters, and orphans against inodes without links.
    fn counts(&self, header: &DomainHeader, place: &str, report: &mut Report) {
        if header.inodes != self.inodes.len() as u64 {
            report
                .violation(place, format!("its header counts {} inodes, it has {}", header.inodes, self.inodes.len()));
        }
        if header.orphans != self.orphans.len() as u64 {
            report.violation(
                place,
                format!("its header counts {} orphans, it has {}", header.orphans, self.orphans.len()),
            );
        }
        if header.file_locks != self.file_locks {
            let text = format!("its header counts {} file locks, it has {}", header.file_locks, self.file_locks);
            report.violation(place, text);
        }
        report.orphans += self.orphans.len() as u64;
        for o in &self.orphans {
            let found = self.inodes.binary_search_by_key(o, |i| i.local).ok().and_then(|at| self.inodes.get(at));
            match found {
                None => report.violation(place, format!("orphan {o} has no inode")),
                Some(i) if i.links > 0 => {
                    report.violation(inode_text(self.ino(*o)), format!("is an orphan with {} links", i.links));
                }
                Some(_) => {}
            }
        }
        for i in self.inodes.iter().filter(|i| i.links == 0) {
            if self.orphans.binary_search(&i.local).is_err() {
                report
                    .violation(inode_text(self.ino(i.local)), "has no links and is no orphan: it will never be freed");
            }
        }
    }
}

/// An inode, named so that it can be found: by number as stat shows it, and by its place.
pub(crate) fn inode_text(number: u64) -> String {
    format!("inode {number} (domain {}, number {})", ino_domain(number), ino_local(number))
}
