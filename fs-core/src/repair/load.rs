//! Reads what can be read of the trees of damaged domains into memory, whatever is damaged beside them, and of all others only
//! what they refer to.
//!
//! Where a part of a tree cannot be reached, the range of keys that is missing is known from the node above it;
//! [`super::scan`] looks for what was there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster::{LockBlock, LockId};
use journal::Block;
use journal::block::{BlockHeader, BlockKind, check_version, version};

use super::{RepairError, scan};
use crate::check::blocks::Blocks;
use crate::check::links::Links;
use crate::check::reader::{Read, Reader};
use crate::check::{Notify, Progress, survey};
use crate::format::domain::DomainHeader;
use crate::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, MAX_DOMAINS_PER_GROUP, bit, check_age};
use crate::format::item::Key;
use crate::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, NO_DOMAIN, ROOT_DOMAIN, VolumeLayout};
use crate::tree::MAX_LEVELS;
use crate::tree::node::{Node, RawKey, cooked};

/// Nodes, headers and lock blocks read at once.
const NODES: usize = 4096;

/// A range of keys that is missing from what was reached: [lower, upper).
pub(super) type Gap = (RawKey, Option<RawKey>);

#[derive(Default)]
pub(super) struct Domain {
    pub items: BTreeMap<Key, Vec<u8>>,
    pub header_block: u64,
    pub header: DomainHeader,
    /// Header as it is in its block, to be changed in place; `None`: it cannot be read, or lies where another's does.
    pub header_image: Option<Arc<Block>>,
    pub lock: Option<LockBlock>,
    /// The lock's sector as found.
    pub lock_sector: Vec<u8>,
    pub nodes: Vec<u64>,
    /// Newest tenure seen in its blocks.
    pub tenure: u64,
    /// Something has to be written.
    pub changed: bool,
    pub gaps: Vec<Gap>,
}

impl Domain {
    pub fn put(&mut self, key: Key, value: Vec<u8>) {
        if self.items.get(&key) != Some(&value) {
            self.items.insert(key, value);
            self.changed = true;
        }
    }

    pub fn remove(&mut self, key: &Key) {
        self.changed |= self.items.remove(key).is_some();
    }

    /// Whether a key lies in a part of the tree that could not be reached.
    pub fn in_gap(&self, key: &Key) -> bool {
        let key = key.encode();
        self.gaps.iter().any(|(l, u)| key >= *l && u.as_ref().is_none_or(|u| key < *u))
    }
}

#[derive(Default)]
pub(super) struct Group {
    /// Header and bitmaps as they are, if readable and of one age.
    pub header: Option<Arc<Block>>,
    pub bitmaps: Vec<Option<Arc<Block>>>,
    /// At least that of the header, also where it is not here.
    pub header_version: u32,
    /// At least the version of each bitmap.
    pub version: u32,
    pub lock: Option<LockBlock>,
    pub lock_sector: Vec<u8>,
}

pub(super) struct Loaded {
    pub layout: VolumeLayout,
    /// The domains that are repaired.
    pub domains: BTreeMap<u32, Domain>,
    /// All others in use, with their header blocks, ascending.
    pub others: Vec<(u32, u64)>,
    /// What the others refer to.
    pub claimed: Blocks,
    pub links: Links,
    pub groups: Vec<Group>,
    /// The lock of domain 0, and its sector.
    pub nobodys_lock: (Option<LockBlock>, Vec<u8>),
    /// `claimed`, and the tree nodes and headers of the domains that are repaired.
    pub meta: Blocks,
    /// What was damaged beyond what the trees can show: each a loss that needs -y.
    pub damage: Vec<(String, String)>,
}

impl Loaded {
    /// Whether the readable bitmaps say that a block is in use; those that cannot be read say so of all.
    pub fn said_used(&self, block: u64) -> bool {
        let Some(g) = self.layout.group_within(block) else { return true };
        let Some(group) = self.groups.get(g as usize) else { return true };
        let Some(head) = group.header.as_ref().and_then(|h| GroupHeader::decode(h).ok()) else { return true };
        let i = block - self.layout.group_extent(g).start;
        let index = (i / BITS_PER_BITMAP) as usize;
        if head.written_bitmaps & (1 << (index % 64)) == 0 {
            return false;
        }
        match group.bitmaps.get(index) {
            Some(Some(b)) => bit(b.get(64..).unwrap_or(&[]), (i % BITS_PER_BITMAP) as usize),
            _ => true,
        }
    }

