//! A set of the blocks in the allocation groups: one bit each, of the groups that have any.

use std::collections::BTreeMap;

use crate::format::layout::VolumeLayout;

#[derive(Clone)]
pub(crate) struct Blocks {
    layout: VolumeLayout,
    groups: BTreeMap<u32, Box<[u64]>>,
}

impl Blocks {
    pub fn new(layout: VolumeLayout) -> Self {
        Self { layout, groups: BTreeMap::new() }
    }

    /// Whether a run lies in a group.
    pub fn inside(&self, start: u64, len: u64) -> bool {
        // In one group: between two there is what belongs to the second.
        let last = start.checked_add(len).and_then(|e| e.checked_sub(1));
        let group = self.layout.group_within(start);
        len > 0 && group.is_some() && last.is_some_and(|l| self.layout.group_within(l) == group)
    }

    /// The bits of a group, 64 blocks a word.
    pub fn words_mut(&mut self, g: u32) -> &mut [u64] {
        let len = self.layout.group_extent(g).len;
        self.groups.entry(g).or_insert_with(|| vec![0; len.div_ceil(64) as usize].into())
    }

    /// The bits of a group; `None`: no block of it is in.
    pub fn words(&self, g: u32) -> Option<&[u64]> {
        self.groups.get(&g).map(|w| &**w)
    }

    /// The groups that have any, ascending.
    pub fn groups(&self) -> impl Iterator<Item = (u32, &[u64])> {
        self.groups.iter().map(|(g, w)| (*g, &**w))
    }

    /// Whether a block is in; one outside the groups counts as such.
    pub fn get(&self, block: u64) -> bool {
        let Some(g) = self.layout.group_within(block) else { return true };
        let i = block - self.layout.group_extent(g).start;
        self.groups.get(&g).is_some_and(|w| w.get((i / 64) as usize).is_none_or(|w| w >> (i % 64) & 1 == 1))
    }

    /// Whether a block lies in the groups and is not in.
    pub fn is_free(&self, block: u64) -> bool {
        !self.get(block)
    }

    /// Puts a run in, if it lies in the groups and none of it is in already.
    pub fn claim(&mut self, start: u64, len: u64) -> bool {
        if !self.inside(start, len) || (start..start + len).any(|b| self.get(b)) {
            return false;
        }
        for b in start..start + len {
            let Some(g) = self.layout.group_within(b) else { continue };
            let i = b - self.layout.group_extent(g).start;
            if let Some(w) = self.words_mut(g).get_mut((i / 64) as usize) {
                *w |= 1 << (i % 64);
            }
        }
        true
    }
}
