//! Allocation groups: their headers and bitmaps, and whether the bitmaps say what the trees say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use cluster::LockId;
use journal::block::{BlockError, BlockKind, version};

use super::Notify;
use super::blocks::Blocks;
use super::reader::Reader;
use super::report::{Progress, Report};
use crate::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, MAX_DOMAINS_PER_GROUP, bit, check_age};
use crate::format::layout::{FIRST_SLOT_DOMAIN, ROOT_DOMAIN, VolumeLayout};

/// Groups whose table blocks are read at once.
const BATCH: u32 = 64;
/// Blocks claimed twice that are still looked at one by one; bounds the time that a hostile volume can cost.
const CONFLICT_BUDGET: u64 = 1 << 22;

/// What the trees refer to, and what the groups say.
pub(super) struct Space {
    pub layout: VolumeLayout,
    /// What is referred to.
    pub claims: Blocks,
    headers: BTreeMap<u32, GroupHeader>,
    /// Versions of the headers.
    ages: BTreeMap<u32, u32>,
    /// Domain numbers in use.
    pub domains: BTreeSet<u32>,
    conflicts_left: u64,
}

impl Space {
    pub fn new(layout: VolumeLayout) -> Self {
        Self {
            layout,
            claims: Blocks::new(layout),
            headers: BTreeMap::new(),
            ages: BTreeMap::new(),
            domains: BTreeSet::new(),
            conflicts_left: CONFLICT_BUDGET,
        }
    }

    /// Notes that something refers to blocks. False if that cannot be: they are not in a group, or something else
    /// refers to them too.
    pub fn claim(&mut self, start: u64, len: u64, report: &mut Report, who: &dyn Fn() -> String) -> bool {
        let end = start.checked_add(len);
        let inside = |end: u64| {
            // Between two groups there is what belongs to the second.
            let group = self.layout.group_within(start);
            group.is_some() && group == self.layout.group_within(end.saturating_sub(1))
        };
        let Some(end) = end.filter(|e| len > 0 && inside(*e)) else {
            report.violation(who(), format!("refers to {}, outside the allocation groups", run_text(start, len)));
            return false;
        };
        let mut first_conflict = None;
        let mut conflicts = 0u64;
        let mut at = start;
        while at < end {
            let Some(g) = self.layout.group_within(at) else { break };
            let e = self.layout.group_extent(g);
            let words = self.claims.words_mut(g);
            let to = end.min(e.end());
            while at < to {
                let i = at - e.start;
                let n = (64 - i % 64).min(to - at);
                let mask = (u64::MAX >> (64 - n)) << (i % 64);
                let Some(w) = words.get_mut((i / 64) as usize) else { break };
                if *w & mask != 0 {
                    first_conflict.get_or_insert(at + u64::from((*w & mask).trailing_zeros()) - i % 64);
                    conflicts += u64::from((*w & mask).count_ones());
                }
                *w |= mask;
                at += n;
            }
            if conflicts > self.conflicts_left {
                break;
            }
        }
        self.conflicts_left = self.conflicts_left.saturating_sub(conflicts);
        if let Some(b) = first_conflict {
            report.violation(
                who(),
                format!(
                    "refers to {}, of which {conflicts} (first: block {b}) belong to something else too",
                    run_text(start, len)
                ),
            );
            return false;
        }
        true
    }