    pub fn is_other(&self, domain: u32) -> bool {
        self.others.binary_search_by_key(&domain, |o| o.0).is_ok()
    }
}

/// Whether a lock block names holders that cannot be. `latest` is each slot's latest incarnation.
pub(super) fn bad_holder(lock: &LockBlock, nodes: u16, latest: &BTreeMap<u16, u32>) -> bool {
    lock.entries.iter().any(|(s, e)| *s >= nodes || latest.get(s).is_some_and(|i| e.incarnation > *i))
}

/// Loads the domains in `damaged`; those that turn out to be damaged too are added to it.
pub(super) async fn load(
    r: &Reader,
    layout: VolumeLayout,
    damaged: &mut BTreeSet<u32>,
    latest: &BTreeMap<u16, u32>,
    tell: Notify<'_>,
) -> Result<Loaded, RepairError> {
    loop {
        let mut v = empty(layout);
        groups(r, &mut v).await?;
        let maybe = locks(r, &mut v, damaged, latest).await?;
        let seen = survey(r, layout, &v.others, false, tell).await;
        if !seen.damaged.is_subset(damaged) {
            damaged.extend(seen.damaged);
            continue;
        }
        (v.claimed, v.links) = (seen.claims, seen.links);
        v.meta = v.claimed.clone();
        headers(r, &mut v).await;
        if !maybe.is_empty() || v.domains.values().any(scan::no_header) {
            scan::headers(r, &mut v, &maybe, tell).await;
        }
        for (id, d) in v.domains.iter_mut().filter(|(_, d)| d.header_image.is_none()) {
            (d.header_block, d.changed) = (0, true);
            d.gaps.push((Key::MIN.encode(), None));
            v.damage.push((format!("domain {id}"), "its header is damaged".into()));
        }
        trees(r, &mut v, tell).await;
        if v.domains.values().any(|d| !d.gaps.is_empty()) {
            scan::leaves(r, &mut v, tell).await;
        }
        return Ok(v);
    }
}

/// The domains in which a check of the volume as it is now finds something.
pub(super) async fn all_damaged(
    r: &Reader,
    layout: VolumeLayout,
    latest: &BTreeMap<u16, u32>,
    tell: Notify<'_>,
) -> Result<BTreeSet<u32>, RepairError> {
    let mut v = empty(layout);
    groups(r, &mut v).await?;
    let mut damaged = BTreeSet::new();
    locks(r, &mut v, &mut damaged, latest).await?;
    let whole = damaged.is_empty();
    damaged.extend(survey(r, layout, &v.others, whole, tell).await.damaged);
    Ok(damaged)
}

fn empty(layout: VolumeLayout) -> Loaded {
    Loaded {
        layout,
        domains: BTreeMap::new(),
        others: Vec::new(),
        claimed: Blocks::new(layout),
        links: Links::default(),
        groups: Vec::new(),
        nobodys_lock: (None, Vec::new()),
        meta: Blocks::new(layout),
        damage: Vec::new(),
    }
}

