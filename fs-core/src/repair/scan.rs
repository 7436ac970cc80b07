//! Looks for headers and leaves that nothing leads to any more, in all blocks that are in use and that belong to nothing that could
//! be reached.
//!
//! They name themselves (owner, place, checksum). Of two leaves that speak of the same keys the newer one counts as a whole, so that
//! an item which the newer one lacks does not come back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster::LockId;
use journal::Block;
use journal::block::{self, BlockHeader, BlockKind};

use super::load::{Domain, Loaded, sectors, take_header};
use crate::check::reader::Reader;
use crate::check::{Notify, Progress};
use crate::tree::node::{Node, RawKey, cooked};

/// Blocks read at once.
const SCAN: u64 = 4096;

/// A block that was found.
struct Found {
    version: (u64, u64),
    block: u64,
    image: Arc<Block>,
}

/// Every sound metadata block of a domain that `wanted` says yes to, in blocks that are in use and not reached.
async fn scan(
    r: &Reader,
    v: &Loaded,
    tell: Notify<'_>,
    wanted: &(dyn Fn(u32, BlockKind) -> bool + Sync),
) -> BTreeMap<u32, Vec<Found>> {
    let mut found: BTreeMap<u32, Vec<Found>> = BTreeMap::new();
    let (start, end) = (v.layout.groups_start, v.layout.blocks - 1);
    let mut at = start;
    while at < end {
        tell(Progress { phase: "looking for lost blocks", done: at - start, total: end - start });
        let blocks: Vec<u64> = (at..(at + SCAN).min(end)).filter(|b| v.meta.is_free(*b) && v.said_used(*b)).collect();
        at += SCAN;
        for (number, b) in r.many(&blocks).await {
            let Ok(b) = b else { continue };
            let Ok(h) = BlockHeader::decode(&b) else { continue };
            let LockId::Domain(id) = h.owner else { continue };
            if wanted(id, h.kind) && block::verify(&b, r.volume, number, h.owner).is_ok() {
                found.entry(id).or_default().push(Found { version: (h.tenure, h.record), block: number, image: b });
            }
        }
    }
    // The newest first.
    found.values_mut().for_each(|f| f.sort_by_key(|l| std::cmp::Reverse((l.version, l.block))));
    found
}

/// Whether nothing says where a domain's header is.
pub(super) fn no_header(d: &Domain) -> bool {
    d.header_image.is_none() && d.lock.as_ref().is_none_or(|l| l.value.root == 0)
}

/// Finds the headers of domains whose lock blocks are damaged, and which of the domains in `maybe` are in use.
pub(super) async fn headers(r: &Reader, v: &mut Loaded, maybe: &BTreeSet<u32>, tell: Notify<'_>) {
    let lost: BTreeSet<u32> = v.domains.iter().filter(|(_, d)| no_header(d)).map(|d| *d.0).collect();
    let wanted = |id: u32, kind| kind == BlockKind::DomainHeader && (lost.contains(&id) || maybe.contains(&id));
    for (id, headers) in scan(r, v, tell, &wanted).await {
        let Some(newest) = headers.first() else { continue };
        let Ok(mut sector) = sectors(r, &v.layout, &[LockId::Domain(id)]).await else { continue };
        let d = v.domains.entry(id).or_default();
        d.lock_sector = sector.pop().unwrap_or_default();
        take_header(r, id, d, newest.block, &newest.image, &mut v.meta);
    }
}

/// Finds the leaves of the domains that have gaps, and puts into the gaps what they hold.
pub(super) async fn leaves(r: &Reader, v: &mut Loaded, tell: Notify<'_>) {
    let gapped: BTreeSet<u32> = v.domains.iter().filter(|(_, d)| !d.gaps.is_empty()).map(|d| *d.0).collect();
    let wanted = |id: u32, _| gapped.contains(&id);
    for (id, found) in scan(r, v, tell, &wanted).await {
        let Some(d) = v.domains.get_mut(&id) else { continue };
        // Ranges that a newer leaf speaks of.
        let mut covered: Vec<(RawKey, RawKey)> = Vec::new();
        for leaf in found {
            d.tenure = d.tenure.max(leaf.version.0);
            let is_node = BlockHeader::decode(&leaf.image).is_ok_and(|h| h.kind == BlockKind::TreeNode);
            let Some(n) = Node::open(&leaf.image, 1).ok().filter(|n| is_node && n.check().is_ok()) else { continue };
            let Ok(bodies) = (0..n.count()).map(|i| Ok((n.key(i)?, n.value(i)?))).collect::<Result<Vec<_>, String>>()
            else {
                continue;
            };
            for (key, value) in &bodies {
                if d.in_gap(&cooked(key)) && !covered.iter().any(|(a, b)| a <= key && key <= b) {
                    d.items.entry(cooked(key)).or_insert_with(|| value.to_vec());
                }
            }
            if let (Some(a), Some(b)) = (bodies.first(), bodies.last()) {
                covered.push((a.0, b.0));
            }
        }
    }
}
