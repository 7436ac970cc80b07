//! Writes what was corrected: new trees into blocks that nothing uses, then the headers and lock blocks that lead to them.
//!
//! The order makes a crash harmless: first the bitmaps get every block of the old and of the new trees, then the new trees and
//! copies are written, then the headers change (one sector each), and last the bitmaps lose what is not used any more.
//! All other slots are claimed, so nobody reads in between.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, Caw, IoClass};
use cluster::{LockBlock, LockId, LockValue};
use journal::block::{BlockHeader, BlockKind, seal, set_version};
use journal::{BLOCK_SIZE, Block};

use super::load::{Domain, Group, Loaded, bad_holder};
use super::{Log, RepairError};
use crate::check::blocks::Blocks;
use crate::check::inode_text;
use crate::format::domain::DomainHeader;
use crate::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, MAX_DOMAINS_PER_GROUP, bit, set_bit};
use crate::format::item::{ExtentItem, Key, Kind, ino};
use crate::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, NO_DOMAIN, VolumeLayout};
use crate::tree::node::{CAPACITY, RawKey, cost, inner_body, leaf_body, rebuild};

/// Tenures and sequence numbers of a lock block that could not be read go on this far beyond what its blocks say (I8).
const BEYOND: u64 = 1 << 32;

/// Versions of a new tree go on this far beyond what the header says, which may be older than its nodes.
const VERSIONS_BEYOND: u64 = 1 << 20;
/// Blocks copied at once.
const COPY: u64 = 256;

pub(super) struct Plan {
    /// Old and new together: nothing in here may be given away before the end.
    busy: Blocks,
    /// What is in use at the end.
    last: Blocks,
    nodes: Vec<(u64, Block)>,
    copies: Vec<(u64, u64, u64)>,
    cursor: u64,
}

impl Plan {
    fn alloc(&mut self, v: &Loaded) -> Result<u64, RepairError> {
        while self.cursor < v.layout.blocks - 1 {
            let b = self.cursor;
            self.cursor += 1;
            if self.busy.is_free(b) && !v.said_used(b) {
                self.busy.claim(b, 1);
                self.last.claim(b, 1);
                return Ok(b);
            }
        }
        Err(RepairError::NoSpace)
    }
}

/// Settles who owns each block, then builds the new trees in memory.
pub(super) fn plan(v: &mut Loaded, log: &mut Log) -> Result<Plan, RepairError> {
    let layout = v.layout;
    let mut p = Plan {
        busy: std::mem::replace(&mut v.meta, Blocks::new(layout)),
        last: std::mem::replace(&mut v.claimed, Blocks::new(layout)),
        nodes: Vec::new(),
        copies: Vec::new(),
        cursor: layout.groups_start,
    };
    let ids: Vec<u32> = v.domains.keys().copied().collect();
    let mut again = Vec::new();
    for id in &ids {
        let Some(d) = v.domains.get(id) else { continue };
        for (k, value) in d.items.iter().filter(|(k, _)| k.kind == Kind::Extent as u8 && k.object != 0) {
            let Ok(e) = ExtentItem::decode(value) else { continue };
            if p.busy.claim(e.start, e.len.into()) {
                p.last.claim(e.start, e.len.into());
            } else {
                again.push((*id, *k, e));
            }
        }
    }
    for (id, k, e) in again {
        log.lose(inode_text(ino(id, k.object)), format!("blocks from {} are another's too, now copied", e.start));
        copy(v, &mut p, id, k, e)?;
    }
    for id in &ids {
        let Some(d) = v.domains.get_mut(id) else { continue };
        let deferred: Vec<(Key, u64)> = d
            .items
            .range(Key::new(0, Kind::DeferredFree, 0)..=Key::new(0, Kind::DeferredFree, u64::MAX))
            .filter_map(|(k, x)| Some((*k, u64::from_le_bytes(x.as_slice().try_into().ok()?))))
            .collect();
        for (k, len) in deferred {
            if p.busy.claim(k.offset, len) {
                p.last.claim(k.offset, len);
            } else {
                log.mend(format!("domain {id}"), format!("blocks from {} are in use and not to be freed", k.offset));
                d.remove(&k);
            }
        }
    }
    for id in &ids {
        let Some(d) = v.domains.get_mut(id) else { continue };
        let h = &d.header;
        let len = u64::from(h.reserve_len);
        if len > 0 {
            if p.busy.claim(h.reserve_next, len) {
                p.last.claim(h.reserve_next, len);
            } else {
                log.mend(format!("domain {id}"), "its reserve of blocks belongs to others".into());
                (d.header.reserve_next, d.header.reserve_len) = (0, 0);
                d.changed = true;
            }
        }
        let inodes = d.items.keys().filter(|k| k.object != 0 && k.kind == Kind::Inode as u8).count() as u64;
        let records = |kind: Kind| d.items.keys().filter(|k| k.object == 0 && k.kind == kind as u8).count() as u64;
        let (orphans, locks) = (records(Kind::Orphan), records(Kind::FileLock));
        let after = d.items.keys().next_back().map_or(0, |k| k.object + 1);
        let beyond = d.lock.as_ref().map_or(0, |l| l.value.next_local);
        let next_local = d.header.next_local.max(after).max(if d.header_image.is_none() { beyond.max(2) } else { 0 });
        let h = &mut d.header;
        if (inodes, orphans, next_local, locks) != (h.inodes, h.orphans, h.next_local, h.file_locks) {
            log.mend(format!("domain {id}"), "counts in its header corrected".into());
            (h.inodes, h.orphans, h.next_local, h.file_locks) = (inodes, orphans, next_local, locks);
            d.changed = true;
        }
    }
    for id in &ids {
        let Some(mut d) = v.domains.remove(id) else { continue };
        let built = domain(v, &mut p, *id, &mut d, log);
        v.domains.insert(*id, d);
        built?;
    }
    Ok(p)
}