    /// Reads every group's header and the domain bitmaps in them.
    pub async fn read_headers(&mut self, r: &Reader, report: &mut Report, tell: Notify<'_>) {
        let mut g = 0;
        while g < self.layout.groups {
            tell(Progress { phase: "groups", done: g.into(), total: self.layout.groups.into() });
            let batch = g..(g + BATCH).min(self.layout.groups);
            g = batch.end;
            let numbers: Vec<u64> = batch.clone().map(|g| self.layout.group_header(g)).collect();
            let blocks = r.many(&numbers).await;
            for g in batch {
                let at = self.layout.group_header(g);
                let place = format!("group {g}, header in block {at}");
                let block = match blocks.get(&at) {
                    Some(Ok(b)) => b,
                    Some(Err(e)) => {
                        report.violation(place, e);
                        continue;
                    }
                    None => continue,
                };
                if let Err(e) = r.verify(at, block, LockId::Group(g), BlockKind::GroupHeader) {
                    report.violation(place, e);
                    continue;
                }
                match GroupHeader::decode(block) {
                    Ok(h) => {
                        self.domain_bits(g, &h, &block[DOMAIN_BITMAP], &place, report);
                        self.headers.insert(g, h);
                        self.ages.insert(g, version(block));
                    }
                    Err(e) => report.violation(place, e),
                }
            }
        }
        for d in
            (ROOT_DOMAIN..FIRST_SLOT_DOMAIN).chain(FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(self.layout.nodes))
        {
            if !self.domains.contains(&d) && self.headers.contains_key(&self.layout.group_of_domain(d)) {
                report.violation(format!("domain {d}"), "is not marked as in use, but always is");
                self.domains.insert(d);
            }
        }
    }

    /// Whether a group's header, if it could be read, is at least of the version that its lock block says.
    pub fn check_age(&self, group: u32, least: u64) -> Result<(), BlockError> {
        self.ages.get(&group).map_or(Ok(()), |found| check_age(*found, least))
    }

    pub fn has_header(&self, group: u32) -> bool {
        self.headers.contains_key(&group)
    }

    fn domain_bits(&mut self, g: u32, h: &GroupHeader, map: &[u8], place: &str, report: &mut Report) {
        let range = self.layout.group_domains(g);
        let mut free = 0;
        for (i, d) in range.enumerate().take(MAX_DOMAINS_PER_GROUP as usize) {
            if bit(map, i) {
                self.domains.insert(d);
            } else {
                free += 1;
            }
        }
        if free != h.free_domains {
            let text = format!("counts {} free domain numbers, its bitmap has {free}", h.free_domains);
            report.violation(place, text);
        }
        // No domain has number 0.
        self.domains.remove(&0);
    }

    /// Reads everything that is referred to, file contents included, and reports what the device cannot give back.
    pub async fn read_claimed(&self, r: &Reader, report: &mut Report, tell: Notify<'_>) {
        let total: u64 = self.claims.groups().flat_map(|(_, w)| w).map(|w| u64::from(w.count_ones())).sum();
        let mut done = 0;
        for (g, words) in self.claims.groups() {
            let start = self.layout.group_extent(g).start;
            let mut runs = Runs::default();
            for (i, w) in words.iter().enumerate() {
                runs.add(start + 64 * i as u64, *w);
            }
            for (first, len) in runs.0 {
                tell(Progress { phase: "contents", done, total });
                done += len;
                r.unreadable(first, len, &mut |block, why| report.violation(format!("block {block}"), why)).await;
            }
        }
    }

