//! One operation's changes: a private overlay of blocks that is installed whole or dropped whole (I11).
//!
//! An operation that finds out on its way that it needs one more domain, or more free blocks, returns
//! [`FsError::NeedDomain`] or [`FsError::NeedSpace`]; everything it did is dropped, what it needs is fetched without holding
//! anything, and it starts over. So locks are always taken in one global order and nobody waits for space while holding one.

mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster::{LockId, Mode, Tenure};
use journal::block::{BlockHeader, BlockKind};
use journal::{BLOCK_SIZE, Block, Change, DataWrite, Install, RecordNo, Room};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use crate::alloc::{Purpose, SpaceChange};
use crate::domain::{Domain, Page};
use crate::error::{FsError, Result};
use crate::format::domain::DomainHeader;
use crate::format::item::{Inode, Key, Kind, ino, ino_domain, ino_local};
use crate::format::layout::Extent;
use crate::hold::Ticket;
use crate::tree::{self, NodeRead, NodeWrite, Root};
use crate::volume::Volume;

pub use plan::{Kept, Plan};

#[allow(dead_code)]
enum OpGuard {
    Read(OwnedRwLockReadGuard<()>),
    Write(OwnedRwLockWriteGuard<()>),
}

struct Admitted {
    domain: Arc<Domain>,
    mode: Mode,
    ticket: Ticket,
    _guard: OpGuard,
}

struct TxBlock {
    owner: LockId,
    tenure: Tenure,
    old: Option<Arc<Block>>,
    new: Arc<Block>,
}

struct TxHeader {
    block: u64,
    header: DomainHeader,
    as_read: DomainHeader,
}

impl TxHeader {
    /// Version of what the operation changes: one for all of it.
    fn next_version(&self) -> u64 {
        self.as_read.version.wrapping_add(1)
    }
}

/// Pages that go out with the operation's record.
struct SentPages {
    domain: Arc<Domain>,
    local: u64,
    pages: Vec<(u64, Arc<blockdev::AlignedBuf>)>,
}

pub struct Txn<'v> {
    pub vol: &'v Volume,
    admitted: BTreeMap<u32, Admitted>,
    purpose: Purpose,
    /// In the journal, for who changes something. A revocation has none: it may be what those wait for that have.
    room: Option<Room>,
    blocks: BTreeMap<u64, TxBlock>,
    headers: BTreeMap<u32, TxHeader>,
    space: SpaceChange,
    groups: BTreeMap<u32, Ticket>,
    revokes: Vec<(u64, u64)>,
    /// Tree nodes whose blocks are still to be freed.
    freed_nodes: Vec<u64>,
    data: Vec<DataWrite>,
    sent: Vec<SentPages>,
    /// Run when the operation has been installed, under the domains' guards.
    installed: Vec<Box<dyn FnOnce() + Send + Sync>>,
    /// A domain made for this operation only: given back if the operation is dropped.
    spare: Option<Arc<Domain>>,
    done: bool,
}