async fn groups(r: &Reader, v: &mut Loaded) -> Result<(), RepairError> {
    let layout = v.layout;
    let ids: Vec<LockId> = (0..layout.groups).map(LockId::Group).collect();
    let nobody = LockId::Domain(NO_DOMAIN);
    let sector = sectors(r, &layout, &[nobody]).await?.pop().unwrap_or_default();
    v.nobodys_lock = (LockBlock::decode(&sector, layout.volume, nobody).ok(), sector);
    let mut lock_sectors = Vec::new();
    for chunk in ids.chunks(NODES) {
        lock_sectors.extend(sectors(r, &layout, chunk).await?);
    }
    for (g, lock_sector) in (0..layout.groups).zip(lock_sectors) {
        let lock = LockBlock::decode(&lock_sector, layout.volume, LockId::Group(g)).ok();
        let n = layout.group_extent(g).len.div_ceil(BITS_PER_BITMAP).min(layout.bitmap_blocks.into()) as u16;
        let at = layout.group_header(g);
        let maps: Vec<u64> = (0..n).map(|i| layout.group_bitmap(g, i)).collect();
        let mut wanted = maps.clone();
        wanted.push(at);
        let read = r.many(&wanted).await;
        let good = |number: u64, kind| {
            let b = read.get(&number)?.as_ref().ok()?;
            r.verify(number, b, LockId::Group(g), kind).ok()?;
            Some(b.clone())
        };
        let counts =
            |b: &Arc<Block>| GroupHeader::decode(b).is_ok_and(|h| u64::from(h.blocks) <= layout.group_extent(g).len);
        let mut header = good(at, BlockKind::GroupHeader).filter(counts);
        let mut bitmaps: Vec<_> = maps.iter().map(|m| good(*m, BlockKind::GroupBitmap)).collect();
        let mut newest = bitmaps.iter().flatten().map(|b| version(b)).max().unwrap_or(0);
        let mut header_version = header.as_ref().map_or(0, |h| version(h));
        let least = lock.as_ref().map_or(0, |l| l.value.version);
        let stale = check_age(header_version, least).is_err();
        if let Some(h) = header.as_ref().and_then(|h| GroupHeader::decode(h).ok()) {
            newest = newest.max(h.bitmap_versions);
            let written = (0..).zip(&bitmaps).filter(|(i, _)| h.written_bitmaps & (1u64 << (i % 64)) != 0);
            let written: Option<Vec<u32>> = written.map(|(_, b)| b.as_deref().map(|b| version(b))).collect();
            // One of them, or the header, is of an older state: none can be trusted to know what is in use.
            if stale || written.is_some_and(|v| h.check_versions(v.into_iter()).is_err()) {
                header = None;
                bitmaps.fill(None);
            }
        }
        if stale {
            header_version = least as u32;
        }
        v.groups.push(Group { header, header_version, bitmaps, version: newest, lock, lock_sector });
    }
    Ok(())
}

/// The domains that are in use, and those that may be because their group cannot say.
fn in_use(v: &Loaded) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let layout = v.layout;
    let mut used = BTreeSet::from([ROOT_DOMAIN]);
    used.extend(FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(layout.nodes));
    let mut unsure = BTreeSet::new();
    for (g, group) in (0..layout.groups).zip(&v.groups) {
        for (i, d) in layout.group_domains(g).enumerate().take(MAX_DOMAINS_PER_GROUP as usize) {
            match &group.header {
                Some(h) if bit(&h[DOMAIN_BITMAP], i) => used.insert(d),
                None if !used.contains(&d) => unsure.insert(d),
                _ => false,
            };
        }
    }
    used.remove(&0);
    unsure.remove(&0);
    (used, unsure)
}

/// A lock's sector, out of the blocks read.
pub(super) async fn sectors(r: &Reader, layout: &VolumeLayout, ids: &[LockId]) -> Result<Vec<Vec<u8>>, RepairError> {
    let areas = layout.cluster();
    let stride = areas.stride as usize;
    let at = |id: &LockId| areas.lock_block(*id).unwrap_or_default();
    let blocks = r.many(&ids.iter().map(|id| at(id) / BLOCK).collect::<Vec<_>>()).await;
    ids.iter()
        .map(|id| {
            let from = (at(id) % BLOCK) as usize;
            match blocks.get(&(at(id) / BLOCK)) {
                Some(Ok(b)) => Ok(b.get(from..from + stride).unwrap_or(&[]).to_vec()),
                _ => Err(RepairError::LockBlock(*id)),
            }
        })
        .collect()
}

