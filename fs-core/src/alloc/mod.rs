//! Free space: blocks and domain numbers of the groups that this node holds.
//!
//! Allocation touches memory only: a block is *busy* here from the moment an operation takes it. The group's bitmap block
//! changes when the operation is installed, together with everything else it did. A freed block stays busy until the record
//! of the free is durable: otherwise its new contents could be written while a crash still brings the old owner back.
//!
//! Every group keeps a few blocks back, so that a full volume still lets users delete: see [`Purpose`].

mod bits;
mod discard;
mod group;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use cluster::{LockId, LockValue, Mode, Tenure};
use journal::{Change, RecordNo};
use parking_lot::{Mutex, MutexGuard};

use crate::format::layout::{Extent, VolumeLayout};
use crate::hold::{Entry, Hold, Ticket};
pub use group::Group;

/// What blocks are for; decides how far into a group's last blocks an allocation may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// File contents and whatever makes the volume fuller.
    Grow,
    /// Tree nodes for the contents that were accepted already.
    Commit,
    /// Tree nodes that a removal needs.
    Reclaim,
}

impl Purpose {
    /// Blocks that must stay free in the group.
    fn keeps(self, group_blocks: u64) -> u64 {
        let reserve = (group_blocks / 16).min(256);
        match self {
            Purpose::Grow => reserve,
            Purpose::Commit => reserve / 2,
            Purpose::Reclaim => 0,
        }
    }
}

/// Allocations and frees of one operation, handed over at its installation.
#[derive(Debug, Default)]
pub struct SpaceChange {
    pub allocated: Vec<Extent>,
    pub freed: Vec<Extent>,
    pub domains_allocated: Vec<u32>,
    pub domains_freed: Vec<u32>,
}

impl SpaceChange {
    pub fn is_empty(&self) -> bool {
        self.allocated.is_empty()
            && self.freed.is_empty()
            && self.domains_allocated.is_empty()
            && self.domains_freed.is_empty()
    }
}

pub struct Allocator {
    layout: VolumeLayout,
    inner: Mutex<Inner>,
}

/// The held groups; locked for the whole of an installation.
pub struct Inner {
    layout: VolumeLayout,
    groups: BTreeMap<u32, Group>,
    /// Where allocation goes on.
    current: u32,
    /// Blocks promised to contents that wait in memory.
    reserved: u64,
    /// Freed blocks that may be used again once the record is durable.
    pending: VecDeque<(RecordNo, Extent)>,
    /// Groups about to be given up: they back no more promises.
    leaving: BTreeSet<u32>,
    /// Free blocks that the device does not know to be free, if it is told.
    freed: Option<discard::Freed>,
}