    /// Compares every group's bitmap with what was claimed. With `complete` false, parts of trees could not be read, so
    /// blocks that seem to belong to nothing may belong to those.
    pub async fn compare(&self, r: &Reader, complete: bool, report: &mut Report, tell: Notify<'_>) {
        let mut unowned = 0;
        for g in 0..self.layout.groups {
            tell(Progress { phase: "bitmaps", done: g.into(), total: self.layout.groups.into() });
            let Some(h) = self.headers.get(&g).copied() else { continue };
            let extent = self.layout.group_extent(g);
            let claims = self.claims.words(g);
            let indexes = (0..self.layout.bitmap_blocks).filter(|i| h.written_bitmaps & (1u64 << (i % 64)) != 0);
            let numbers: Vec<u64> = indexes.map(|i| self.layout.group_bitmap(g, i)).collect();
            let blocks = r.many(&numbers).await;
            let mut used = 0;
            let mut versions = Vec::new();
            let mut readable = true;
            // Both are runs: of blocks wrongly free, and of blocks wrongly in use.
            let (mut lost, mut leaked) = (Runs::default(), Runs::default());
            for index in 0..self.layout.bitmap_blocks {
                let base = u64::from(index) * BITS_PER_BITMAP;
                if base >= extent.len {
                    break;
                }
                let at = self.layout.group_bitmap(g, index);
                let map = match blocks.get(&at) {
                    None => None,
                    Some(Ok(b)) => match r.verify(at, b, LockId::Group(g), BlockKind::GroupBitmap) {
                        Ok(()) => {
                            versions.push(version(b));
                            b.get(64..)
                        }
                        Err(e) => {
                            report.violation(format!("group {g}, bitmap in block {at}"), e);
                            readable = false;
                            continue;
                        }
                    },
                    Some(Err(e)) => {
                        report.violation(format!("group {g}, bitmap in block {at}"), e);
                        readable = false;
                        continue;
                    }
                };
                for w in 0..BITS_PER_BITMAP / 64 {
                    let first = base + w * 64;
                    if first >= extent.len {
                        break;
                    }
                    let mask = if extent.len - first < 64 { (1 << (extent.len - first)) - 1 } else { u64::MAX };
                    let said = map.map_or(0, |m| word(m, w as usize)) & mask;
                    let is = claims.and_then(|c| c.get((first / 64) as usize)).copied().unwrap_or(0) & mask;
                    used += u64::from(said.count_ones());
                    lost.add(extent.start + first, is & !said);
                    leaked.add(extent.start + first, said & !is);
                }
            }
            for (start, len) in lost.0 {
                report.violation(format!("group {g}"), format!("{} marked as free, but in use", run_text(start, len)));
            }
            for (start, len) in leaked.0 {
                if complete {
                    let text = format!("{} marked as in use, but nothing refers to it", run_text(start, len));
                    report.violation(format!("group {g}"), text);
                } else {
                    unowned += len;
                }
            }
            if let (true, Err(e)) = (readable, h.check_versions(versions.into_iter())) {
                report.violation(format!("group {g}"), e);
            }
            let free = extent.len - used;
            report.blocks_used += used;
            report.blocks_free += free;
            if u64::from(h.blocks) > extent.len {
                let text = format!("its header counts {} blocks, it has {}", h.blocks, extent.len);
                report.violation(format!("group {g}"), text);
                continue;
            }
            // What the group got when the volume grew counts from the header's next change on.
            let counted = h.grown_to(extent.len).free_blocks;
            if readable && free != counted {
                let text = format!("its header counts {counted} free blocks, its bitmaps {free}");
                report.violation(format!("group {g}"), text);
            }
        }
        if unowned > 0 {
            report.note(format!("{unowned} blocks are in use for what could not be read, or for nothing"));
        }
    }
}

fn word(map: &[u8], i: usize) -> u64 {
    let mut w = [0; 8];
    if let Some(b) = map.get(8 * i..8 * i + 8) {
        w.copy_from_slice(b);
    }
    u64::from_le_bytes(w)
}

/// Runs of consecutive blocks, out of words of bits in ascending order.
#[derive(Default)]
struct Runs(Vec<(u64, u64)>);

impl Runs {
    fn add(&mut self, first: u64, mut bits: u64) {
        while bits != 0 {
            let at = bits.trailing_zeros();
            let len = (bits >> at).trailing_ones();
            let (start, len64) = (first + u64::from(at), u64::from(len));
            match self.0.last_mut() {
                Some((s, l)) if *s + *l == start => *l += len64,
                _ => self.0.push((start, len64)),
            }
            bits &= !((u64::MAX >> (64 - len)) << at);
        }
    }
}

pub(super) fn run_text(start: u64, len: u64) -> impl Display {
    match len {
        1 => format!("block {start}"),
        _ => format!("blocks {start} to {}", start.saturating_add(len).saturating_sub(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_across_words() {
        let mut r = Runs::default();
        r.add(0, 0b1011 | 1 << 63);
        r.add(64, 1);
        r.add(128, u64::MAX);
        assert_eq!(r.0, [(0, 2), (3, 1), (63, 2), (128, 64)]);
    }
}
