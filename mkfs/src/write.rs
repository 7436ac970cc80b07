//! Writing a new volume, area by area.
//!
//! | step | what is on the device after a crash in it |
//! |------|-------------------------------------------|
//! | old superblock, then its copies and every signature found are zeroed, each flushed | no volume, or the old one whole |
//! | cluster records, lock blocks, journal headers, groups' headers, root and slot domains; flush | no volume |
//! | copies of the superblock in the last block and in block 7, flush | no volume (a copy alone is for fsck to find) |
//! | superblock, flush | no volume, or the new one whole |
//!
//! Lock blocks of ordinary domains and bitmap blocks of empty groups are left as they are: the first is set up when
//! its domain number is handed out, the second is not believed before the group's header says that it was written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, IoClass};
use cluster::{LockId, LockValue};
use fs_core::FsError;
use fs_core::format::domain::DomainHeader;
use fs_core::format::group::{DOMAIN_BITMAP, GroupHeader, fresh_header, set_bit};
use fs_core::format::item::{DIR_LOCAL, Inode, Key, Kind, ino, mode_bits};
use fs_core::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, ROOT_DOMAIN, VolumeLayout};
use fs_core::format::superblock::Superblock;
use fs_core::tree::{self, NodeRead, NodeWrite, Root};
use journal::Block;
use journal::block::{BLOCK_SIZE, BlockHeader, BlockKind, seal};
use tokio::task::JoinSet;

use crate::{FormatOptions, Made, MkfsError, Progress};

/// Large areas are written in pieces of this size.
const PIECE: usize = 1 << 20;
/// Writes under way at once.
const DEPTH: usize = 16;
const HEADER_SIZE: usize = 64;

/// The device, with many writes under way.
struct Output<'a> {
    dev: &'a Arc<dyn BlockDevice>,
    running: JoinSet<blockdev::Result<()>>,
    what: &'static str,
    done: u64,
    total: u64,
    progress: &'a mut (dyn FnMut(Progress) + Send),
}

impl Output<'_> {
    fn error(&self, source: blockdev::DevError) -> MkfsError {
        MkfsError::Device { what: self.what, source }
    }

    fn begin(&mut self, what: &'static str, total: u64) {
        (self.what, self.done, self.total) = (what, 0, total);
    }

    fn step(&mut self) {
        self.done += 1;
        (self.progress)(Progress { what: self.what, done: self.done, total: self.total });
    }

    async fn join_one(&mut self) -> Result<(), MkfsError> {
        match self.running.join_next().await {
            Some(Ok(Err(e))) => Err(self.error(e)),
            Some(Err(e)) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            _ => Ok(()),
        }
    }

    async fn spawn(
        &mut self,
        work: impl Future<Output = blockdev::Result<()>> + Send + 'static,
    ) -> Result<(), MkfsError> {
        while self.running.len() >= DEPTH {
            self.join_one().await?;
        }
        self.running.spawn(work);
        Ok(())
    }

    async fn write(&mut self, offset: u64, bytes: AlignedBuf) -> Result<(), MkfsError> {
        let dev = self.dev.clone();
        self.spawn(async move { dev.write(IoClass::Meta, offset, Arc::new(bytes), false).await }).await
    }

    /// Everything written so far becomes durable.
    async fn flush(&mut self) -> Result<(), MkfsError> {
        while !self.running.is_empty() {
            self.join_one().await?;
        }
        self.dev.flush(IoClass::Meta).await.map_err(|e| self.error(e))
    }

    /// Consecutive records of one sector each, in large pieces.
    async fn records(
        &mut self,
        offset: u64,
        stride: u64,
        count: u64,
        mut record: impl FnMut(u64) -> Vec<u8>,
    ) -> Result<(), MkfsError> {
        let size = usize::try_from(stride).unwrap_or(BLOCK_SIZE);
        let per_piece = (PIECE / size) as u64;
        let mut first = 0;
        while first < count {
            let n = per_piece.min(count - first);
            let mut piece = AlignedBuf::zeroed(n as usize * size);
            for (slot, i) in piece.chunks_mut(size).zip(first..) {
                let r = record(i);
                let len = r.len().min(size);
                slot[..len].copy_from_slice(&r[..len]);
            }
            self.write(offset + first * stride, piece).await?;
            first += n;
        }
        Ok(())
    }

    /// Zeroes a range that may hold something, in large pieces; what is zero already is left alone, so that a sparse
    /// image stays sparse.
    async fn zero(&mut self, range: Range<u64>) -> Result<(), MkfsError> {
        let mut at = range.start;
        while at < range.end {
            let len = (PIECE as u64).min(range.end - at) as usize;
            let dev = self.dev.clone();
            self.spawn(async move {
                let old = dev.read(IoClass::Meta, at, len).await?;
                if old.iter().all(|b| *b == 0) {
                    return Ok(());
                }
                dev.write(IoClass::Meta, at, Arc::new(AlignedBuf::zeroed(len)), false).await
            })
            .await?;
            at += len as u64;
            self.step();
        }
        Ok(())
    }
}

