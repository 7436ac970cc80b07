//! Corrects what one inode or one domain shows by itself: items that cannot be, contents, attributes, the domain's records.
//! What several domains show together is [`super::names`]'s.

use std::collections::BTreeMap;

use super::Log;
use super::load::{Domain, Loaded};
use crate::format::file_lock;
use crate::format::item::{
    Dirent, ExtentItem, FLAG_INLINE, INDEX_BITS, INDEX_MAX, INLINE_MAX, Inode, Key, Kind, LOCAL_BITS, PIECE_MAX, Time,
    decode_xattr_piece, ino, mode_bits, name_cookie, xattr_offset,
};
use crate::format::layout::{BLOCK, FIRST_SLOT_DOMAIN};
use crate::volume::ROOT_INO;

const MAX_SIZE: u64 = i64::MAX as u64;
const FILE_TYPES: [u32; 7] = [1, 2, 4, 6, 8, 10, 12];

type Items = Vec<(Key, Vec<u8>)>;

pub(super) fn correct(v: &mut Loaded, log: &mut Log) {
    let domains = u64::from(v.layout.domains());
    let slots = FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(v.layout.nodes);
    let layout = v.layout;
    for (id, d) in &mut v.domains {
        let keys: Vec<Key> = d.items.keys().copied().collect();
        let mut objects: BTreeMap<u64, Items> = BTreeMap::new();
        for k in keys {
            let value = d.items.get(&k).cloned().unwrap_or_default();
            if k.object >> LOCAL_BITS != 0 {
                log.lose(format!("domain {id}"), format!("an item of object {}, which cannot be, dropped", k.object));
                d.remove(&k);
            } else if k.object == 0 {
                let good = match k.kind {
                    x if x == Kind::Orphan as u8 => true,
                    x if x == Kind::DeferredFree as u8 => slots.contains(id) && value.len() == 8,
                    x if x == Kind::FileLock as u8 => file_lock::decode(&value).is_ok(),
                    x if x == Kind::Leftover as u8 => slots.contains(id) && k.offset < domains,
                    _ => false,
                };
                if !good {
                    log.lose(format!("domain {id}"), format!("a record of kind {} dropped", k.kind));
                    d.remove(&k);
                }
            } else {
                objects.entry(k.object).or_default().push((k, value));
            }
        }
        for (local, items) in objects {
            let inside = |e: &ExtentItem| {
                let group = layout.group_within(e.start);
                group.is_some()
                    && e.start.checked_add(e.len.into()).is_some_and(|x| layout.group_within(x - 1) == group)
            };
            Object { domain: *id, local, d, log }.correct(&items, &inside);
        }
    }
}

struct Object<'a> {
    domain: u32,
    local: u64,
    d: &'a mut Domain,
    log: &'a mut Log,
}

fn of(items: &Items, kind: Kind) -> impl Iterator<Item = &(Key, Vec<u8>)> {
    items.iter().filter(move |(k, _)| k.kind == kind as u8)
}