impl<'v> Txn<'v> {
    /// Waits for admission to every domain of the plan, in the global order.
    pub async fn begin(vol: &'v Volume, plan: &Plan) -> Result<Txn<'v>> {
        let mut admitted = BTreeMap::new();
        for (&id, &mode) in &plan.domains {
            let domain = vol.domain(id);
            let pages_of = plan.pages_of.filter(|ino| ino_domain(*ino) == id);
            let ticket = vol.enter_with_pages(&domain.hold, mode, pages_of).await?;
            admitted.insert(id, (domain, mode, ticket));
        }
        let mut tx = Self::admit(vol, plan.purpose, admitted).await;
        if plan.writes() {
            tx.room = Some(vol.journal.room().await.map_err(|e| vol.journal_failed(e))?);
        }
        Ok(tx)
    }

    /// For a revocation that has blocked all other operations of the domain. The plan may name others too: what is freed
    /// into groups of other nodes goes to the slot's own domain.
    pub async fn within_revocation(vol: &'v Volume, domain: Arc<Domain>, plan: &Plan) -> Result<Txn<'v>> {
        // A volume that failed meanwhile has lost the domain, and the plan cannot be widened so that it has it again.
        vol.check()?;
        let mut admitted = BTreeMap::new();
        for (&id, &mode) in plan.domains.iter().filter(|(id, _)| **id != domain.id) {
            let other = vol.domain(id);
            let ticket = vol.enter_revoking(&other.hold).await?;
            admitted.insert(id, (other, mode, ticket));
        }
        let ticket = domain.hold.revokers_ticket();
        admitted.insert(domain.id, (domain, Mode::Exclusive, ticket));
        Ok(Self::admit(vol, plan.purpose, admitted).await)
    }

    async fn admit(vol: &'v Volume, purpose: Purpose, admitted: BTreeMap<u32, (Arc<Domain>, Mode, Ticket)>) -> Txn<'v> {
        let mut all = BTreeMap::new();
        for (id, (domain, mode, ticket)) in admitted {
            let guard = match mode {
                Mode::Shared => OpGuard::Read(domain.ops.clone().read_owned().await),
                Mode::Exclusive => OpGuard::Write(domain.ops.clone().write_owned().await),
            };
            all.insert(id, Admitted { domain, mode, ticket, _guard: guard });
        }
        Self {
            vol,
            admitted: all,
            purpose,
            room: None,
            blocks: BTreeMap::new(),
            headers: BTreeMap::new(),
            space: SpaceChange::default(),
            groups: BTreeMap::new(),
            revokes: Vec::new(),
            freed_nodes: Vec::new(),
            data: Vec::new(),
            sent: Vec::new(),
            installed: Vec::new(),
            spare: None,
            done: false,
        }
    }

    /// The domain, which must be part of the plan in at least `mode` (I1).
    pub fn domain(&self, id: u32, mode: Mode) -> Result<&Arc<Domain>> {
        match self.admitted.get(&id) {
            Some(a) if a.mode >= mode => Ok(&a.domain),
            _ => Err(FsError::NeedDomain(id)),
        }
    }

    pub fn tenure(&self, id: u32) -> Result<Tenure> {
        let domain = self.domain(id, Mode::Shared)?;
        domain.hold.grant().map(|g| g.tenure).ok_or(FsError::NeedDomain(id))
    }

    // ---- trees -------------------------------------------------------------------------------------------------

    async fn load_header(&mut self, id: u32) -> Result<()> {
        if self.headers.contains_key(&id) {
            return Ok(());
        }
        let owner = LockId::Domain(id);
        let grant = self.domain(id, Mode::Shared)?.hold.grant().ok_or(FsError::NeedDomain(id))?;
        if grant.value.root == 0 {
            return Err(FsError::Stale);
        }
        let block = grant.value.root;
        let b = self.vol.store.read(owner, block, BlockKind::DomainHeader).await?;
        let header = DomainHeader::decode(&b).map_err(|e| FsError::format(owner, e))?;
        header.check_age(grant.value.version).map_err(|why| FsError::Block { block, owner, why })?;
        self.headers.insert(id, TxHeader { block, header, as_read: header });
        Ok(())
    }

    /// The domain's header, to read or change; changes are installed with the operation.
    pub async fn header(&mut self, id: u32) -> Result<&mut DomainHeader> {
        self.load_header(id).await?;
        self.headers.get_mut(&id).map(|h| &mut h.header).ok_or(FsError::NeedDomain(id))
    }

    async fn root(&mut self, id: u32) -> Result<Root> {
        let h = self.header(id).await?;
        Ok(h.tree())
    }

    fn set_root(&mut self, id: u32, root: Root) {
        if let Some(h) = self.headers.get_mut(&id) {
            if root != h.header.tree() {
                h.header.version = h.next_version();
            }
            h.header.root = root.block;
            h.header.levels = root.levels;
            h.header.nodes = root.nodes;
        }
    }

    pub async fn get(&mut self, id: u32, key: &Key) -> Result<Option<Vec<u8>>> {
        let root = self.root(id).await?;
        tree::get(&TxTree { tx: self, id }, root, key).await
    }

    pub async fn scan(&mut self, id: u32, from: Key, to: Key, limit: usize) -> Result<Vec<(Key, Vec<u8>)>> {
        let root = self.root(id).await?;
        tree::scan(&TxTree { tx: self, id }, root, from, to, limit).await
    }

    pub async fn last_at_or_before(&mut self, id: u32, key: &Key) -> Result<Option<(Key, Vec<u8>)>> {
        let root = self.root(id).await?;
        tree::last_at_or_before(&TxTree { tx: self, id }, root, key).await
    }

    pub async fn warm(&mut self, id: u32, from: &Key, to: &Key) -> Result<()> {
        let root = self.root(id).await?;
        tree::warm(&TxTree { tx: self, id }, root, from, to).await
    }

    pub async fn put(&mut self, id: u32, key: &Key, value: &[u8]) -> Result<()> {
        self.domain(id, Mode::Exclusive)?;
        let mut root = self.root(id).await?;
        tree::insert(&mut TxTree { tx: self, id }, &mut root, key, value).await?;
        self.set_root(id, root);
        Ok(())
    }

    pub async fn del(&mut self, id: u32, key: &Key) -> Result<Option<Vec<u8>>> {
        self.domain(id, Mode::Exclusive)?;
        let mut root = self.root(id).await?;
        let old = tree::remove(&mut TxTree { tx: self, id }, &mut root, key).await?;
        self.set_root(id, root);
        Ok(old)
    }

    pub async fn del_range(&mut self, id: u32, from: Key, to: Key, limit: usize) -> Result<Vec<(Key, Vec<u8>)>> {
        self.domain(id, Mode::Exclusive)?;
        let mut root = self.root(id).await?;
        let old = tree::remove_range(&mut TxTree { tx: self, id }, &mut root, &from, &to, limit).await?;
        self.set_root(id, root);
        Ok(old)
    }

    /// What a slot's domain keeps of one kind, from an offset on.
    pub async fn kept_for_slot(&mut self, id: u32, kind: Kind, from: u64, limit: usize) -> Result<Vec<(Key, Vec<u8>)>> {
        match self.scan(id, Key::new(0, kind, from), Key::new(0, kind, u64::MAX), limit).await {
            // A slot that has never been used has no domain.
            Err(FsError::Stale) => Ok(Vec::new()),
            items => items,
        }
    }

    // ---- inodes ------------------------------------------------------------------------------------------------

    /// The inode as its item in the tree says; [`Stale`](FsError::Stale) if there is none.
    pub async fn inode(&mut self, number: u64) -> Result<Inode> {
        let (id, local) = (ino_domain(number), ino_local(number));
        let item = self.get(id, &Key::new(local, Kind::Inode, 0)).await?.ok_or(FsError::Stale)?;
        Inode::decode(&item).map_err(|e| FsError::format(LockId::Domain(id), e))
    }

    /// The inode as users see it, contents in memory included.
    pub async fn live_inode(&mut self, number: u64) -> Result<Inode> {
        let mut inode = self.inode(number).await?;
        self.domain(ino_domain(number), Mode::Shared)?.overlay(ino_local(number), &mut inode);
        Ok(inode)
    }

    pub async fn put_inode(&mut self, number: u64, inode: &Inode) -> Result<()> {
        self.put(ino_domain(number), &Key::new(ino_local(number), Kind::Inode, 0), &inode.encode()).await
    }

    /// A new inode number in the domain.
    pub async fn new_ino(&mut self, id: u32) -> Result<u64> {
        let header = self.header(id).await?;
        let local = header.next_local;
        header.next_local += 1;
        header.inodes += 1;
        Ok(ino(id, local))
    }

    // ---- space -------------------------------------------------------------------------------------------------

    /// Up to `want` consecutive blocks, near `goal`.
    pub fn take_blocks(&mut self, want: u64, goal: Option<u64>, purpose: Purpose) -> Result<Extent> {
        let (extent, ticket) = self.vol.alloc.take(want, goal, purpose).ok_or(FsError::NeedSpace(want))?;
        if let Some(group) = self.vol.layout().group_of(extent.start) {
            self.groups.entry(group).or_insert(ticket);
        }
        self.space.allocated.push(extent);
        Ok(extent)
    }

    pub fn take_domain_number(&mut self) -> Option<u32> {
        let (d, ticket) = self.vol.alloc.take_domain()?;
        self.groups.entry(self.vol.layout().group_of_domain(d)).or_insert(ticket);
        self.space.domains_allocated.push(d);
        Some(d)
    }

    /// Frees blocks: at once where this node holds the group, else by an item in the slot's own domain.
    pub async fn free_blocks(&mut self, e: Extent) -> Result<()> {
        let owner = self.vol.layout().group_of(e.start);
        let Some(group) = owner.filter(|g| e.len > 0 && self.vol.layout().group_of(e.end() - 1) == Some(*g)) else {
            return Err(FsError::damaged(
                LockId::Group(0),
                format!("blocks {}..{} are not in one group", e.start, e.end()),
            ));
        };
        if self.hold_group(group) {
            self.space.freed.push(e);
            return Ok(());
        }
        let own = self.vol.own_domain();
        self.put(own, &Key::new(0, Kind::DeferredFree, e.start), &e.len.to_le_bytes()).await
    }

    /// Keeps the group until installation if this node holds it.
    pub fn hold_group(&mut self, group: u32) -> bool {
        if self.groups.contains_key(&group) {
            return true;
        }
        match self.vol.alloc.ticket(group) {
            Some(t) => {
                self.groups.insert(group, t);
                true
            }
            None => false,
        }
    }

    pub fn free_domain_number(&mut self, id: u32) {
        self.space.domains_freed.push(id);
    }

    /// Metadata blocks that must never be replayed from older records (I6).
    pub fn revoke(&mut self, block: u64) {
        self.blocks.remove(&block);
        self.revokes.push((block, 1));
    }

    // ---- blocks ------------------------------------------------------------------------------------------------

    /// A block that was just allocated, zeroed, with its header.
    pub fn fresh_block(&mut self, owner: LockId, tenure: Tenure, number: u64, kind: BlockKind) -> &mut Block {
        let mut new = Block::zeroed(BLOCK_SIZE);
        BlockHeader { kind, owner, volume: self.vol.layout().volume, block: number, version: 0, tenure: 0, record: 0 }
            .encode(&mut new);
        let block = TxBlock { owner, tenure, old: None, new: Arc::new(new) };
        Arc::make_mut(&mut self.blocks.entry(number).insert_entry(block).into_mut().new)
    }

    /// The header of a domain that this operation makes; its lock is held already. [`DomainBusy`](FsError::DomainBusy):
    /// take another number.
    pub fn add_domain(
        &mut self,
        domain: Arc<Domain>,
        ticket: Ticket,
        header_block: u64,
        header: DomainHeader,
    ) -> Result<()> {
        let id = domain.id;
        let grant = domain.hold.grant().ok_or(FsError::NeedDomain(id))?;
        // Somebody who still asks for an inode that the number meant before may have been let in. Waiting for him here,
        // with other domains in hand, could be for ever.
        let guard = domain.ops.clone().try_write_owned().map_err(|_| FsError::DomainBusy)?;
        self.admitted.insert(id, Admitted { domain, mode: Mode::Exclusive, ticket, _guard: OpGuard::Write(guard) });
        self.fresh_block(LockId::Domain(id), grant.tenure, header_block, BlockKind::DomainHeader);
        let as_read = DomainHeader { version: header.version, ..DomainHeader::default() };
        self.headers.insert(id, TxHeader { block: header_block, header, as_read });
        Ok(())
    }

    /// See the field.
    pub fn own_spare(&mut self, domain: Arc<Domain>) {
        self.spare = Some(domain);
    }

    /// The header's block, and the header is not to be written any more: the domain is freed.
    pub fn drop_header(&mut self, id: u32) -> Option<(u64, DomainHeader)> {
        self.headers.remove(&id).map(|h| (h.block, h.header))
    }

    /// All nodes of the domain's tree.
    pub async fn tree_nodes(&mut self, id: u32) -> Result<Vec<u64>> {
        let root = self.root(id).await?;
        let mut nodes = Vec::new();
        tree::for_each_node(&TxTree { tx: self, id }, root, &mut |n, _| nodes.push(n)).await?;
        Ok(nodes)
    }

    // ---- data --------------------------------------------------------------------------------------------------

    /// Contents that go out with the operation's record.
    pub fn write_data(&mut self, w: DataWrite) {
        self.data.push(w);
    }

    /// The pages that `write_data` took their contents from: they are read from memory until the record is durable.
    pub fn sent_pages(&mut self, domain: Arc<Domain>, local: u64, pages: Vec<(u64, Arc<blockdev::AlignedBuf>)>) {
        self.sent.push(SentPages { domain, local, pages });
    }

    /// Runs `f` when the operation is installed; not at all if it is dropped.
    pub fn on_install(&mut self, f: impl FnOnce() + Send + Sync + 'static) {
        self.installed.push(Box::new(f));
    }

    // ---- end ---------------------------------------------------------------------------------------------------

    /// Completes the overlay: everything that can still fail, or ask for more, happens here.
    pub async fn prepare(&mut self) -> Result<()> {
        while let Some(block) = self.freed_nodes.pop() {
            self.free_blocks(Extent::new(block, 1)).await?;
        }
        self.encode_headers().await
    }

    async fn encode_headers(&mut self) -> Result<()> {
        let headers = std::mem::take(&mut self.headers);
        for (id, h) in headers {
            if h.header == h.as_read {
                continue;
            }
            let block = self.edit(LockId::Domain(id), h.block, BlockKind::DomainHeader).await?;
            h.header.encode(block);
            let (domain, version) = (self.domain(id, Mode::Exclusive)?.clone(), h.header.version);
            self.on_install(move || *domain.changed_to.lock() = Some(version));
        }
        Ok(())
    }

    /// The block, private to this operation.
    async fn edit(&mut self, owner: LockId, number: u64, kind: BlockKind) -> Result<&mut Block> {
        if !self.blocks.contains_key(&number) {
            let LockId::Domain(id) = owner else { return Err(FsError::Invalid) };
            self.domain(id, Mode::Exclusive)?;
            let tenure = self.tenure(id)?;
            let old = self.vol.store.read(owner, number, kind).await?;
            let new = old.clone();
            self.blocks.insert(number, TxBlock { owner, tenure, old: Some(old), new });
        }
        self.blocks.get_mut(&number).map(|b| Arc::make_mut(&mut b.new)).ok_or(FsError::Invalid)
    }

    /// Takes everything over into the running transaction, atomically, after [`prepare`](Self::prepare). Returns the
    /// record it will be in, and the tickets.
    pub fn install(mut self) -> (RecordNo, Vec<Ticket>) {
        let record = self.install_now();
        let tickets = std::mem::take(&mut self.admitted).into_values().map(|a| a.ticket).collect();
        (record, tickets)
    }

    fn install_now(&mut self) -> RecordNo {
        self.done = true;
        let vol = self.vol;
        let blocks = std::mem::take(&mut self.blocks);
        let (revokes, data) = (std::mem::take(&mut self.revokes), std::mem::take(&mut self.data));
        if blocks.is_empty() && revokes.is_empty() && data.is_empty() && self.space.is_empty() {
            for f in self.installed.drain(..) {
                f();
            }
            return vol.journal.running();
        }
        // The allocator stays locked: bitmap changes of two operations must reach the journal in the order they were made.
        let mut space = vol.alloc.lock();
        let mut changes = space.changes(&self.space);
        for (number, b) in blocks {
            vol.store.put(b.owner, number, b.new.clone());
            changes.push(Change { block: number, lock: b.owner, tenure: b.tenure, new: b.new, old: b.old });
        }
        for (block, _) in &revokes {
            vol.store.remove(*block);
        }
        let record = vol.journal.install(Install { changes, revokes, data });
        space.installed(&self.space, record);
        drop(space);
        for s in self.sent.drain(..) {
            s.domain.with_file(s.local, |f| {
                for (page, buf) in s.pages {
                    f.pages.insert(page, Page { buf, record: Some(record) });
                }
            });
        }
        for f in self.installed.drain(..) {
            f();
        }
        record
    }
}

impl Drop for Txn<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let spare = self.spare.take();
        // The number of a spare domain stays taken, and its group held, until its lock block is free again.
        self.space.domains_allocated.retain(|d| spare.as_ref().is_none_or(|s| s.id != *d));
        self.vol.alloc.give_back(&self.space);
        if let (Some(domain), Some(vol)) = (spare, self.vol.me.upgrade()) {
            let groups = std::mem::take(&mut self.groups);
            let next_local = domain.hold.grant().map(|g| g.value.next_local);
            domain.hold.emptied();
            let tenure = vol.alloc.lock().tenure_of_domain(domain.id);
            tokio::spawn(async move {
                vol.give_back_domain(&domain, next_local, tenure).await;
                drop(groups);
            });
        }
    }
}

/// The tree of one domain, seen through an operation.
struct TxTree<'a, 'v> {
    tx: &'a mut Txn<'v>,
    id: u32,
}

impl NodeRead for TxTree<'_, '_> {
    fn damaged(&self, block: u64, why: &str) -> FsError {
        FsError::damaged(LockId::Domain(self.id), format!("tree node at block {block}: {why}"))
    }

