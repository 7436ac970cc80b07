//! Choosing a volume's numbers from the size of the device and the user's wishes.
//!
//! Costs, for an ordinary device of 10 TB with 512-byte sectors: 2500 groups of 4 GiB whose headers are what mkfs writes
//! (10 MB), 33 blocks of group table per group (0.003 %), 2^24 lock blocks (8 GiB, 0.1 %; not written), journals 512 MiB.

use cluster::MAX_NODES;
use fs_core::format::group::{BITS_PER_BITMAP, MAX_DOMAINS_PER_GROUP};
use fs_core::format::layout::{BLOCK, FIRST_SLOT_DOMAIN};
use fs_core::format::superblock::{PLAIN_LOCKS, Superblock};

use crate::size::Bytes;
use crate::{FormatOptions, Locks};

pub const DEFAULT_NODES: u16 = 8;
pub const MIN_JOURNAL: u64 = 1 << 20;
pub const MAX_JOURNAL: u64 = 4 << 30;
/// Default journals are no larger than this.
const LARGE_JOURNAL: u64 = 64 << 20;
/// The smallest and the largest group aimed at, in blocks: 8 MiB and 4 GiB.
const GROUP_BLOCKS: (u64, u64) = (2048, 1 << 20);
/// A volume of more blocks than this (256 TiB) gets groups of 8 GiB, so that every group has domain numbers enough.
const HUGE: u64 = 1 << 36;
/// Largest volume in blocks: 1 PiB.
const MAX_BLOCKS: u64 = 1 << 38;
/// Groups aimed at where their size is between the smallest and the largest.
const WANTED_GROUPS: u64 = 64;
/// A shorter last group is not worth its header.
const SHORTEST_GROUP: u64 = 64;
/// One domain number per this many bytes: few trees of mailboxes have less per directory.
const BYTES_PER_DOMAIN: u64 = 256 << 10;
const DOMAINS: (u64, u64) = (1024, 1 << 24);
/// Domain numbers that every group has beyond the fixed ones of group 0.
const SPARE_DOMAINS: u64 = 16;
/// Blocks that must be left for files in the smallest volume: 4 MiB.
const MIN_FREE: u64 = 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    #[error(
        "the device has {}, {nodes} nodes with journals of {} need at least {}{hint}",
        Bytes(*size), Bytes(*journal), Bytes(*needed)
    )]
    TooSmall { size: u64, nodes: u16, journal: u64, needed: u64, hint: String },
    #[error("a volume has 1 to {MAX_NODES} nodes, not {0}")]
    Nodes(u16),
    #[error("a journal has {} to {}, not {}", Bytes(MIN_JOURNAL), Bytes(MAX_JOURNAL), Bytes(*.0))]
    Journal(u64),
    #[error("the label has {0} bytes, at most 64 are possible, none of them zero")]
    Label(usize),
    #[error("sectors of {0} bytes are not supported, only of 512 or 4096")]
    Sector(u32),
    #[error("the device is larger than the largest volume ({})", Bytes(MAX_BLOCKS * BLOCK))]
    TooLarge,
}

/// The superblock of a new volume on a device of `size` bytes.
pub fn superblock(size: u64, sector_size: u32, opts: &FormatOptions) -> Result<Superblock, GeometryError> {
    let nodes = opts.nodes.unwrap_or(DEFAULT_NODES);
    if !(1..=MAX_NODES as u16).contains(&nodes) {
        return Err(GeometryError::Nodes(nodes));
    }
    if let Some(j) = opts.journal_size.filter(|j| !(MIN_JOURNAL..=MAX_JOURNAL).contains(j)) {
        return Err(GeometryError::Journal(j));
    }
    if opts.label.len() > 64 || opts.label.contains('\0') {
        return Err(GeometryError::Label(opts.label.len()));
    }
    if !matches!(sector_size, 512 | 4096) {
        return Err(GeometryError::Sector(sector_size));
    }
    if size / BLOCK > MAX_BLOCKS {
        return Err(GeometryError::TooLarge);
    }
    let blank = blank(sector_size, opts);
    if let Some(sb) = fit(&blank, size / BLOCK, nodes, opts.journal_size) {
        return Ok(sb);
    }
    Err(too_small(&blank, size, nodes, opts.journal_size))
}