impl Allocator {
    pub fn new(layout: VolumeLayout) -> Self {
        let inner = Inner {
            layout,
            groups: BTreeMap::new(),
            current: 0,
            reserved: 0,
            pending: VecDeque::new(),
            leaving: BTreeSet::new(),
            freed: None,
        };
        Self { layout, inner: Mutex::new(inner) }
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// A group was acquired and read.
    pub fn add(&self, number: u32, group: Group) {
        let mut i = self.inner.lock();
        i.groups.insert(number, group);
        i.current = number;
    }

    /// The group is being given up: no allocation from it any more. Returns what its lock block is to say of it: free blocks, blocks and version.
    pub fn remove(&self, number: u32) -> Option<LockValue> {
        let mut i = self.inner.lock();
        i.leaving.remove(&number);
        let group = i.groups.remove(&number)?;
        let layout = self.layout;
        i.pending.retain(|(_, e)| layout.group_of(e.start) != Some(number));
        if let Some(freed) = &mut i.freed {
            freed.forget(|block| layout.group_of(block) == Some(number));
        }
        Some(LockValue { root: group.free_on_disk(), next_local: group.blocks(), version: group.version() })
    }

    /// The volume grew: so may the last of the groups that it had.
    pub fn grow(&self, layout: &VolumeLayout) {
        for (number, group) in &mut self.inner.lock().groups {
            group.grow(layout.group_extent(*number).len);
        }
    }

    /// Whether the group is held, and not about to be given up.
    pub fn keeps(&self, number: u32) -> bool {
        let i = self.inner.lock();
        i.groups.contains_key(&number) && !i.leaving.contains(&number)
    }

    /// Blocks that can be promised.
    pub fn unpromised(&self) -> u64 {
        self.inner.lock().unpromised()
    }

    /// Free blocks in the held groups, without `except`.
    pub fn free(&self, except: Option<u32>) -> u64 {
        let i = self.inner.lock();
        i.groups.iter().filter(|(n, _)| Some(**n) != except).map(|(_, g)| g.free()).sum()
    }

    /// (group, free blocks) of each held group.
    pub fn held(&self) -> Vec<(u32, u64)> {
        self.inner.lock().groups.iter().map(|(n, g)| (*n, g.free())).collect()
    }

    /// The group with the most free blocks of those that are held and not about to be given up.
    pub fn emptiest(&self) -> Option<u32> {
        let i = self.inner.lock();
        i.groups.iter().filter(|(n, _)| !i.leaving.contains(n)).max_by_key(|(_, g)| g.free()).map(|(n, _)| *n)
    }

    /// How many of a group's free blocks may be taken for a purpose.
    pub fn usable(&self, free: u64, purpose: Purpose) -> u64 {
        free.saturating_sub(purpose.keeps(self.layout.group_blocks.into()))
    }

    /// A held group that has a free domain number.
    pub fn group_with_domain(&self) -> Option<u32> {
        self.inner.lock().groups.iter().find(|(_, g)| g.has_free_domain()).map(|(n, _)| *n)
    }

    pub fn reserved(&self) -> u64 {
        self.inner.lock().reserved
    }

    /// Promises `blocks` to contents waiting in memory; false if the held groups do not have them.
    pub fn reserve(&self, blocks: u64) -> bool {
        let mut i = self.inner.lock();
        let ok = i.unpromised() >= blocks;
        if ok {
            i.reserved += blocks;
        }
        ok
    }

    /// The group is about to be given up: it backs no promises from here on. True if those made so far are backed by the others.
    pub fn begin_leaving(&self, group: u32) -> bool {
        let mut i = self.inner.lock();
        i.leaving.insert(group);
        i.backing() >= i.reserved
    }

    pub fn unreserve(&self, blocks: u64) {
        let mut i = self.inner.lock();
        i.reserved = i.reserved.saturating_sub(blocks);
    }

    /// Makes freed blocks usable whose record is durable.
    pub fn reap(&self, durable: RecordNo) {
        let mut i = self.inner.lock();
        while i.pending.front().is_some_and(|(r, _)| *r <= durable) {
            if let Some((_, e)) = i.pending.pop_front() {
                i.set_busy(e, false);
                if let Some(freed) = &mut i.freed {
                    freed.add(e);
                }
            }
        }
    }

    /// Up to `want` consecutive blocks, at `goal` if that is free. The ticket keeps the group until installation.
    pub fn take(&self, want: u64, goal: Option<u64>, purpose: Purpose) -> Option<(Extent, Ticket)> {
        let mut i = self.inner.lock();
        // What was promised to contents in memory is theirs.
        let want = if purpose == Purpose::Grow { want.min(i.unpromised()) } else { want };
        if want == 0 {
            return None;
        }
        let start = goal.and_then(|b| self.layout.group_of(b)).unwrap_or(i.current);
        let order: Vec<u32> = i.groups.range(start..).chain(i.groups.range(..start)).map(|(n, _)| *n).collect();
        let keeps = purpose.keeps(self.layout.group_blocks.into());
        for n in order {
            let Some(g) = i.groups.get_mut(&n) else { continue };
            let usable = g.free().saturating_sub(keeps);
            if usable == 0 {
                continue;
            }
            let Entry::Admitted(ticket) = g.hold().try_enter_held() else { continue };
            let first = self.layout.group_extent(n).start;
            if let Some(e) =
                g.take(want.min(usable), goal.filter(|b| self.layout.group_of(*b) == Some(n)).map(|b| b - first))
            {
                i.current = n;
                return Some((Extent::new(first + e.start, e.len), ticket));
            }
        }
        None
    }

    /// A free domain number.
    pub fn take_domain(&self) -> Option<(u32, Ticket)> {
        let mut i = self.inner.lock();
        let numbers: Vec<u32> = i.groups.keys().copied().collect();
        for n in numbers {
            let Some(g) = i.groups.get_mut(&n) else { continue };
            if !g.has_free_domain() {
                continue;
            }
            let Entry::Admitted(ticket) = g.hold().try_enter_held() else { continue };
            if let Some(d) = g.take_domain() {
                return Some((self.layout.group_domains(n).start + d, ticket));
            }
        }
        None
    }

    /// Keeps a group for frees, if this node holds it.
    pub fn ticket(&self, group: u32) -> Option<Ticket> {
        let i = self.inner.lock();
        match i.groups.get(&group)?.hold().try_enter_held() {
            Entry::Admitted(t) => Some(t),
            _ => None,
        }
    }

    /// An operation was given up: what it took is free again.
    pub fn give_back(&self, change: &SpaceChange) {
        let mut i = self.inner.lock();
        for e in &change.allocated {
            i.set_busy(*e, false);
        }
        for d in &change.domains_allocated {
            i.set_domain_busy(*d, false);
        }
    }
}

impl Inner {
    /// Blocks for contents in the groups that stay.
    fn backing(&self) -> u64 {
        let keeps = Purpose::Grow.keeps(self.layout.group_blocks.into());
        let staying = self.groups.iter().filter(|(n, _)| !self.leaving.contains(n));
        staying.map(|(_, g)| g.free().saturating_sub(keeps)).sum()
    }