/// Gives an extent blocks of its own, in as many pieces as it takes.
fn copy(v: &mut Loaded, p: &mut Plan, id: u32, k: Key, e: ExtentItem) -> Result<(), RepairError> {
    let mut pieces: Vec<(u64, ExtentItem)> = Vec::new();
    for n in 0..u64::from(e.len) {
        let to = p.alloc(v)?;
        match pieces.last_mut() {
            Some((_, x)) if x.start + u64::from(x.len) == to => x.len += 1,
            _ => pieces.push((k.offset + n, ExtentItem { start: to, len: 1, unwritten: e.unwritten })),
        }
    }
    let Some(d) = v.domains.get_mut(&id) else { return Ok(()) };
    d.remove(&k);
    for (at, x) in pieces {
        if !e.unwritten {
            p.copies.push((e.start + (at - k.offset), x.start, x.len.into()));
        }
        d.put(Key { offset: at, ..k }, x.encode().to_vec());
    }
    Ok(())
}

fn tenure(lock: Option<&LockBlock>, seen: u64) -> u64 {
    lock.map_or(seen + BEYOND, |l| l.tenure.max(seen))
}

fn block(layout: &VolumeLayout, kind: BlockKind, owner: LockId, number: u64) -> Block {
    let mut b = Block::zeroed(BLOCK_SIZE);
    BlockHeader { kind, owner, volume: layout.volume, block: number, version: 0, tenure: 0, record: 0 }.encode(&mut b);
    b
}

fn domain(v: &Loaded, p: &mut Plan, id: u32, d: &mut Domain, log: &mut Log) -> Result<(), RepairError> {
    if d.header_image.is_some() {
        p.last.claim(d.header_block, 1);
    } else {
        d.header_block = p.alloc(v)?;
    }
    if !d.changed {
        for n in &d.nodes {
            p.last.claim(*n, 1);
        }
        return Ok(());
    }
    log.mend(format!("domain {id}"), "its tree written anew".into());
    let tenure = tenure(d.lock.as_ref(), d.tenure);
    d.header.version = match d.header_image {
        Some(_) => d.header.version,
        None => DomainHeader::first_version(tenure),
    };
    // Not below what the lock block says, also while that is not written yet.
    let known = d.lock.as_ref().map_or(0, |l| l.value.version);
    d.header.version = d.header.version.max(known).wrapping_add(VERSIONS_BEYOND);
    let mut level = 1;
    let mut bodies: Vec<(RawKey, Vec<u8>)> =
        d.items.iter().map(|(k, x)| (k.encode(), leaf_body(&k.encode(), x))).collect();
    (d.header.root, d.header.levels, d.header.nodes) = (0, 0, 0);
    while !bodies.is_empty() {
        let mut above = Vec::new();
        for chunk in chunks(&bodies) {
            let number = p.alloc(v)?;
            let mut b = block(&v.layout, BlockKind::TreeNode, LockId::Domain(id), number);
            let all: Vec<&[u8]> = chunk.iter().map(|x| x.1.as_slice()).collect();
            rebuild(&mut b, level, &all).map_err(RepairError::Build)?;
            set_version(&mut b, d.header.root_version());
            seal(&mut b, tenure, 0);
            p.nodes.push((number, b));
            d.header.nodes += 1;
            let first = chunk.first().map_or(Key::MIN.encode(), |c| c.0);
            let lower = if above.is_empty() { Key::MIN.encode() } else { first };
            above.push((lower, inner_body(&lower, number, d.header.root_version())));
            d.header.root = number;
        }
        d.header.levels = level;
        if above.len() < 2 {
            break;
        }
        bodies = above;
        level += 1;
    }
    Ok(())
}

