//! The superblock, the slots, and the lock blocks.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockdev::{BlockDevice, DevError, IoClass};
use cluster::{LockBlock, LockId, NodeId, Slot, SlotBlock, SlotState};

use super::reader::Reader;
use super::report::{Progress, Report};
use super::space::Space;
use super::{CheckError, Notify, lock_text};
use crate::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, NEAR_COPY, NO_DOMAIN, VolumeLayout};
use crate::format::superblock::{Superblock, SuperblockError, newest_copy};

/// Blocks of lock blocks in memory at once: 16 MiB.
const LOCK_BLOCKS: usize = 4096;

/// Reads the superblock, or the newer of its copies if it cannot be used, and compares them.
pub(super) async fn superblock(dev: &Arc<dyn BlockDevice>, report: &mut Report) -> Result<Superblock, CheckError> {
    let size = dev.geometry().size;
    if size <= NEAR_COPY * BLOCK {
        return Err(CheckError::TooSmall { size });
    }
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let sb = match Superblock::decode(&first) {
        Ok(sb) => sb,
        // Not ours to guess about.
        Err(e @ (SuperblockError::Newer { .. } | SuperblockError::Older { .. })) => return Err(e.into()),
        Err(e) => {
            let Some((at, sb)) = newest_copy(dev.as_ref()).await else { return Err(no_superblock(dev, e).await) };
            let e = e.to_string();
            let e = e.trim_end_matches(super::ADVICE);
            report.violation("superblock, block 0", format!("{e}; its copy in block {at} is used"));
            return Ok(sb);
        }
    };
    for at in sb.layout().superblock_copies().into_iter().filter(|at| *at < size / BLOCK) {
        let place = format!("copy of the superblock, block {at}");
        match dev.read(IoClass::Meta, at * BLOCK, BLOCK as usize).await {
            Ok(copy) => match Superblock::decode(&copy) {
                Ok(c) if c == sb => {}
                Ok(c) if c.uuid == sb.uuid && c.generation > sb.generation => report.note(format!(
                    "{place}: speaks of {} blocks: the volume was to grow, and that was cut off; it has {} blocks, and `clusterfs grow` can be run again",
                    c.blocks, sb.blocks
                )),
                Ok(_) => report.violation(place, "differs from the superblock"),
                Err(SuperblockError::Absent) => report.violation(place, "is not there"),
                Err(e) => report.violation(place, e),
            },
            Err(e) => report.violation(place, e),
        }
    }
    Ok(sb)
}

/// The error when neither the superblock nor a copy can be used.
async fn no_superblock(dev: &Arc<dyn BlockDevice>, first: SuperblockError) -> CheckError {
    let SuperblockError::Damaged(why) = &first else { return first.into() };
    let copy = dev.read(IoClass::Meta, NEAR_COPY * BLOCK, BLOCK as usize).await;
    match copy.map(|c| Superblock::decode(&c)) {
        Ok(Err(SuperblockError::Damaged(copy_why))) => {
            CheckError::NoSuperblock { why: why.clone(), copy: NEAR_COPY, copy_why }
        }
        Err(e) => CheckError::NoSuperblock { why: why.clone(), copy: NEAR_COPY, copy_why: e.to_string() },
        _ => first.into(),
    }
}

/// What is known of the slots.
pub(super) struct Slots {
    /// Slots whose block is readable.
    pub blocks: BTreeMap<u16, SlotBlock>,
    /// Nodes that died and were not recovered; of a slot whose block is damaged, the last one that left a trace.
    pub dead: Vec<NodeId>,
}

/// The last node of a slot whose block cannot be read, by the traces that it left; incarnation 0 if none ever did.
async fn last_trace(r: &Reader, sb: &Superblock, slot: Slot) -> Result<NodeId, DevError> {
    let layout = sb.layout();
    let seen = cluster::traces(r.dev.as_ref(), &layout.cluster(), slot).await?;
    let opened = journal::last_opened_by(&r.dev, layout.journal(slot)).await.unwrap_or(0);
    Ok(NodeId { slot, incarnation: seen.max(opened) })
}

fn mounted(slot: Slot, block: Option<&SlotBlock>) -> CheckError {
    let host = block.map_or("", |b| &b.host_name);
    CheckError::Mounted { slot, host: if host.is_empty() { "a host without a name".into() } else { host.into() } }
}