/// Reads the lock blocks of domains, and sorts the domains into those to be repaired and the others. Gives those
/// of which neither group nor lock block can say whether they are in use.
async fn locks(
    r: &Reader,
    v: &mut Loaded,
    damaged: &mut BTreeSet<u32>,
    latest: &BTreeMap<u16, u32>,
) -> Result<BTreeSet<u32>, RepairError> {
    let layout = v.layout;
    let (used, unsure) = in_use(v);
    let mut maybe = BTreeSet::new();
    let mut unproved = Vec::new();
    let all: Vec<u32> = used.union(&unsure).copied().collect();
    for chunk in all.chunks(NODES) {
        let ids: Vec<LockId> = chunk.iter().map(|d| LockId::Domain(*d)).collect();
        for (d, sector) in chunk.iter().copied().zip(sectors(r, &layout, &ids).await?) {
            let lock = LockBlock::decode(&sector, layout.volume, LockId::Domain(d)).ok();
            let root = lock.as_ref().map_or(0, |l| l.value.root);
            let sure = used.contains(&d);
            let slots = FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(layout.nodes);
            let unused = slots.contains(&d) && root == 0 && (lock.is_some() || sector.iter().all(|b| *b == 0));
            let bad = lock.as_ref().is_some_and(|l| bad_holder(l, layout.nodes, latest));
            if unused || (!sure && lock.is_some() && root == 0) {
                // A slot's domain that was never used, or a number that is free.
            } else if !sure && lock.is_none() {
                maybe.insert(d);
            } else if root != 0 && !bad && !damaged.contains(&d) {
                v.others.push((d, root));
                if !sure {
                    unproved.push((d, root));
                }
            } else {
                damaged.insert(d);
                v.domains.insert(d, Domain { header_block: root, lock, lock_sector: sector, ..Domain::default() });
            }
        }
    }
    // A number that a damaged group may have had in use, but whose lock block leads nowhere, is free.
    let mut nowhere = BTreeSet::new();
    for chunk in unproved.chunks(NODES) {
        let read = r.many(&chunk.iter().map(|c| c.1).collect::<Vec<_>>()).await;
        let good = |d: u32, n: u64| match read.get(&n) {
            Some(Ok(b)) => r.verify(n, b, LockId::Domain(d), BlockKind::DomainHeader).is_ok(),
            _ => false,
        };
        nowhere.extend(chunk.iter().filter(|(d, n)| !good(*d, *n)).map(|c| c.0));
    }
    v.others.retain(|o| !nowhere.contains(&o.0));
    v.others.sort_unstable();
    Ok(maybe)
}

/// The headers of the domains to be repaired, where their lock blocks say that they are.
async fn headers(r: &Reader, v: &mut Loaded) {
    let places: Vec<u64> = v.domains.values().map(|d| d.header_block).filter(|b| *b != 0).collect();
    let mut blocks = BTreeMap::new();
    for chunk in places.chunks(NODES) {
        blocks.extend(r.many(chunk).await);
    }
    for (id, d) in &mut v.domains {
        if let Some(Ok(b)) = blocks.get(&d.header_block) {
            take_header(r, *id, d, d.header_block, b, &mut v.meta);
        }
        let least = d.lock.as_ref().map_or(0, |l| l.value.version);
        if d.header_image.is_some() && d.header.check_age(least).is_err() {
            d.changed = true;
            v.damage.push((format!("domain {id}"), "its header is older than its lock block knows".into()));
        }
    }
}

/// Takes a block as a domain's header if it is one.
pub(super) fn take_header(r: &Reader, id: u32, d: &mut Domain, number: u64, b: &Arc<Block>, meta: &mut Blocks) {
    if r.verify(number, b, LockId::Domain(id), BlockKind::DomainHeader).is_err() {
        return;
    }
    if let (Ok(h), Ok(head)) = (DomainHeader::decode(b), BlockHeader::decode(b))
        && meta.claim(number, 1)
    {
        (d.header_block, d.header_image, d.header) = (number, Some(b.clone()), h);
        d.tenure = d.tenure.max(head.tenure);
    }
}

struct Todo {
    domain: u32,
    /// What leads to it: an inner node's block, or the header's.
    parent: u64,
    /// The keys that all of the parent's children may hold.
    around: Gap,
    block: u64,
    version: u32,
    level: u32,
    lower: RawKey,
    upper: Option<RawKey>,
}