/// Cuts items into nodes; the last two share theirs if the last would have only one.
fn chunks(bodies: &[(RawKey, Vec<u8>)]) -> Vec<&[(RawKey, Vec<u8>)]> {
    let mut cuts = vec![0];
    let mut room = CAPACITY;
    for (i, (_, b)) in bodies.iter().enumerate() {
        if cost(b) > room {
            cuts.push(i);
            room = CAPACITY;
        }
        room -= cost(b);
    }
    if cuts.len() > 1
        && let Some(last) = cuts.last_mut()
        && *last + 1 == bodies.len()
        && bodies.get(*last - 1..).is_some_and(|two| two.iter().map(|x| cost(&x.1)).sum::<usize>() <= CAPACITY)
    {
        *last -= 1;
    }
    cuts.push(bodies.len());
    cuts.windows(2).filter_map(|w| bodies.get(w[0]..w[1])).collect()
}

/// Everything to its place. `latest` is each slot's latest incarnation.
pub(super) async fn write(
    dev: &Arc<dyn BlockDevice>,
    v: &Loaded,
    p: &Plan,
    latest: &BTreeMap<u16, u32>,
    log: &mut Log,
) -> Result<(), RepairError> {
    let changed = !p.nodes.is_empty() || !p.copies.is_empty() || v.domains.values().any(|d| d.changed);
    let mut united = BTreeSet::new();
    if changed {
        united = bitmaps(dev, v, p, Bits::Both, log).await?;
        dev.flush(IoClass::Meta).await?;
        for (from, to, len) in &p.copies {
            copy_blocks(dev, *from, *to, *len).await?;
        }
        for (number, b) in &p.nodes {
            dev.write(IoClass::Meta, number * BLOCK, Arc::new(b.clone()), false).await?;
        }
        dev.flush(IoClass::Meta).await?;
    }
    for (id, d) in v.domains.iter().filter(|(_, d)| d.changed) {
        let owner = LockId::Domain(*id);
        let mut b = block(&v.layout, BlockKind::DomainHeader, owner, d.header_block);
        d.header.encode(&mut b);
        seal(&mut b, tenure(d.lock.as_ref(), d.tenure), 0);
        dev.write(IoClass::Meta, d.header_block * BLOCK, Arc::new(b), false).await?;
    }
    if changed {
        dev.flush(IoClass::Meta).await?;
    }
    for (id, d) in &v.domains {
        let next_local = d.lock.as_ref().map_or(0, |l| l.value.next_local);
        let value = LockValue { root: d.header_block, next_local, version: d.header.version };
        lock(
            dev,
            &v.layout,
            LockId::Domain(*id),
            d.lock.as_ref(),
            &d.lock_sector,
            value,
            d.tenure,
            d.changed,
            latest,
            log,
        )
        .await?;
    }
    for (g, x) in (0..v.layout.groups).zip(&v.groups) {
        let seen = x.bitmaps.iter().chain([&x.header]).flatten();
        let seen = seen.filter_map(|b| BlockHeader::decode(b).ok()).map(|h| h.tenure).max().unwrap_or(0);
        // Without its lock block nothing is known of how much is free: then whoever looks for space looks here.
        let value = x.lock.as_ref().map(|l| l.value).unwrap_or_default();
        lock(dev, &v.layout, LockId::Group(g), x.lock.as_ref(), &x.lock_sector, value, seen, false, latest, log)
            .await?;
    }
    let (old, sector) = &v.nobodys_lock;
    let (id, value) = (LockId::Domain(NO_DOMAIN), LockValue::default());
    lock(dev, &v.layout, id, old.as_ref(), sector, value, 0, false, latest, log).await?;
    dev.flush(IoClass::Lock).await?;
    bitmaps(dev, v, p, Bits::Last(&united), log).await?;
    Ok(dev.flush(IoClass::Meta).await?)
}