impl Object<'_> {
    fn place(&self) -> String {
        crate::check::inode_text(ino(self.domain, self.local))
    }

    fn drop_item(&mut self, key: &Key, why: &str) {
        self.log.lose(self.place(), format!("{why} dropped"));
        self.d.remove(key);
    }

    fn correct(mut self, items: &Items, inside: &dyn Fn(&ExtentItem) -> bool) {
        let mut inode = None;
        for (k, value) in items {
            match k.kind {
                x if x == Kind::Inode as u8 => match Inode::decode(value) {
                    Ok(i) if k.offset == 0 => inode = Some(i),
                    _ => self.drop_item(k, "an inode that makes no sense"),
                },
                x if (Kind::Xattr as u8..=Kind::Dirent as u8).contains(&x) => {}
                x => self.drop_item(k, &format!("an item of unknown kind {x}")),
            }
        }
        let entries = of(items, Kind::Dirent).count();
        let (inline, extents) = (of(items, Kind::Inline).count(), of(items, Kind::Extent).count());
        let found = inode;
        let mut i = match inode {
            Some(i) if FILE_TYPES.contains(&(i.mode >> 12 & 0o17)) => Inode { mode: i.mode & 0o177_777, ..i },
            Some(i) => {
                let directory = entries > 0;
                let taken = if directory { "directory" } else { "file" };
                self.log.lose(self.place(), format!("its file type is lost: taken for a {taken}"));
                let kind = if directory { mode_bits::S_IFDIR } else { mode_bits::S_IFREG };
                Inode { mode: i.mode & 0o7777 | kind, ..i }
            }
            None if entries + inline + extents == 0 => {
                for (k, _) in of(items, Kind::Xattr) {
                    self.drop_item(k, "an attribute without an inode");
                }
                return;
            }
            // The contents are there: they get an inode that only root can read.
            None => {
                self.log.lose(self.place(), "its inode is lost, its contents get a new one".into());
                let mode = if entries > 0 { mode_bits::S_IFDIR | 0o700 } else { mode_bits::S_IFREG | 0o600 };
                let flags = if extents == 0 && inline > 0 { FLAG_INLINE } else { 0 };
                Inode { mode, links: 1, size: u64::MAX, flags, ..Inode::default() }
            }
        };
        for t in [&mut i.atime, &mut i.mtime, &mut i.ctime, &mut i.btime] {
            if t.nanos >= 1_000_000_000 {
                *t = Time { nanos: 0, ..*t };
            }
        }
        let dying = i.links == 0;
        self.attributes(items, dying);
        let (blocks, end) = self.extents(items, &i, inside);
        if found.is_some() && !dying && i.is_file() && i.blocks > blocks {
            let text = format!("{} of its blocks are lost, and read as zeros", i.blocks - blocks);
            self.log.lose(self.place(), text);
        }
        i.blocks = blocks;
        let has_blocks = blocks > 0;
        self.inline(items, &mut i, has_blocks);
        let contents = Key::new(self.local, Kind::Inline, 0);
        if found.is_some()
            && !dying
            && i.is_file()
            && i.is_inline()
            && i.size > 0
            && inline == 0
            && self.d.in_gap(&contents)
        {
            self.log.lose(self.place(), format!("its contents ({} bytes) are lost, it is empty now", i.size));
            i.size = 0;
        }
        if i.is_file() && i.size > MAX_SIZE {
            i.size = if i.is_inline() { i.size } else { end.saturating_mul(BLOCK) };
        }
        if i.is_symlink() && i.size == 0 && i.links > 0 {
            self.log.lose(self.place(), "a symbolic link without its target dropped".into());
            let left: Vec<Key> = items.iter().map(|(k, _)| *k).collect();
            for k in left {
                self.d.remove(&k);
            }
            return;
        }
        self.entries(items, &i);
        if found != Some(i) {
            if found.is_some() {
                self.log.mend(self.place(), "counts and times corrected".into());
            }
            self.d.put(Key::new(self.local, Kind::Inode, 0), i.encode().to_vec());
        }
    }

    /// Keeps attributes that have all their pieces.
    fn attributes(&mut self, items: &Items, dying: bool) {
        let mut by_name: BTreeMap<Vec<u8>, (u8, bool, Vec<Key>)> = BTreeMap::new();
        for (k, value) in of(items, Kind::Xattr) {
            match decode_xattr_piece(value) {
                Ok((name, pieces, _)) if !name.is_empty() && pieces > 0 && k.offset & !0xff == xattr_offset(name) => {
                    let x = by_name.entry(name.to_vec()).or_insert((pieces, true, Vec::new()));
                    x.1 &= x.0 == pieces;
                    x.2.push(*k);
                }
                _ => self.drop_item(k, "an attribute that makes no sense"),
            }
        }
        for (pieces, same, keys) in by_name.into_values() {
            if !same || (keys.len() != usize::from(pieces) && !dying) {
                for k in keys {
                    self.drop_item(&k, "a piece of an attribute that is not whole");
                }
            }
        }
    }

    /// Gives the blocks of the extents that stay, and the end of the last one.
    fn extents(&mut self, items: &Items, i: &Inode, inside: &dyn Fn(&ExtentItem) -> bool) -> (u64, u64) {
        let (mut blocks, mut end) = (0, 0);
        let extents: Vec<&(Key, Vec<u8>)> = of(items, Kind::Extent).collect();
        for (n, (k, value)) in extents.iter().enumerate() {
            let mut e = match ExtentItem::decode(value) {
                Ok(e) if i.is_file() => e,
                _ => {
                    self.drop_item(k, "an extent that makes no sense");
                    continue;
                }
            };
            // One that is too long for its place is cut to what may be the file's.
            let room = extents.get(n + 1).map_or(u64::MAX, |next| next.0.offset) - k.offset;
            if !inside(&e) || u64::from(e.len) > room {
                let size = i.size.min(MAX_SIZE).div_ceil(BLOCK).saturating_sub(k.offset);
                let cut = ExtentItem { len: size.min(room).min(e.len.into()) as u32, ..e };
                if cut.len > 0 && inside(&cut) {
                    self.log
                        .lose(self.place(), format!("the extent at file block {} cut to {} blocks", k.offset, cut.len));
                    self.d.put(*k, cut.encode().to_vec());
                    e = cut;
                }
            }
            let to = k.offset.saturating_add(e.len.into());
            if !inside(&e) || k.offset < end || to > MAX_SIZE / BLOCK + 1 {
                self.drop_item(k, &format!("the extent at file block {}, which cannot be,", k.offset));
                continue;
            }
            end = to;
            blocks += u64::from(e.len);
        }
        (blocks, end)
    }

    fn inline(&mut self, items: &Items, i: &mut Inode, has_blocks: bool) {
        let wanted = (i.is_file() && !has_blocks) || i.is_symlink();
        let (mut total, mut next) = (0, 0);
        for (k, value) in of(items, Kind::Inline) {
            let room = if i.is_file() { INLINE_MAX as u64 } else { u64::MAX };
            if !wanted || k.offset != next || value.len() > PIECE_MAX || total + value.len() as u64 > room {
                self.drop_item(k, "inline contents that do not belong there");
                continue;
            }
            next += 1;
            total += value.len() as u64;
        }
        if i.is_symlink() {
            if i.links > 0 {
                i.size = total;
            }
        } else if i.is_file() {
            if has_blocks {
                i.flags &= !FLAG_INLINE;
            } else if next > 0 {
                i.flags |= FLAG_INLINE;
            }
            if i.is_inline() && (i.size < total || i.size > INLINE_MAX as u64) {
                i.size = total;
            }
        }
    }

    /// Names that can be found and that are there once.
    fn entries(&mut self, items: &Items, i: &Inode) {
        let mut seen: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let mut misplaced = Vec::new();
        for (k, value) in of(items, Kind::Dirent) {
            let e = match Dirent::decode(value) {
                Ok(e) if i.is_dir() && e.name != b"." && e.name != b".." && e.ino != ROOT_INO => e,
                _ => {
                    self.drop_item(k, "a name that cannot be");
                    continue;
                }
            };
            let cookie = name_cookie(&e.name);
            if !(cookie..=cookie + INDEX_MAX).contains(&k.offset) || seen.contains_key(&e.name) {
                self.d.remove(k);
                misplaced.push(e);
            } else {
                seen.insert(e.name, e.ino);
            }
        }
        for mut e in misplaced {
            let name = e.name.clone();
            if seen.get(&name) == Some(&e.ino) {
                self.log.mend(self.place(), format!("a second entry {} dropped", crate::check::name_text(&name)));
                continue;
            }
            for n in 1..1000 {
                if !seen.contains_key(&e.name) && add_entry(self.d, self.local, &e) {
                    break;
                }
                let tail = format!("~{n}");
                e.name = [&name[..name.len().min(255 - tail.len())], tail.as_bytes()].concat();
            }
            self.log.mend(
                self.place(),
                format!("name {} entered as {}", crate::check::name_text(&name), crate::check::name_text(&e.name)),
            );
            seen.insert(e.name, e.ino);
        }
    }
}

/// Enters a name under the first free cookie of its hash; false if there is none.
pub(super) fn add_entry(d: &mut Domain, dir: u64, e: &Dirent) -> bool {
    let cookie = name_cookie(&e.name);
    debug_assert_eq!(cookie >> INDEX_BITS << INDEX_BITS, cookie);
    let key = (cookie..=cookie + INDEX_MAX).map(|c| Key::new(dir, Kind::Dirent, c));
    let Some(key) = key.into_iter().find(|k| !d.items.contains_key(k)) else { return false };
    d.put(key, e.encode());
    true
}