async fn trees(r: &Reader, v: &mut Loaded, tell: Notify<'_>) {
    let mut todo = Vec::new();
    for (id, d) in &mut v.domains {
        let h = &d.header;
        match (h.root, h.levels) {
            _ if d.header_image.is_none() => {}
            (0, 0) => {}
            (root, levels) if root != 0 && (1..=MAX_LEVELS).contains(&levels) => todo.push(Todo {
                domain: *id,
                parent: d.header_block,
                around: (Key::MIN.encode(), None),
                block: root,
                version: h.root_version(),
                level: levels,
                lower: Key::MIN.encode(),
                upper: None,
            }),
            _ => d.gaps.push((Key::MIN.encode(), None)),
        }
    }
    let mut done = 0;
    while !todo.is_empty() {
        let mut below = Vec::new();
        let mut rest = todo.as_slice();
        while !rest.is_empty() {
            let (batch, more) = rest.split_at(families(rest));
            rest = more;
            tell(Progress { phase: "damaged trees", done, total: done + todo.len() as u64 });
            done += batch.len() as u64;
            let blocks = r.many(&batch.iter().map(|t| t.block).collect::<Vec<_>>()).await;
            let mut stale = BTreeSet::new();
            for t in batch.iter().filter(|t| blocks.get(&t.block).is_some_and(|b| newer(r, t, b))) {
                let Some(d) = v.domains.get_mut(&t.domain).filter(|_| stale.insert(t.parent)) else { continue };
                d.gaps.push(t.around);
            }
            for t in batch.iter().filter(|t| !stale.contains(&t.parent)) {
                let Some(d) = v.domains.get_mut(&t.domain) else { continue };
                let block = blocks.get(&t.block).and_then(|b| b.as_ref().ok()).filter(|_| v.meta.is_free(t.block));
                if block.is_some_and(|b| node(r, t, b, d, &mut below).is_some()) {
                    v.meta.claim(t.block, 1);
                    d.nodes.push(t.block);
                    continue;
                }
                if block.is_some_and(|b| disordered(r, t, b, d)) {
                    d.changed = true;
                    let text = format!("block {}: its items are not in order", t.block);
                    v.damage.push((format!("domain {}", t.domain), text));
                } else {
                    d.gaps.push((t.lower, t.upper));
                }
            }
        }
        todo = below;
    }
    for (id, d) in &mut v.domains {
        if !d.gaps.is_empty() && d.header_image.is_some() {
            d.changed = true;
            v.damage.push((format!("domain {id}"), format!("{} parts of its tree are damaged", d.gaps.len())));
        }
        d.changed |= d.nodes.len() as u64 != d.header.nodes;
    }
}

/// How many of `todo` to take at once: all children of a node together.
fn families(todo: &[Todo]) -> usize {
    let mut n = 0;
    for family in todo.chunk_by(|a, b| a.parent == b.parent) {
        if n > 0 && n + family.len() > NODES {
            break;
        }
        n += family.len();
    }
    n
}

/// Whether what leads to a node is older than the node. Then it may be wrong about everything below it, as nodes were divided and joined
/// since: the leaves are looked for instead.
fn newer(r: &Reader, t: &Todo, b: &Read) -> bool {
    b.as_ref().is_ok_and(|b| {
        r.verify(t.block, b, LockId::Domain(t.domain), BlockKind::TreeNode).is_ok()
            && (version(b).wrapping_sub(t.version) as i32) > 0
    })
}

/// Takes in a node that verifies in all; `None` if it does not. An older state of it is none: what it holds may be elsewhere by now, newer.
fn node(r: &Reader, t: &Todo, b: &Block, d: &mut Domain, below: &mut Vec<Todo>) -> Option<()> {
    r.verify(t.block, b, LockId::Domain(t.domain), BlockKind::TreeNode).ok()?;
    check_version(b, t.version).ok()?;
    let n = Node::open(b, t.level).ok()?;
    n.check().ok()?;
    n.within(&t.lower, t.upper.as_ref()).ok()?;
    d.tenure = d.tenure.max(BlockHeader::decode(b).ok()?.tenure);
    for i in 0..n.count() {
        let key = n.key(i).ok()?;
        if t.level == 1 {
            d.items.insert(cooked(&key), n.value(i).ok()?.to_vec());
        } else {
            let upper = if i + 1 < n.count() { Some(n.key(i + 1).ok()?) } else { t.upper };
            below.push(Todo {
                domain: t.domain,
                parent: t.block,
                around: (t.lower, t.upper),
                block: n.child(i).ok()?,
                version: n.child_version(i).ok()?,
                level: t.level - 1,
                lower: key,
                upper,
            });
        }
    }
    Some(())
}

/// Of a leaf that has its checksum but is not in order, takes in the items that belong into its place.
fn disordered(r: &Reader, t: &Todo, b: &Block, d: &mut Domain) -> bool {
    let whole = r.verify(t.block, b, LockId::Domain(t.domain), BlockKind::TreeNode).is_ok()
        && check_version(b, t.version).is_ok();
    let Some(n) = Node::open(b, 1).ok().filter(|_| whole && t.level == 1) else { return false };
    for i in 0..n.count() {
        if let (Ok(key), Ok(value)) = (n.key(i), n.value(i))
            && key >= t.lower
            && t.upper.as_ref().is_none_or(|u| key < *u)
        {
            d.items.entry(cooked(&key)).or_insert_with(|| value.to_vec());
        }
    }
    true
}