async fn copy_blocks(dev: &Arc<dyn BlockDevice>, from: u64, to: u64, len: u64) -> Result<(), RepairError> {
    let mut at = 0;
    while at < len {
        let n = COPY.min(len - at);
        let b: AlignedBuf = dev.read(IoClass::Data, (from + at) * BLOCK, (n * BLOCK) as usize).await?;
        dev.write(IoClass::Data, (to + at) * BLOCK, Arc::new(b), false).await?;
        at += n;
    }
    Ok(())
}

/// Rewrites a lock block that is damaged, names holders that cannot be, or leads elsewhere now. Nobody holds it: every
/// incarnation has ended.
#[allow(clippy::too_many_arguments)]
async fn lock(
    dev: &Arc<dyn BlockDevice>,
    layout: &VolumeLayout,
    id: LockId,
    old: Option<&LockBlock>,
    sector: &[u8],
    value: LockValue,
    seen: u64,
    changed: bool,
    latest: &BTreeMap<u16, u32>,
    log: &mut Log,
) -> Result<(), RepairError> {
    let areas = layout.cluster();
    let Some(at) = areas.lock_block(id) else { return Ok(()) };
    let bad = old.is_none_or(|l| bad_holder(l, layout.nodes, latest));
    if !bad && !changed {
        return Ok(());
    }
    let new = match old {
        Some(l) => {
            LockBlock { seq: l.seq + 1, value, crashes: l.crashes.max(1), entries: BTreeMap::new(), ..l.clone() }
        }
        None => {
            let t = tenure(None, seen);
            let fresh = LockBlock::unheld(areas.volume, id, value);
            LockBlock { seq: t + BEYOND, tenure: t, previous_tenure: seen, crashes: 1, ..fresh }
        }
    };
    if bad {
        log.mend(format!("lock block of {id}"), "written anew".into());
    }
    let image = new.encode(areas.stride);
    match dev.compare_and_write(at, sector, &image).await {
        Ok(Caw::Written) => Ok(()),
        Ok(Caw::Mismatch(found)) if found == image => Ok(()),
        Ok(Caw::Mismatch(_)) => Err(RepairError::LockBlock(id)),
        Err(e) => match dev.read(IoClass::Lock, at, image.len()).await {
            Ok(found) if found[..] == image[..] => Ok(()),
            _ => Err(e.into()),
        },
    }
}

/// What bitmaps are to say.
#[derive(Clone, Copy)]
enum Bits<'a> {
    /// Everything that is or was in use.
    Both,
    /// What is in use at the end; these groups have been written before.
    Last(&'a BTreeSet<u32>),
}