    fn unpromised(&self) -> u64 {
        self.backing().saturating_sub(self.reserved)
    }

    fn set_busy(&mut self, e: Extent, busy: bool) {
        let Some(n) = self.layout.group_of(e.start) else { return };
        let first = self.layout.group_extent(n).start;
        if let Some(g) = self.groups.get_mut(&n) {
            g.set_busy(Extent::new(e.start - first, e.len), busy);
        }
    }

    fn set_domain_busy(&mut self, domain: u32, busy: bool) {
        let n = self.layout.group_of_domain(domain);
        let first = self.layout.group_domains(n).start;
        if let Some(g) = self.groups.get_mut(&n) {
            g.set_domain_busy(domain - first, busy);
        }
    }

    /// The changed group blocks of an operation being installed. Its groups are held by tickets.
    pub fn changes(&mut self, c: &SpaceChange) -> Vec<Change> {
        let layout = self.layout;
        for (extents, used) in [(&c.allocated, true), (&c.freed, false)] {
            for e in extents {
                let Some(n) = layout.group_of(e.start) else { continue };
                let first = layout.group_extent(n).start;
                if let Some(g) = self.groups.get_mut(&n) {
                    g.mark(Extent::new(e.start - first, e.len), used);
                }
            }
        }
        for (domains, used) in [(&c.domains_allocated, true), (&c.domains_freed, false)] {
            for d in domains {
                let n = layout.group_of_domain(*d);
                if let Some(g) = self.groups.get_mut(&n) {
                    g.mark_domain(*d - layout.group_domains(n).start, used);
                }
            }
        }
        self.groups.iter_mut().flat_map(|(n, g)| g.take_changes(LockId::Group(*n))).collect()
    }

    /// The frees of an operation went into `record`.
    pub fn installed(&mut self, c: &SpaceChange, record: RecordNo) {
        self.pending.extend(c.freed.iter().map(|e| (record, *e)));
    }

    /// Under which tenure this node holds the group that a domain's number is of.
    pub fn tenure_of_domain(&self, domain: u32) -> Option<Tenure> {
        self.groups.get(&self.layout.group_of_domain(domain)).map(Group::tenure)
    }

    /// The lock block of a domain that was freed under `tenure` of its group has been given up: the number may be used again. A group
    /// that came back since says itself which numbers are free: another node may have taken this one.
    pub fn domain_reusable(&mut self, domain: u32, tenure: Option<Tenure>) {
        if tenure.is_some() && self.tenure_of_domain(domain) == tenure {
            self.set_domain_busy(domain, false);
        }
    }
}

/// Admission to a group that is known to be held.
trait TryEnterHeld {
    fn try_enter_held(&self) -> Entry;
}

impl TryEnterHeld for Arc<Hold> {
    fn try_enter_held(&self) -> Entry {
        if self.grant().is_some_and(|g| g.mode == Mode::Exclusive) {
            self.try_enter(Mode::Exclusive)
        } else {
            Entry::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> VolumeLayout {
        VolumeLayout {
            volume: 7,
            blocks: 4096,
            nodes: 2,
            groups: 1,
            max_groups: 4,
            domains_per_group: 64,
            group_blocks: 2048,
            bitmap_blocks: 1,
            journal_blocks: 256,
            sector_size: 512,
            plain_locks: false,
            cluster_start: 1,
            locks_start: 16,
            journals_start: 64,
            groups_start: 1024,
        }
    }

    fn busy(a: &Allocator, domain: u32) -> bool {
        let i = a.lock();
        !i.groups[&0].is_free_domain(domain - i.layout.group_domains(0).start)
    }

    #[test]
    fn a_freed_domain_number_is_not_taken_from_who_used_it_meanwhile() {
        let layout = layout();
        let a = Allocator::new(layout);
        let domain = layout.group_domains(0).start + 20;
        a.add(0, Group::with_domains(&layout, 0, 5, &[domain]));
        let freed_under = a.lock().tenure_of_domain(domain);
        // The group goes to another node, which makes a directory of that number, and comes back.
        a.remove(0);
        a.lock().domain_reusable(domain, freed_under);
        a.add(0, Group::with_domains(&layout, 0, 9, &[domain]));
        a.lock().domain_reusable(domain, freed_under);
        assert!(busy(&a, domain), "the number means the other node's directory");
        let freed_under = a.lock().tenure_of_domain(domain);
        a.lock().domain_reusable(domain, freed_under);
        assert!(!busy(&a, domain));
    }
}