/// Writes the whole volume; `wipe` are the offsets of signatures of what was there.
pub async fn volume(
    dev: &Arc<dyn BlockDevice>,
    sb: &Superblock,
    opts: &FormatOptions,
    wipe: &[u64],
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Made, MkfsError> {
    let l = sb.layout();
    let mut out = Output { dev, running: JoinSet::new(), what: "", done: 0, total: 0, progress };
    out.begin("destroying what was there", 1);
    destroy(&mut out, &l, wipe).await?;
    if opts.uuid.is_some() {
        stale_records(&mut out, &l).await?;
    }
    let domains = Domains::build(sb, opts).await?;
    out.begin("writing cluster records", 1);
    cluster_records(&mut out, &l).await?;
    lock_blocks(&mut out, &l, &domains).await?;
    out.begin("writing journals", l.nodes.into());
    for slot in 0..l.nodes {
        let region = l.journal(slot);
        out.write(region.offset, AlignedBuf::copy_of(&journal::initial_header(region))).await?;
        out.step();
    }
    let free_blocks = groups(&mut out, &l, &domains).await?;
    out.begin("writing the root directory", 1);
    for (number, block) in &domains.blocks {
        out.write(number * BLOCK, block.clone()).await?;
    }
    out.flush().await?;
    out.begin("writing the superblock", 1);
    let mut block = AlignedBuf::zeroed(BLOCK_SIZE);
    sb.encode(&mut block);
    let [near, last] = l.superblock_copies();
    for place in [last, near, 0] {
        out.write(place * BLOCK, block.clone()).await?;
        out.flush().await?;
    }
    let back = dev.read(IoClass::Meta, 0, BLOCK_SIZE).await.map_err(|e| out.error(e))?;
    match Superblock::decode(&back) {
        Ok(found) if found == *sb => {}
        Ok(_) => return Err(MkfsError::Verify("it is another one".into())),
        Err(e) => return Err(MkfsError::Verify(e.to_string())),
    }
    out.step();
    Ok(Made { superblock: sb.clone(), free_blocks })
}

/// No volume and no signature is left.
async fn destroy(out: &mut Output<'_>, l: &VolumeLayout, wipe: &[u64]) -> Result<(), MkfsError> {
    let g = out.dev.geometry();
    let sector = u64::from(g.sector_size);
    let [near, last] = l.superblock_copies();
    for place in [0, near, last] {
        out.write(place * BLOCK, AlignedBuf::zeroed(BLOCK_SIZE)).await?;
        out.flush().await?;
    }
    for offset in wipe {
        out.write(offset / sector * sector, AlignedBuf::zeroed(sector as usize)).await?;
    }
    out.flush().await
}

/// A UUID that was chosen may have been used here before: then lock blocks and journal records of that volume would
/// carry the right volume and be believed (I6, I8). A random UUID makes them foreign.
async fn stale_records(out: &mut Output<'_>, l: &VolumeLayout) -> Result<(), MkfsError> {
    let c = l.cluster();
    let first = l.locks_start * BLOCK..l.groups_start * BLOCK;
    let locks = u64::from(c.domain_locks.per_group) * c.stride;
    let of_groups = (0..u64::from(l.groups)).map(|g| c.domain_locks.first + g * c.domain_locks.distance);
    let areas = std::iter::once(first).chain(of_groups.map(|at| at..at + locks));
    let pieces = areas.clone().map(|a| (a.end - a.start).div_ceil(PIECE as u64)).sum();
    out.begin("clearing lock blocks and journals", pieces);
    for area in areas {
        out.zero(area).await?;
    }
    out.flush().await
}

/// Slot blocks, heartbeats and doorbells.
async fn cluster_records(out: &mut Output<'_>, l: &VolumeLayout) -> Result<(), MkfsError> {
    let c = l.cluster();
    let count = (l.locks_start - l.cluster_start) * BLOCK / c.stride;
    let nodes = u64::from(l.nodes);
    out.records(c.slots, c.stride, count, |i| match u16::try_from(i) {
        Ok(slot) if i < nodes => cluster::initial_slot_block(&c, slot),
        _ => Vec::new(),
    })
    .await
}

/// Lock blocks of the groups, of domain 0, which is nobody's, and of the domains that exist.
async fn lock_blocks(out: &mut Output<'_>, l: &VolumeLayout, domains: &Domains) -> Result<(), MkfsError> {
    let c = l.cluster();
    out.records(c.locks, c.stride, l.groups.into(), |g| match u32::try_from(g) {
        Ok(g) => cluster::initial_lock_block(&c, LockId::Group(g), group_value(l, domains, g)),
        Err(_) => Vec::new(),
    })
    .await?;
    let count = u64::from(FIRST_SLOT_DOMAIN) + u64::from(l.nodes);
    out.records(c.domain_locks.first, c.stride, count, |d| match u32::try_from(d) {
        Ok(d) => {
            let root = domains.headers.get(&d).copied().unwrap_or(0);
            cluster::initial_lock_block(&c, LockId::Domain(d), LockValue { root, next_local: 0, version: 0 })
        }
        Err(_) => Vec::new(),
    })
    .await
}

fn group_value(l: &VolumeLayout, domains: &Domains, group: u32) -> LockValue {
    LockValue { root: domains.free_blocks(l, group), next_local: l.group_extent(group).len, version: 0 }
}

/// Headers of all groups, and the first bitmap of group 0. Returns the free blocks of the volume.
async fn groups(out: &mut Output<'_>, l: &VolumeLayout, domains: &Domains) -> Result<u64, MkfsError> {
    out.begin("writing the groups", l.groups.into());
    let mut free = 0;
    let mut first = fresh_header(l, 0);
    mark_first(&mut first, l, domains);
    out.write(l.group_header(0) * BLOCK, first).await?;
    for g in 0..l.groups {
        if g > 0 {
            out.write(l.group_header(g) * BLOCK, fresh_header(l, g)).await?;
        }
        free += domains.free_blocks(l, g);
        out.step();
    }
    let place = l.group_bitmap(0, 0);
    let mut block = new_block(l.volume, BlockKind::GroupBitmap, LockId::Group(0), place);
    let first = l.group_extent(0).start;
    for number in domains.blocks.keys() {
        set_bit(&mut block[HEADER_SIZE..], (number - first) as usize, true);
    }
    seal(&mut block, 0, 0);
    out.write(place * BLOCK, block).await?;
    Ok(free)
}

/// What group 0 has in use in a new volume: the fixed domain numbers, and the blocks of their domains.
fn mark_first(header: &mut Block, l: &VolumeLayout, domains: &Domains) {
    let fixed = FIRST_SLOT_DOMAIN + u32::from(l.nodes);
    for d in 0..fixed {
        set_bit(&mut header[DOMAIN_BITMAP], d as usize, true);
    }
    GroupHeader {
        free_blocks: domains.free_blocks(l, 0),
        free_domains: l.domains_per_group - fixed,
        written_bitmaps: 1,
        bitmap_versions: 0,
        blocks: l.group_extent(0).len as u32,
    }
    .encode(header);
    seal(header, 0, 0);
}

fn new_block(volume: u64, kind: BlockKind, owner: LockId, block: u64) -> Block {
    let mut b = Block::zeroed(BLOCK_SIZE);
    BlockHeader { kind, owner, volume, block, version: 0, tenure: 0, record: 0 }.encode(&mut b);
    b
}

/// The domains of a new volume: the root directory's and one per slot, at the start of group 0.
struct Domains {
    /// Sealed, by block number.
    blocks: BTreeMap<u64, Block>,
    /// Header block of each domain.
    headers: BTreeMap<u32, u64>,
}

impl Domains {
    async fn build(sb: &Superblock, opts: &FormatOptions) -> Result<Self, MkfsError> {
        let l = sb.layout();
        let first = l.group_extent(0).start;
        let ids = ROOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(l.nodes);
        let headers: BTreeMap<u32, u64> = ids.zip(first..).collect();
        let mut nodes = Nodes {
            volume: l.volume,
            owner: LockId::Domain(ROOT_DOMAIN),
            next: first + headers.len() as u64,
            blocks: BTreeMap::new(),
        };
        let mut root = Root::default();
        let inode = Inode {
            mode: mode_bits::S_IFDIR | 0o755,
            links: 2,
            atime: opts.now,
            mtime: opts.now,
            ctime: opts.now,
            btime: opts.now,
            parent: ino(ROOT_DOMAIN, DIR_LOCAL),
            ..Inode::default()
        };
        tree::insert(&mut nodes, &mut root, &Key::new(DIR_LOCAL, Kind::Inode, 0), &inode.encode())
            .await
            .map_err(|e| MkfsError::Root(e.to_string()))?;
        let mut blocks = nodes.blocks;
        for (d, number) in &headers {
            let header = if *d == ROOT_DOMAIN {
                DomainHeader {
                    root: root.block,
                    levels: root.levels,
                    nodes: root.nodes,
                    inodes: 1,
                    next_local: DIR_LOCAL + 1,
                    version: root.version.into(),
                    ..DomainHeader::default()
                }
            } else {
                DomainHeader { next_local: 1, ..DomainHeader::default() }
            };
            let mut block = new_block(l.volume, BlockKind::DomainHeader, LockId::Domain(*d), *number);
            header.encode(&mut block);
            blocks.insert(*number, block);
        }
        for b in blocks.values_mut() {
            seal(b, 0, 0);
        }
        Ok(Self { blocks, headers })
    }

    fn free_blocks(&self, l: &VolumeLayout, group: u32) -> u64 {
        let used = if group == 0 { self.blocks.len() as u64 } else { 0 };
        l.group_extent(group).len.saturating_sub(used)
    }
}

/// The root directory's tree while it is built.
struct Nodes {
    volume: u64,
    owner: LockId,
    next: u64,
    blocks: BTreeMap<u64, Block>,
}

impl NodeRead for Nodes {
    fn damaged(&self, block: u64, why: &str) -> FsError {
        FsError::damaged(self.owner, format!("tree node {block}: {why}"))
    }

    async fn node(&self, block: u64) -> fs_core::Result<Arc<Block>> {
        let found = self.blocks.get(&block).map(|b| Arc::new(b.clone()));
        found.ok_or_else(|| self.damaged(block, "does not exist"))
    }

    async fn prefetch(&self, _blocks: &[u64]) -> fs_core::Result<()> {
        Ok(())
    }
}

impl NodeWrite for Nodes {
    fn version(&self) -> u32 {
        1
    }

    async fn node_mut(&mut self, block: u64) -> fs_core::Result<&mut Block> {
        let missing = self.damaged(block, "does not exist");
        self.blocks.get_mut(&block).ok_or(missing)
    }

    async fn alloc_node(&mut self) -> fs_core::Result<u64> {
        let number = self.next;
        self.next += 1;
        self.blocks.insert(number, new_block(self.volume, BlockKind::TreeNode, self.owner, number));
        Ok(number)
    }

    fn free_node(&mut self, block: u64) {
        self.blocks.remove(&block);
    }
}