/// What does not depend on the size.
fn blank(sector_size: u32, opts: &FormatOptions) -> Superblock {
    let (mut uuid, mut hint_key) = ([0; 16], [0; 32]);
    uuid.copy_from_slice(&opts.random[..16]);
    hint_key.copy_from_slice(&opts.random[16..]);
    // RFC 9562: version 4, variant 1.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Superblock {
        compat: 0,
        incompat: if opts.locks == Locks::Plain { PLAIN_LOCKS } else { 0 },
        ro_compat: 0,
        uuid: opts.uuid.unwrap_or(uuid),
        label: opts.label.clone(),
        blocks: 0,
        sector_size,
        nodes: 0,
        bitmap_blocks: 0,
        journal_blocks: 0,
        groups: 0,
        domains: 0,
        group_blocks: 0,
        timeouts: opts.timeouts,
        hint_key,
        created: u64::try_from(opts.now.secs).unwrap_or(0),
    }
}

/// The numbers for a device of `blocks`; `None` if it is too small.
fn fit(blank: &Superblock, blocks: u64, nodes: u16, journal: Option<u64>) -> Option<Superblock> {
    let journal = journal.unwrap_or_else(|| {
        (blocks / (u64::from(nodes) * 32)).clamp(MIN_JOURNAL / BLOCK, LARGE_JOURNAL / BLOCK) * BLOCK
    });
    let most = if blocks > HUGE { 2 * GROUP_BLOCKS.1 } else { GROUP_BLOCKS.1 };
    let wanted = (blocks / WANTED_GROUPS).clamp(GROUP_BLOCKS.0, most);
    // Either one bitmap, perhaps not full, or full bitmaps only.
    let bitmap_blocks = (wanted / BITS_PER_BITMAP).clamp(1, 64);
    let group_blocks = wanted.min(bitmap_blocks * BITS_PER_BITMAP);
    let most_groups = blocks.div_ceil(group_blocks);
    let per_group = u64::from(FIRST_SLOT_DOMAIN) + u64::from(nodes) + SPARE_DOMAINS;
    let domains = (blocks / (BYTES_PER_DOMAIN / BLOCK))
        .clamp(DOMAINS.0, DOMAINS.1)
        .max(u64::from(nodes) + 64)
        .max((most_groups * per_group).min(DOMAINS.1));
    let mut sb = Superblock {
        blocks,
        nodes,
        bitmap_blocks: u16::try_from(bitmap_blocks).ok()?,
        journal_blocks: journal / BLOCK,
        domains: u32::try_from(domains).ok()?,
        group_blocks: u32::try_from(group_blocks).ok()?,
        ..blank.clone()
    };
    // Groups that the room behind the group table would take, when the table is made for `groups` of them. It shrinks as
    // `groups` grows: wanted is the largest number that the room still supports.
    let supports = |groups: u64, sb: &mut Superblock| -> Option<bool> {
        sb.groups = u32::try_from(groups).ok()?;
        let room = (blocks - 1).saturating_sub(sb.layout().groups_start);
        Some((groups - 1) * group_blocks + SHORTEST_GROUP <= room)
    };
    let (mut low, mut high) = (0, most_groups);
    while low < high {
        let mid = (low + high).div_ceil(2);
        if supports(mid, &mut sb)? { low = mid } else { high = mid - 1 }
    }
    if low == 0 {
        return None;
    }
    sb.groups = u32::try_from(low).ok()?;
    let l = sb.layout();
    let share = u64::from(l.domains_per_group());
    let metadata = u64::from(nodes) + 2;
    let enough = l.group_extent(0).len >= MIN_FREE.min(group_blocks) + metadata
        && blocks - 1 - l.groups_start >= MIN_FREE + metadata
        && share <= u64::from(MAX_DOMAINS_PER_GROUP)
        && share >= u64::from(FIRST_SLOT_DOMAIN) + u64::from(nodes);
    enough.then_some(sb)
}