/// Reads the slot blocks. Refuses a volume that a node has mounted.
pub(super) async fn slots(r: &Reader, sb: &Superblock, report: &mut Report) -> Result<Slots, CheckError> {
    let layout = sb.layout().cluster();
    let watch = sb.timeouts.dead_after();
    let infos = match cluster::read_slots(r.dev.as_ref(), &layout, watch).await {
        Ok(i) => i,
        Err(cluster::ClusterError::Device(e)) => return Err(e.into()),
        Err(e) => {
            report.violation("slot blocks", e);
            Vec::new()
        }
    };
    for at in cluster::damaged_cells(r.dev.as_ref(), &layout).await? {
        report.violation(format!("cell at byte {at}"), "is damaged: nodes cannot take locks by way of it");
    }
    let mut slots = Slots { blocks: BTreeMap::new(), dead: Vec::new() };
    for info in infos {
        if info.alive == Some(true) {
            return Err(mounted(info.slot, info.block.as_ref().ok()));
        }
        let block = match info.block {
            Ok(b) => b,
            Err(e) => {
                let text = match e {
                    cluster::ClusterError::Damaged { what, offset } => format!("{what} at byte {offset} is damaged"),
                    e => e.to_string(),
                };
                report.violation(format!("slot {}", info.slot), text);
                let last = last_trace(r, sb, info.slot).await?;
                report.lost_slots.push(last);
                if last.incarnation > 0 {
                    report.note(format!(
                        "slot {}: its last node was {last}, which is taken for dead: its journal counts",
                        info.slot
                    ));
                    slots.dead.push(last);
                }
                continue;
            }
        };
        if block.state != SlotState::Free {
            let dead = NodeId { slot: block.slot, incarnation: block.incarnation };
            report.note(format!(
                "{dead} on {} ended without unmounting: the volume is checked as it will be once its journal is replayed",
                block.host_name.escape_debug()
            ));
            slots.dead.push(dead);
        }
        slots.blocks.insert(info.slot, block);
    }
    Ok(slots)
}

/// A slot's own domain may never have been used; every other domain in use has a header.
pub(super) fn may_be_empty(layout: &VolumeLayout, domain: u32) -> bool {
    (FIRST_SLOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(layout.nodes)).contains(&domain)
}

/// Reads the lock blocks; returns the domains in use that have a header block, with its number, ascending.
pub(super) async fn locks(
    r: &Reader,
    layout: &VolumeLayout,
    slots: &Slots,
    space: &Space,
    report: &mut Report,
    tell: Notify<'_>,
) -> (Vec<(u32, u64)>, BTreeMap<u32, u64>) {
    let areas = layout.cluster();
    let stride = areas.stride as usize;
    let domains = std::iter::once(NO_DOMAIN).chain(space.domains.iter().copied());
    let wanted: Vec<(LockId, u64)> = (0..layout.groups)
        .map(LockId::Group)
        .chain(domains.map(LockId::Domain))
        .filter_map(|id| Some((id, areas.lock_block(id)?)))
        .collect();
    let (mut headers, mut least_versions) = (Vec::new(), BTreeMap::new());
    let mut done = 0;
    for chunk in wanted.chunks(LOCK_BLOCKS * (BLOCK as usize / stride)) {
        tell(Progress { phase: "locks", done, total: wanted.len() as u64 });
        done += chunk.len() as u64;
        let blocks = r.many(&chunk.iter().map(|(_, at)| at / BLOCK).collect::<Vec<_>>()).await;
        for (id, at) in chunk.iter().copied() {
            let place = lock_text(id, at);
            let from = (at % BLOCK) as usize;
            let sector = match blocks.get(&(at / BLOCK)) {
                Some(Ok(b)) => b.get(from..from + stride).unwrap_or(&[]),
                Some(Err(e)) => {
                    report.violation(place, e);
                    continue;
                }
                None => continue,
            };
            // The lock block of a domain is set up when it is first used.
            let optional = matches!(id, LockId::Domain(d) if may_be_empty(layout, d));
            if optional && sector.iter().all(|b| *b == 0) {
                continue;
            }
            let block = match LockBlock::decode(sector, areas.volume, id) {
                Ok(b) => b,
                Err(e) => {
                    report.violation(place, e);
                    continue;
                }
            };
            holders(&block, slots, layout.nodes, &place, report);
            match id {
                LockId::Group(g) => {
                    if let Err(e) = space.check_age(g, block.value.version) {
                        report.violation(format!("group {g}"), format!("its header: {e}"));
                    }
                }
                LockId::Domain(NO_DOMAIN) => {}
                LockId::Domain(d) => match block.value.root {
                    0 if may_be_empty(layout, d) => {}
                    0 => report.violation(place, "the domain is in use, but has no header block"),
                    root => {
                        headers.push((d, root));
                        if block.value.version > 0 {
                            least_versions.insert(d, block.value.version);
                        }
                    }
                },
            }
        }
    }
    (headers, least_versions)
}

/// Nobody can hold a lock in a life that its slot has not had.
fn holders(block: &LockBlock, slots: &Slots, nodes: u16, place: &str, report: &mut Report) {
    for (slot, e) in &block.entries {
        if *slot >= nodes {
            report.violation(place, format!("names slot {slot}: the volume has {nodes}"));
            continue;
        }
        let Some(s) = slots.blocks.get(slot) else { continue };
        let latest = match s.state {
            SlotState::Adopting { next } => next,
            _ => s.incarnation,
        };
        if e.incarnation > latest {
            let text = format!("names node {slot}.{}: that slot has only had {latest} lives", e.incarnation);
            report.violation(place, text);
        }
    }
}
