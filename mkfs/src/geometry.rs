//! Choosing a volume's numbers from the size of the device and the user's wishes.
//!
//! Costs, for an ordinary device of 10 TB with 512-byte sectors that may grow to 40 TB: 2500 groups of 4 GiB whose headers are what mkfs
//! writes (10 MB), 33 blocks of header and bitmaps per group (0.003 %) and 1638 lock blocks of its domains (0.02 %; not written), lock blocks of
//! 10,240 groups (5 MiB), journals 512 MiB.

use cluster::MAX_NODES;
use fs_core::format::group::{BITS_PER_BITMAP, MAX_DOMAINS_PER_GROUP};
use fs_core::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, VolumeLayout};
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
/// A volume that may have more blocks than this (256 TiB) gets groups of 8 GiB, so that every group has domain numbers enough.
const HUGE: u64 = 1 << 36;
/// Largest volume in blocks: 1 PiB.
const MAX_BLOCKS: u64 = 1 << 38;
/// Groups aimed at where their size is between the smallest and the largest.
const WANTED_GROUPS: u64 = 64;
/// Groups of a volume that has grown as far as it can, where a small volume is to grow far.
const MOST_OF_SMALL: u64 = 4096;
/// How far a volume can grow if nothing else is wished: 16 times its size up to this many blocks (16 TiB), and at least 4 times.
const FAR: (u64, u64) = (16, 16 << 28);
const NEAR: u64 = 4;
/// What the room for growing may cost at most: this part of the volume.
const ROOM_PART: u64 = 16;
/// One domain number per this many bytes: few trees of mailboxes have less per directory.
const BYTES_PER_DOMAIN: u64 = 256 << 10;
/// At least in a new volume, and at most in the largest that it can become.
const DOMAINS: (u64, u64) = (1024, 1 << 24);
/// Lock blocks of its domains take at most this part of a group.
const LOCKS_PART: u64 = 16;
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
    #[error("the volume shall grow to {} at most, the device has {} already", Bytes(*most), Bytes(*size))]
    MostTooSmall { most: u64, size: u64 },
    #[error("a volume on a device of {} cannot be made to grow to {}: at most {} are possible", Bytes(*size), Bytes(*most), Bytes(*possible))]
    MostTooLarge { most: u64, size: u64, possible: u64 },
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
    let blocks = size / BLOCK;
    if let Some(most) = opts.max_size.filter(|m| m / BLOCK < blocks) {
        return Err(GeometryError::MostTooSmall { most, size });
    }
    let blank = blank(sector_size, opts);
    let wish = Wish { nodes, journal: opts.journal_size, most: opts.max_size.map(|m| m / BLOCK) };
    if let Some(sb) = fit(&blank, blocks, wish) {
        return Ok(sb);
    }
    if let Some(most) = opts.max_size
        && fit(&blank, blocks, Wish { most: Some(blocks), ..wish }).is_some()
    {
        let possible = largest(blocks, most / BLOCK, |m| fit(&blank, blocks, Wish { most: Some(m), ..wish }).is_some());
        return Err(GeometryError::MostTooLarge { most, size, possible: possible * BLOCK });
    }
    Err(too_small(&blank, size, Wish { most: None, ..wish }))
}

/// What the user wants of the numbers.
#[derive(Clone, Copy)]
struct Wish {
    nodes: u16,
    /// Bytes.
    journal: Option<u64>,
    /// Blocks to which the volume shall be able to grow.
    most: Option<u64>,
}

/// The largest number from `low` on, which will do, and below `high`, which will not.
fn largest(mut low: u64, mut high: u64, will_do: impl Fn(u64) -> bool) -> u64 {
    while low + 1 < high {
        let mid = low + (high - low) / 2;
        if will_do(mid) { low = mid } else { high = mid }
    }
    low
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
        domains_per_group: 0,
        group_blocks: 0,
        timeouts: opts.timeouts,
        hint_key,
        created: u64::try_from(opts.now.secs).unwrap_or(0),
        generation: 0,
        max_groups: 0,
    }
}

/// The numbers for a device of `blocks`; `None` if it is too small for what is wished.
fn fit(blank: &Superblock, blocks: u64, wish: Wish) -> Option<Superblock> {
    let nodes = u64::from(wish.nodes);
    let journal = wish
        .journal
        .unwrap_or_else(|| (blocks / (nodes * 32)).clamp(MIN_JOURNAL / BLOCK, LARGE_JOURNAL / BLOCK) * BLOCK);
    let far = (blocks * FAR.0).min(FAR.1).max(blocks * NEAR).min(MAX_BLOCKS);
    let most = wish.most.unwrap_or(far);
    if most > MAX_BLOCKS {
        return None;
    }
    let largest_group = if most > HUGE { 2 * GROUP_BLOCKS.1 } else { GROUP_BLOCKS.1 };
    // Large enough that lock blocks and domain numbers suffice for all groups that there may be.
    let wanted = (blocks / WANTED_GROUPS).max(most / MOST_OF_SMALL).clamp(GROUP_BLOCKS.0, largest_group);
    // Either one bitmap, perhaps not full, or full bitmaps only.
    let bitmap_blocks = (wanted / BITS_PER_BITMAP).clamp(1, 64);
    let group_blocks = wanted.min(bitmap_blocks * BITS_PER_BITMAP);
    let max_groups = most.div_ceil(group_blocks);
    let mut sb = Superblock {
        blocks,
        nodes: wish.nodes,
        bitmap_blocks: u16::try_from(bitmap_blocks).ok()?,
        journal_blocks: journal / BLOCK,
        domains_per_group: domains_per_group(blank, blocks, wish.nodes, group_blocks, max_groups)?,
        group_blocks: u32::try_from(group_blocks).ok()?,
        max_groups: u32::try_from(max_groups).ok()?,
        ..blank.clone()
    };
    let l = sb.layout();
    let room = l.journals_start - l.locks_start;
    let roomy = wish.most.is_none_or(|m| m == blocks) || room <= (blocks / ROOM_PART).max(1);
    sb.groups = l.groups_in(blocks);
    (roomy && sb.groups > 0 && usable(&sb.layout())).then_some(sb)
}