/// The error for a device that is too small, with what would do.
fn too_small(blank: &Superblock, size: u64, nodes: u16, journal: Option<u64>) -> GeometryError {
    let (mut low, mut high) = (size / BLOCK, (1 << 30) + u64::from(nodes) * journal.unwrap_or(MIN_JOURNAL) / BLOCK);
    while low + 1 < high {
        let mid = low + (high - low) / 2;
        if fit(blank, mid, nodes, journal).is_some() { high = mid } else { low = mid }
    }
    let fewer = (1..nodes).rev().find(|n| fit(blank, size / BLOCK, *n, journal).is_some());
    let hint = match (fewer, journal) {
        (Some(n), _) => format!(" (it has room for --nodes {n})"),
        (None, Some(j)) if j > MIN_JOURNAL => " (or make the journals smaller)".to_owned(),
        (None, _) => String::new(),
    };
    let journal = journal.unwrap_or(MIN_JOURNAL);
    GeometryError::TooSmall { size, nodes, journal, needed: high * BLOCK, hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(size: u64, sector: u32, nodes: u16) -> Result<Superblock, GeometryError> {
        superblock(size, sector, &FormatOptions { nodes: Some(nodes), ..FormatOptions::seeded(1) })
    }

    /// A superblock is worth what its own decoder says, which checks every rule.
    fn assert_valid(sb: &Superblock) {
        let mut b = vec![0; 4096];
        sb.encode(&mut b);
        assert_eq!(&Superblock::decode(&b).unwrap(), sb);
        let l = sb.layout();
        assert!(l.domains_per_group() <= MAX_DOMAINS_PER_GROUP, "{sb:?}");
        let fixed = FIRST_SLOT_DOMAIN + u32::from(sb.nodes);
        assert!(l.group_domains(0).end >= fixed, "{sb:?}");
        assert!(l.group_of_domain(sb.domains - 1) < sb.groups, "{sb:?}");
        let last = l.group_extent(sb.groups - 1);
        assert!(last.len >= SHORTEST_GROUP && last.end() < sb.blocks, "{sb:?} {last:?}");
        // Nothing worth mentioning is left over at the end.
        let waste = sb.blocks - 1 - last.end();
        assert!(waste <= SHORTEST_GROUP + 1 + u64::from(sb.bitmap_blocks) + 1, "{waste} blocks wasted: {sb:?}");
    }

    #[test]
    fn every_size_gives_a_valid_volume() {
        let mut size = 14 << 20;
        while size < 1 << 50 {
            for odd in [0, 4096, 12_345 * 4096, 512] {
                for nodes in [1, 8, 64] {
                    for sector in [512, 4096] {
                        match make(size + odd, sector, nodes) {
                            Ok(sb) => assert_valid(&sb),
                            Err(GeometryError::TooSmall { needed, .. }) => {
                                assert!(needed > size + odd && nodes > 1 || sector == 4096, "{size} {nodes} {sector}");
                                assert_valid(&make(needed, sector, nodes).unwrap());
                                assert!(make(needed - 4096, sector, nodes).is_err());
                            }
                            Err(e) => panic!("{size}: {e}"),
                        }
                    }
                }
            }
            size = size * 3 / 2 / 4096 * 4096;
        }
    }

    #[test]
    fn defaults() {
        let gib = superblock(1 << 30, 512, &FormatOptions::seeded(1)).unwrap();
        assert_eq!((gib.nodes, gib.journal_blocks, gib.group_blocks, gib.domains), (8, 1024, 4096, 4096));
        let big = superblock(10 << 40, 512, &FormatOptions::seeded(1)).unwrap();
        assert_eq!((big.journal_blocks, big.bitmap_blocks, big.domains), (16384, 32, 1 << 24));
        assert_eq!(big.group_blocks, 32 * 4032 * 8);
        superblock(16 << 20, 512, &FormatOptions::seeded(1)).expect("16 MiB are enough for 8 nodes");
    }

    #[test]
    fn too_small_says_what_would_do() {
        let e = superblock(8 << 20, 512, &FormatOptions::seeded(1)).unwrap_err();
        let text = e.to_string();
        assert!(text.contains("the device has 8 MiB, 8 nodes with journals of 1 MiB need at least 12."), "{text}");
        assert!(text.contains("--nodes 3"), "{text}");
        make(8 << 20, 512, 3).unwrap();
    }

    #[test]
    fn bad_wishes_are_refused() {
        let base = FormatOptions::seeded(1);
        let with = |o: FormatOptions| superblock(1 << 30, 512, &o).unwrap_err();
        assert_eq!(with(FormatOptions { nodes: Some(0), ..base.clone() }), GeometryError::Nodes(0));
        assert_eq!(with(FormatOptions { nodes: Some(65), ..base.clone() }), GeometryError::Nodes(65));
        assert_eq!(with(FormatOptions { journal_size: Some(4096), ..base.clone() }), GeometryError::Journal(4096));
        assert_eq!(with(FormatOptions { label: "x".repeat(65), ..base.clone() }), GeometryError::Label(65));
        assert_eq!(superblock(1 << 30, 1024, &base).unwrap_err(), GeometryError::Sector(1024));
        assert_eq!(superblock((1 << 50) + 4096, 512, &base).unwrap_err(), GeometryError::TooLarge);
        make(1 << 50, 512, 64).unwrap();
    }
}