/// Writes the groups' headers and bitmaps where they differ from what is there; gives those that it wrote.
async fn bitmaps(
    dev: &Arc<dyn BlockDevice>,
    v: &Loaded,
    p: &Plan,
    bits: Bits<'_>,
    log: &mut Log,
) -> Result<BTreeSet<u32>, RepairError> {
    let mut wrote = BTreeSet::new();
    for (g, old) in (0..v.layout.groups).zip(&v.groups) {
        let seen = old.bitmaps.iter().chain([&old.header]).flatten();
        let seen = seen.filter_map(|b| BlockHeader::decode(b).ok()).map(|h| (h.tenure, h.record)).max();
        let (union, again) = match bits {
            Bits::Both => (true, false),
            Bits::Last(before) => (false, before.contains(&g)),
        };
        let further: u32 = if again { 2 } else { 1 };
        let record = seen.map_or(0, |s| s.1) + u64::from(further);
        let tenure = tenure(old.lock.as_ref(), seen.map_or(0, |s| s.0));
        let (maps, mut head) = group(v, p, g, old, union);
        set_version(&mut head, old.header_version.wrapping_add(further));
        let blocks = v.layout.group_extent(g).len;
        let domains = v.layout.group_domains(g).len().min(MAX_DOMAINS_PER_GROUP as usize);
        let found = old.header.as_ref().is_some_and(|h| {
            let apart_from_versions =
                |b: &[u8]| Some(GroupHeader { bitmap_versions: 0, ..GroupHeader::decode(b).ok()?.grown_to(blocks) });
            apart_from_versions(h) == apart_from_versions(&head)
                && same_bits(&h[DOMAIN_BITMAP], &head[DOMAIN_BITMAP], domains)
        }) && maps.iter().all(|(i, _, b)| {
            let bits = (blocks - *i as u64 * BITS_PER_BITMAP).min(BITS_PER_BITMAP) as usize;
            old.bitmaps.get(*i).and_then(|x| x.as_ref()).is_some_and(|x| same_bits(&x[64..], &b[64..], bits))
        });
        if !found && !union {
            log.mend(format!("group {g}"), "bitmap and counts written anew".into());
        }
        if found && !again {
            continue;
        }
        wrote.insert(g);
        let version = old.version.wrapping_add(further);
        if let Ok(h) = GroupHeader::decode(&head) {
            let bitmap_versions = version.wrapping_mul(maps.len() as u32);
            GroupHeader { bitmap_versions, ..h }.encode(&mut head);
        }
        let maps = maps.into_iter().map(|(_, n, mut b)| {
            set_version(&mut b, version);
            (n, b)
        });
        for (n, mut b) in maps.chain([(v.layout.group_header(g), head)]) {
            seal(&mut b, tenure, record);
            dev.write(IoClass::Meta, n * BLOCK, Arc::new(b), false).await?;
        }
    }
    Ok(wrote)
}

fn same_bits(a: &[u8], b: &[u8], n: usize) -> bool {
    a.get(..n / 8) == b.get(..n / 8) && (n / 8 * 8..n).all(|i| bit(a, i) == bit(b, i))
}

/// A group's bitmaps (those that count as written: index, block number, image) and its header.
fn group(v: &Loaded, p: &Plan, g: u32, old: &Group, union: bool) -> (Vec<(usize, u64, Block)>, Block) {
    let layout = &v.layout;
    let extent = layout.group_extent(g);
    let owner = LockId::Group(g);
    let before = old.header.as_ref().and_then(|h| GroupHeader::decode(h).ok());
    let (mut used, mut written) = (0, 0);
    let mut maps = Vec::new();
    for (i, image) in old.bitmaps.iter().enumerate() {
        let number = layout.group_bitmap(g, i as u16);
        let mut b = block(layout, BlockKind::GroupBitmap, owner, number);
        let base = i as u64 * BITS_PER_BITMAP;
        let known = before.is_some() && image.is_some();
        let mut any = false;
        for i in base..(base + BITS_PER_BITMAP).min(extent.len) {
            let n = extent.start + i;
            if if union { p.busy.get(n) || (known && v.said_used(n)) } else { p.last.get(n) } {
                set_bit(&mut b[64..], (i - base) as usize, true);
                used += 1;
                any = true;
            }
        }
        if any || before.is_some_and(|h| h.written_bitmaps & (1 << (i % 64)) != 0) {
            written |= 1 << (i % 64);
            maps.push((i, number, b));
        }
    }
    let mut head = block(layout, BlockKind::GroupHeader, owner, layout.group_header(g));
    let mut free_domains = 0;
    // Numbers that the group does not have count as in use.
    head[DOMAIN_BITMAP].fill(0xff);
    for (i, d) in layout.group_domains(g).enumerate().take(MAX_DOMAINS_PER_GROUP as usize) {
        let on = d < FIRST_SLOT_DOMAIN + u32::from(layout.nodes) || v.domains.contains_key(&d) || v.is_other(d);
        set_bit(&mut head[DOMAIN_BITMAP], i, on);
        free_domains += u32::from(!on);
    }
    let blocks = extent.len as u32;
    GroupHeader { free_blocks: extent.len - used, free_domains, written_bitmaps: written, bitmap_versions: 0, blocks }
        .encode(&mut head);
    (maps, head)
}