/// Domain numbers of each group, however many groups there are.
fn domains_per_group(blank: &Superblock, blocks: u64, nodes: u16, group_blocks: u64, max_groups: u64) -> Option<u32> {
    let fixed = u64::from(FIRST_SLOT_DOMAIN) + u64::from(nodes) + SPARE_DOMAINS;
    let groups = (blocks / group_blocks).max(1);
    let by_size = (group_blocks * BLOCK / BYTES_PER_DOMAIN).max(DOMAINS.0.div_ceil(groups));
    let locks = group_blocks * BLOCK / LOCKS_PART / u64::from(blank.sector_size);
    let most = (DOMAINS.1 / max_groups).min(MAX_DOMAINS_PER_GROUP.into());
    let number = by_size.min(locks).max(fixed).min(most);
    u32::try_from(number).ok().filter(|_| number >= fixed)
}

/// Whether there is something left for files.
fn usable(l: &VolumeLayout) -> bool {
    let metadata = u64::from(l.nodes) + 2;
    let first = l.group_extent(0).len;
    let all: u64 = (0..l.groups.min(2)).map(|g| l.group_extent(g).len).sum();
    first >= MIN_FREE.min(l.group_blocks.into()) + metadata && all >= MIN_FREE + metadata
}

/// The error for a device that is too small, with what would do.
fn too_small(blank: &Superblock, size: u64, wish: Wish) -> GeometryError {
    let Wish { nodes, journal, .. } = wish;
    let enough = (1 << 30) + u64::from(nodes) * journal.unwrap_or(MIN_JOURNAL) / BLOCK;
    let needed = largest(size / BLOCK, enough, |blocks| fit(blank, blocks, wish).is_none()) + 1;
    let fewer = (1..nodes).rev().find(|n| fit(blank, size / BLOCK, Wish { nodes: *n, ..wish }).is_some());
    let hint = match (fewer, journal) {
        (Some(n), _) => format!(" (it has room for --nodes {n})"),
        (None, Some(j)) if j > MIN_JOURNAL => " (or make the journals smaller)".to_owned(),
        (None, _) => String::new(),
    };
    let journal = journal.unwrap_or(MIN_JOURNAL);
    GeometryError::TooSmall { size, nodes, journal, needed: needed * BLOCK, hint }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::format::layout::SHORTEST_GROUP;

    fn make(size: u64, sector: u32, nodes: u16) -> Result<Superblock, GeometryError> {
        superblock(size, sector, &FormatOptions { nodes: Some(nodes), ..FormatOptions::seeded(1) })
    }

    /// A superblock is worth what its own decoder says, which checks every rule.
    fn assert_valid(sb: &Superblock) {
        let mut b = vec![0; 4096];
        sb.encode(&mut b);
        assert_eq!(&Superblock::decode(&b).unwrap(), sb);
        let l = sb.layout();
        let fixed = FIRST_SLOT_DOMAIN + u32::from(sb.nodes);
        assert!(l.group_domains(0).end > fixed, "{sb:?}");
        assert_eq!(l.group_of_domain(l.domains() - 1), sb.groups - 1, "{sb:?}");
        let last = l.group_extent(sb.groups - 1);
        assert!(last.len >= SHORTEST_GROUP && last.end() < sb.blocks, "{sb:?} {last:?}");
        // Nothing worth mentioning is left over at the end.
        let waste = sb.blocks - 1 - last.end();
        assert!(waste <= SHORTEST_GROUP + l.group_meta(), "{waste} blocks wasted: {sb:?}");
        assert!(l.max_blocks() >= (sb.blocks * NEAR).min(MAX_BLOCKS), "{sb:?}");
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
        assert_eq!((gib.nodes, gib.journal_blocks, gib.group_blocks, gib.domains_per_group), (8, 1024, 4096, 64));
        assert_eq!(gib.max_groups, 16 * 64);
        let big = superblock(10 << 40, 512, &FormatOptions::seeded(1)).unwrap();
        assert_eq!((big.journal_blocks, big.bitmap_blocks), (16384, 32));
        assert!((1500..1700).contains(&big.domains_per_group) && big.layout().max_blocks() >= 40 << 28, "{big:?}");
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
    fn room_for_growing_is_as_wished() {
        let with = |size: u64, most: u64| {
            superblock(size, 512, &FormatOptions { max_size: Some(most), ..FormatOptions::seeded(1) })
        };
        for (size, most) in [(64 << 20, 64 << 20), (64 << 20, 1 << 40), (1 << 30, 100 << 40), (10 << 40, 1 << 50)] {
            let sb = with(size, most).unwrap();
            assert!(sb.layout().max_blocks() * BLOCK >= most, "{sb:?}");
            let lent = sb.layout().journals_start - sb.layout().locks_start;
            assert!(lent <= sb.blocks / ROOM_PART, "{lent} blocks of {sb:?}");
        }
        assert_eq!(with(1 << 30, 1 << 29), Err(GeometryError::MostTooSmall { most: 1 << 29, size: 1 << 30 }));
        let Err(GeometryError::MostTooLarge { possible, .. }) = with(16 << 20, 1 << 50) else { panic!("not refused") };
        with(16 << 20, possible).unwrap();
        assert!(with(16 << 20, possible + BLOCK).is_err());
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
