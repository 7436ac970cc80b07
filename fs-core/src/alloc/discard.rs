//! Telling the device which blocks hold nothing any more (the mount option `discard`).
//!
//! A block may forget its contents when it may be used again: once the record of its free is durable. What is used again soon, as most
//! of a mail spool is, need not be discarded at all, so freed runs are gathered for a while, and those that are still free and long
//! enough are discarded in the background. Meanwhile they are busy and their group is held: nobody's new contents can be lost.

use std::collections::BTreeMap;

use super::{Allocator, Inner, TryEnterHeld};
use crate::format::layout::Extent;
use crate::hold::{Entry, Ticket};

/// Shorter runs are not worth a command, and what arrays allocate is larger anyway.
const LEAST: u64 = 8;
/// Blocks that one command names: they cannot be used while it is under way.
const MOST: u64 = 16 << 10;

/// Runs of blocks that were freed since they were last discarded: from the first block of each, how many.
#[derive(Debug, Default)]
pub struct Freed(BTreeMap<u64, u64>);

impl Freed {
    pub fn add(&mut self, e: Extent) {
        let (mut start, mut end) = (e.start, e.end());
        if let Some((&s, &len)) = self.0.range(..=start).next_back().filter(|(s, len)| *s + *len >= start) {
            (start, end) = (s, end.max(s + len));
        }
        while let Some((&s, &len)) = self.0.range(start..=end).next() {
            self.0.remove(&s);
            end = end.max(s + len);
        }
        self.0.insert(start, end - start);
    }

    fn pop(&mut self) -> Option<Extent> {
        self.0.pop_first().map(|(start, len)| Extent::new(start, len))
    }

    /// Forgets what begins in some blocks.
    pub fn forget(&mut self, there: impl Fn(u64) -> bool) {
        self.0.retain(|start, _| !there(*start));
    }
}

impl Allocator {
    /// From now on freed blocks are gathered for [`Allocator::next_discard`].
    pub fn gather_freed(&self) {
        self.inner.lock().freed.get_or_insert_default();
    }

    /// ... and from now on no more: the device does not take discards.
    pub fn gather_no_more(&self) {
        self.inner.lock().freed = None;
    }

    /// A run that is to be discarded and then given to [`Allocator::discarded`].
    pub fn next_discard(&self) -> Option<(Extent, Ticket)> {
        let mut i = self.inner.lock();
        while let Some(run) = i.freed.as_mut()?.pop() {
            if let Some((e, ticket)) = i.still_free(run) {
                return Some((e, ticket));
            }
        }
        None
    }

    pub fn discarded(&self, e: Extent) {
        self.inner.lock().set_busy(e, false);
    }
}

impl Inner {
    /// The first piece of a run that is free and worth it, now busy; what lies behind it is looked at later.
    fn still_free(&mut self, run: Extent) -> Option<(Extent, Ticket)> {
        let number = self.layout.group_of(run.start)?;
        let group = self.groups.get_mut(&number)?;
        let extent = Extent::new(self.layout.group_extent(number).start, group.blocks());
        let end = run.end().min(extent.end());
        let mut at = run.start;
        while at < end {
            let len = group.free_run(at - extent.start, (end - at).min(MOST));
            if len >= LEAST {
                let Entry::Admitted(ticket) = group.hold().try_enter_held() else { return None };
                let e = Extent::new(at, len);
                self.set_busy(e, true);
                if let Some(freed) = self.freed.as_mut().filter(|_| e.end() < end) {
                    freed.add(Extent::new(e.end(), end - e.end()));
                }
                return Some((e, ticket));
            }
            at += len.max(1);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_grow_together() {
        let mut f = Freed::default();
        for (start, len) in [(100, 10), (120, 10), (110, 10), (90, 5), (97, 3), (200, 1), (95, 2)] {
            f.add(Extent::new(start, len));
        }
        assert_eq!(f.0, BTreeMap::from([(90, 40), (200, 1)]));
        f.forget(|block| block < 100);
        assert_eq!((f.pop(), f.pop()), (Some(Extent::new(200, 1)), None));
    }
}
