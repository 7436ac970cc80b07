//! Checks a volume that no node has mounted: everything that an offline volume can show. Nothing is written.
//!
//! What is checked, in this order:
//! - the superblock and its copy; slot blocks; that no node lives; journals, whose replay is done in memory if a
//!   node died, so that the rest is seen as the next mount will see it;
//! - headers and domain bitmaps of the allocation groups; lock blocks of all groups and of all domains in use;
//! - every domain's header and tree: checksums, owners, order and bounds of keys, counts;
//! - every item: inodes, contents, extended attributes, names, orphans, deferred frees;
//! - links: names against inodes, across domains; that every directory hangs from the root, once;
//! - space: every block is referred to once, and the bitmaps say so.
//!
//! Memory: one bit per block of the groups in use, the inodes and names of [`trees::DOMAINS`] domains, and of all
//! domains only the names whose inodes are elsewhere and the directories. A volume can be any garbage: sizes are taken from
//! what was verified and from the device, work is bounded by the number of blocks.

pub(crate) mod blocks;
mod domain;
mod journals;
pub(crate) mod links;
mod members;
pub(crate) mod reader;
mod report;
mod space;
#[cfg(test)]
mod tests;
mod trees;

use std::collections::BTreeSet;
use std::sync::Arc;

use blockdev::{BlockDevice, DevError};
use cluster::{LockId, Slot};

pub use report::{MAX_VIOLATIONS, Progress, Report, Violation};

use crate::format::layout::VolumeLayout;
use crate::format::superblock::{RO_COMPAT_KNOWN, SuperblockError};
use blocks::Blocks;
use domain::Shared;
pub(crate) use domain::inode_text;
use links::Links;
use reader::Reader;
pub(crate) use report::{ADVICE, name_text};
use space::Space;

/// Why a volume could not be checked at all.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Device(#[from] DevError),
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(
        "the superblock is damaged ({why}), and its copy in block {copy} too ({copy_why}): without one of them nothing can be found"
    )]
    NoSuperblock { why: String, copy: u64, copy_why: String },
    #[error(
        "the volume has features that this clusterfs does not know ({features:#x}) and may only be read: upgrade this host's clusterfs"
    )]
    ReadOnlyFeatures { features: u64 },
    #[error("the device has {size} bytes: too small for a volume")]
    TooSmall { size: u64 },
    #[error("the volume is mounted by {host} (slot {slot}): unmount it there first")]
    Mounted { slot: Slot, host: String },
}

/// How to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Read also the contents of all files, to find sectors that the device cannot give back.
    pub read_contents: bool,
}

/// Called now and then with what the check is doing.
pub type Notify<'a> = &'a (dyn Fn(Progress) + Sync);

/// Checks a volume. `Ok` with violations means that it is damaged, `Err` that it could not be checked.
pub async fn check(dev: &Arc<dyn BlockDevice>, progress: Option<Notify<'_>>) -> Result<Report, CheckError> {
    check_with(dev, Options::default(), progress).await
}

/// As [`check`], with options.
pub async fn check_with(
    dev: &Arc<dyn BlockDevice>,
    options: Options,
    progress: Option<Notify<'_>>,
) -> Result<Report, CheckError> {
    let tell: Notify<'_> = progress.unwrap_or(&|_| ());
    let mut report = Report::default();
    let sb = members::superblock(dev, &mut report).await?;
    report.label = sb.label.clone();
    let unknown = sb.ro_compat & !RO_COMPAT_KNOWN;
    if unknown != 0 {
        report.note(format!("features that this clusterfs does not know ({unknown:#x}) are not checked"));
        report.read_only_features = unknown;
    }
    let layout = sb.layout();
    if dev.geometry().size / crate::format::layout::BLOCK < sb.blocks {
        report.violation(
            "device",
            format!(
                "has {} bytes, the volume needs {} blocks of 4096: it was truncated",
                dev.geometry().size,
                sb.blocks
            ),
        );
        report.note("nothing else was checked");
        report.truncated = true;
        return Ok(report);
    }
    let mut reader = Reader {
        dev: dev.clone(),
        volume: layout.volume,
        blocks: layout.blocks,
        replayed: Default::default(),
        least_versions: Default::default(),
    };
    let slots = members::slots(&reader, &sb, &mut report).await?;

    report.dead = slots.dead.clone();
    report.replayable = journals::read(&mut reader, &layout, &slots, &mut report, tell).await;
    if !report.replayable {
        report.note("what that journal holds is not seen: other violations may come from that");
    }
    let mut space = Space::new(layout);
    space.read_headers(&reader, &mut report, tell).await;
    let mut links = Links::default();
    for g in (0..layout.groups).filter(|g| !space.has_header(*g)) {
        report.note(format!("domains of group {g} are not checked"));
        links.broken.extend(layout.group_domains(g));
    }
    let (headers, least) = members::locks(&reader, &layout, &slots, &space, &mut report, tell).await;
    reader.least_versions = least;
    for d in &space.domains {
        if headers.binary_search_by_key(d, |h| h.0).is_err() && !members::may_be_empty(&layout, *d) {
            links.broken.insert(*d);
        }
    }
    let mut shared = Shared { space: &mut space, links: &mut links, report: &mut report };
    domains(&reader, &headers, layout.nodes, &mut shared, tell).await;
    tell(Progress { phase: "links", done: 0, total: 1 });
    let complete = links.broken.is_empty();
    links.finish(&reader, &headers, &mut report).await;
    if options.read_contents {
        space.read_claimed(&reader, &mut report, tell).await;
    }
    space.compare(&reader, complete, &mut report, tell).await;
    if report.orphans > 0 {
        report.note(format!("{} unlinked files wait to be freed", report.orphans));
    }
    Ok(report)
}

async fn domains(r: &Reader, headers: &[(u32, u64)], nodes: u16, s: &mut Shared<'_>, tell: Notify<'_>) {
    let mut done = 0;
    for chunk in headers.chunks(trees::DOMAINS) {
        tell(Progress { phase: "domains", done, total: headers.len() as u64 });
        trees::check(r, chunk, nodes, s).await;
        done += chunk.len() as u64;
    }
}

/// What domains that are whole refer to, for the repair of others.
pub(crate) struct Survey {
    pub claims: Blocks,
    pub links: Links,
    /// Those that are not whole.
    pub damaged: BTreeSet<u32>,
}

/// Reads domains, given with their header blocks. With `all`, they are all that the volume has, so names that cross domains are
/// compared too.
pub(crate) async fn survey(
    r: &Reader,
    layout: VolumeLayout,
    headers: &[(u32, u64)],
    all: bool,
    tell: Notify<'_>,
) -> Survey {
    let (mut space, mut links, mut report) = (Space::new(layout), Links::default(), Report::default());
    let mut shared = Shared { space: &mut space, links: &mut links, report: &mut report };
    domains(r, headers, layout.nodes, &mut shared, tell).await;
    report.damaged.append(&mut links.damaged);
    if all {
        std::mem::take(&mut links).finish(r, headers, &mut report).await;
    }
    Survey { claims: space.claims, links, damaged: report.damaged }
}

/// Where a lock's block lies, for messages.
fn lock_text(id: LockId, at: u64) -> String {
    format!("lock block of {id} at byte {at}")
}