    async fn node(&self, block: u64) -> Result<Arc<Block>> {
        if let Some(b) = self.tx.blocks.get(&block) {
            return Ok(b.new.clone());
        }
        self.tx.vol.store.read(LockId::Domain(self.id), block, BlockKind::TreeNode).await
    }

    async fn prefetch(&self, blocks: &[u64]) -> Result<()> {
        self.tx.vol.store.prefetch(LockId::Domain(self.id), blocks, BlockKind::TreeNode).await
    }
}

impl NodeWrite for TxTree<'_, '_> {
    fn version(&self) -> u32 {
        self.tx.headers.get(&self.id).map_or(0, TxHeader::next_version) as u32
    }

    async fn node_mut(&mut self, block: u64) -> Result<&mut Block> {
        self.tx.edit(LockId::Domain(self.id), block, BlockKind::TreeNode).await
    }

    async fn alloc_node(&mut self) -> Result<u64> {
        let (id, tenure, purpose) = (self.id, self.tx.tenure(self.id)?, self.tx.purpose);
        let header = *self.tx.header(id).await?;
        let (next, left) = if header.reserve_len > 0 {
            (header.reserve_next, header.reserve_len)
        } else {
            let goal = Some(header.reserve_next).filter(|b| *b > 0);
            // Of the blocks kept back for removals and accepted contents only what is needed.
            let run = match self.tx.take_blocks(run_length(header.nodes), goal, Purpose::Grow) {
                Err(FsError::NeedSpace(_)) => self.tx.take_blocks(1, goal, purpose)?,
                run => run?,
            };
            (run.start, run.len as u32)
        };
        let h = self.tx.header(id).await?;
        h.reserve_next = next + 1;
        h.reserve_len = left - 1;
        self.tx.fresh_block(LockId::Domain(id), tenure, next, BlockKind::TreeNode);
        Ok(next)
    }

    fn free_node(&mut self, block: u64) {
        self.tx.revoke(block);
        self.tx.freed_nodes.push(block);
    }
}

/// Tree nodes are allocated in runs, longer for larger trees, so that a cold mailbox is read in few large reads.
fn run_length(nodes: u64) -> u64 {
    match nodes {
        0..8 => 4,
        8..64 => 16,
        _ => 64,
    }
}
