//! A new volume read back with the code that mounts use, refusals, and interrupted runs.

use std::time::{Duration, Instant};

use blockdev::image::{ImageFile, OpenMode};
use blockdev::sim::{OpKind, SimConfig, SimDisk};
use cluster::{LockBlock, LockId, SlotBlock, SlotState};
use fs_core::format::domain::DomainHeader;
use fs_core::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, bit};
use fs_core::format::item::{DIR_LOCAL, Inode, Key, Kind};
use fs_core::format::layout::{BLOCK, FIRST_SLOT_DOMAIN, NO_DOMAIN, ROOT_DOMAIN, VolumeLayout};
use fs_core::format::superblock::SuperblockError;
use journal::block::{BlockKind, verify};

use super::*;

fn silent(_: Progress) {}

async fn make(dev: &Arc<dyn BlockDevice>, opts: &FormatOptions) -> Result<Made, MkfsError> {
    format(dev, opts, &mut silent).await
}

async fn sim_volume(size: u64, sector_size: u32, opts: &FormatOptions) -> (Arc<dyn BlockDevice>, Made) {
    let disk = SimDisk::new(SimConfig { sector_size, ..SimConfig::new(size, 1) });
    let dev: Arc<dyn BlockDevice> = disk.open_raw();
    let made = make(&dev, opts).await.unwrap();
    (dev, made)
}

async fn block(dev: &Arc<dyn BlockDevice>, l: &VolumeLayout, number: u64, owner: LockId, kind: BlockKind) -> Vec<u8> {
    let b = dev.read(IoClass::Meta, number * BLOCK, 4096).await.unwrap();
    let h = verify(&b, l.volume, number, owner).unwrap_or_else(|e| panic!("block {number}: {e}"));
    assert_eq!(h.kind, kind);
    assert_eq!((h.tenure, h.record), (0, 0));
    b.to_vec()
}

/// Everything a mount will look at is there and agrees, and fsck finds nothing.
async fn assert_whole(dev: &Arc<dyn BlockDevice>, made: &Made) {
    let report = fs_core::check::check(dev, None).await.unwrap();
    assert!(report.is_clean() && report.notes.is_empty(), "{report:?}");
    assert_eq!((report.dirs, report.files), (1, 0));
    let sb = &made.superblock;
    let l = sb.layout();
    for place in std::iter::once(0).chain(l.superblock_copies()) {
        let b = dev.read(IoClass::Meta, place * BLOCK, 4096).await.unwrap();
        assert_eq!(&Superblock::decode(&b).unwrap(), sb);
    }
    let c = l.cluster();
    for slot in 0..l.nodes {
        let b = dev.read(IoClass::Lock, c.slot_block(slot), c.stride as usize).await.unwrap();
        let s = SlotBlock::decode(&b, l.volume, slot).unwrap();
        assert_eq!((s.state, s.incarnation), (SlotState::Free, 0));
        let row =
            dev.read(IoClass::Lock, c.doorbell_row(slot), c.stride as usize * usize::from(l.nodes)).await.unwrap();
        assert!(row.iter().all(|b| *b == 0));
    }
    let lock = async |id| {
        let b = dev.read(IoClass::Lock, c.lock_block(id).unwrap(), c.stride as usize).await.unwrap();
        LockBlock::decode(&b, l.volume, id).unwrap_or_else(|e| panic!("{id}: {e}"))
    };
    let mut free = 0;
    let mut free_domains = 0;
    let mut used = Vec::new();
    for g in 0..l.groups {
        let b = block(dev, &l, l.group_header(g), LockId::Group(g), BlockKind::GroupHeader).await;
        let h = GroupHeader::decode(&b).unwrap();
        let extent = l.group_extent(g);
        let mut counted = extent.len;
        for i in 0..l.bitmap_blocks {
            if h.written_bitmaps & 1 << i == 0 {
                continue;
            }
            let map = block(dev, &l, l.group_bitmap(g, i), LockId::Group(g), BlockKind::GroupBitmap).await;
            for n in (0..BITS_PER_BITMAP).filter(|n| bit(&map[64..], *n as usize)) {
                used.push(extent.start + u64::from(i) * BITS_PER_BITMAP + n);
                counted -= 1;
            }
        }
        assert_eq!(h.free_blocks, counted, "group {g}");
        assert_eq!(u64::from(h.blocks), extent.len);
        let value = lock(LockId::Group(g)).await.value;
        assert_eq!((value.root, value.next_local), (counted, extent.len));
        let numbers = l.group_domains(g);
        for i in 0..4000 * 8 {
            let d = numbers.start + i;
            let fixed = d < FIRST_SLOT_DOMAIN + u32::from(l.nodes);
            assert_eq!(bit(&b[DOMAIN_BITMAP], i as usize), fixed || d >= numbers.end, "domain {d}");
        }
        let fixed = (FIRST_SLOT_DOMAIN + u32::from(l.nodes)).saturating_sub(numbers.start);
        assert_eq!(h.free_domains, (numbers.end - numbers.start).saturating_sub(fixed));
        free_domains += h.free_domains;
        free += h.free_blocks;
    }
    assert_eq!(free, made.free_blocks);
    assert_eq!(free_domains, l.domains() - FIRST_SLOT_DOMAIN - u32::from(l.nodes));
    assert_eq!(lock(LockId::Domain(NO_DOMAIN)).await.value.root, 0);
    let mut seen = Vec::new();
    for d in ROOT_DOMAIN..FIRST_SLOT_DOMAIN + u32::from(l.nodes) {
        let number = lock(LockId::Domain(d)).await.value.root;
        seen.push(number);
        let b = block(dev, &l, number, LockId::Domain(d), BlockKind::DomainHeader).await;
        let h = DomainHeader::decode(&b).unwrap();
        if d == ROOT_DOMAIN {
            assert_eq!((h.inodes, h.next_local, h.nodes, h.levels), (1, 2, 1, 1));
            seen.push(h.root);
            assert_root_directory(dev, &l, h.root).await;
        } else {
            assert_eq!(h, DomainHeader { next_local: 1, ..DomainHeader::default() });
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, used, "the bitmap has the domains' blocks and no others");
}

async fn assert_root_directory(dev: &Arc<dyn BlockDevice>, l: &VolumeLayout, leaf: u64) {
    let b = dev.read(IoClass::Meta, leaf * BLOCK, 4096).await.unwrap();
    fs_core::tree::check_node(&b, 1).unwrap();
    let b = block(dev, l, leaf, LockId::Domain(ROOT_DOMAIN), BlockKind::TreeNode).await;
    // One item: slot, then its body (key, length, value) at the end of the block.
    let body = &b[4096 - 17 - 2 - 112..];
    assert_eq!(Key::decode(body), Some(Key::new(DIR_LOCAL, Kind::Inode, 0)));
    let inode = Inode::decode(&body[19..]).unwrap();
    assert_eq!((inode.mode, inode.links, inode.size, inode.subdirs), (0o040755, 2, 0, 0));
    assert_eq!(inode.parent, fs_core::ROOT_INO);
    assert_eq!(inode.mtime.secs, 1_700_000_000);
}

#[tokio::test(start_paused = true)]
async fn a_new_volume_is_whole() {
    for (size, sector, nodes) in [(16 << 20, 512, 8), (100 << 20, 4096, 3), (600 << 20, 512, 64), (6 << 20, 512, 1)] {
        let opts = FormatOptions { nodes: Some(nodes), label: "Poststelle".into(), ..FormatOptions::seeded(7) };
        let (dev, made) = sim_volume(size, sector, &opts).await;
        assert_whole(&dev, &made).await;
        assert_eq!((made.superblock.label.as_str(), made.superblock.nodes), ("Poststelle", nodes));
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_there_is_refused_and_with_force_wiped() {
    let disk = SimDisk::new(SimConfig::new(64 << 20, 1));
    let dev: Arc<dyn BlockDevice> = disk.open_raw();
    disk.write_raw(0x10000, &{
        let mut b = vec![0; 512];
        b[0x40..0x48].copy_from_slice(b"_BHRfS_M");
        b
    });
    let before = disk.read_raw(0, 64 << 20);
    let opts = FormatOptions::seeded(1);
    match make(&dev, &opts).await {
        Err(MkfsError::Occupied(what)) => assert_eq!(what, ["a btrfs filesystem"]),
        other => panic!("{other:?}"),
    }
    assert!(disk.read_raw(0, 64 << 20) == before, "a refusal writes nothing");
    let made = make(&dev, &FormatOptions { force: true, ..opts.clone() }).await.unwrap();
    assert_whole(&dev, &made).await;
    let found = signature::probe(dev.as_ref()).await.unwrap();
    assert!(found.iter().all(|f| f.name == "a clusterfs volume"), "{found:?}");
    // Now it is a volume itself.
    match make(&dev, &opts).await {
        Err(e @ MkfsError::Occupied(_)) => assert!(e.to_string().contains("a clusterfs volume"), "{e}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn live_nodes_are_refused_by_name() {
    let (dev, made) = sim_volume(64 << 20, 512, &FormatOptions::seeded(1)).await;
    let c = made.superblock.layout().cluster();
    let first = cluster::initial_slot_block(&c, 3);
    let live = SlotBlock {
        state: SlotState::Live,
        incarnation: 1,
        host_name: "mail1".into(),
        ..SlotBlock::decode(&first, c.volume, 3).unwrap()
    };
    dev.compare_and_write(c.slot_block(3), &first, &live.encode(512)).await.unwrap();
    let opts = FormatOptions::seeded(2);
    // Its process is gone: a volume to be recovered, but nobody uses it.
    assert!(matches!(make(&dev, &opts).await, Err(MkfsError::Occupied(_))));
    dev.register(blockdev::FenceKey { slot: 3, incarnation: 1 }).await.unwrap();
    match make(&dev, &opts).await {
        Err(MkfsError::LiveNodes(who)) => assert_eq!(who, ["mail1 (slot 3)"]),
        other => panic!("{other:?}"),
    }
    let again = make(&dev, &FormatOptions { force: true, ..opts }).await.unwrap();
    assert_whole(&dev, &again).await;
}

#[tokio::test(start_paused = true)]
async fn a_chosen_uuid_is_used_but_not_twice_in_a_row() {
    let uuid = parse_uuid("0b1e5d4a-1111-4222-8333-123456789abc");
    let opts = FormatOptions { uuid, force: true, ..FormatOptions::seeded(1) };
    let (dev, made) = sim_volume(64 << 20, 512, &opts).await;
    assert_eq!(uuid_text(&made.superblock.uuid), "0b1e5d4a-1111-4222-8333-123456789abc");
    assert!(matches!(make(&dev, &opts).await, Err(MkfsError::SameUuid)));
    // After another volume in between, no lock block of the first life may be believed.
    let c = made.superblock.layout().cluster();
    let stale = cluster::initial_lock_block(&c, LockId::Domain(500), Default::default());
    let at = c.lock_block(LockId::Domain(500)).unwrap();
    dev.write(IoClass::Lock, at, Arc::new(blockdev::AlignedBuf::copy_of(&stale)), true).await.unwrap();
    make(&dev, &FormatOptions { uuid: None, ..opts.clone() }).await.unwrap();
    let last = make(&dev, &opts).await.unwrap();
    let sector = dev.read(IoClass::Lock, at, 512).await.unwrap();
    assert!(sector.iter().all(|b| *b == 0));
    assert_whole(&dev, &last).await;
}

/// Power lost at any write of a second mkfs: there is no volume, the old one whole, or the new one whole.
#[tokio::test(start_paused = true)]
async fn an_interrupted_run_leaves_no_half_volume() {
    let size = 16 << 20;
    let first = FormatOptions { nodes: Some(2), ..FormatOptions::seeded(1) };
    let (mut old, mut new, mut none) = (0, 0, 0);
    for n in 0.. {
        let disk = SimDisk::new(SimConfig::new(size, 100 + n));
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        let made = make(&raw, &first).await.unwrap();
        let node = disk.open("mkfs");
        node.crash_at_kind(OpKind::Write, n);
        let dev: Arc<dyn BlockDevice> = node;
        let opts = FormatOptions { force: true, ..FormatOptions::seeded(2) };
        let second = tokio::time::timeout(Duration::from_secs(60), make(&dev, &opts)).await;
        disk.crash_all();
        disk.power_loss();
        let block = disk.read_raw(0, 4096);
        match Superblock::decode(&block) {
            Ok(sb) if sb == made.superblock => {
                assert_whole(&raw, &made).await;
                old += 1;
            }
            Ok(sb) => {
                let free = made_free(&raw, &sb).await;
                assert_whole(&raw, &Made { superblock: sb, free_blocks: free }).await;
                new += 1;
            }
            Err(SuperblockError::Absent) => none += 1,
            Err(SuperblockError::Damaged(_)) if block[..512].iter().all(|b| *b == 0) => none += 1,
            Err(e) => panic!("crash at write {n}: {e}"),
        }
        if matches!(second, Ok(Ok(_))) {
            break;
        }
    }
    assert!(old > 0 && new > 0 && none > 5, "old {old}, new {new}, none {none}");
}

async fn made_free(dev: &Arc<dyn BlockDevice>, sb: &Superblock) -> u64 {
    let l = sb.layout();
    let mut free = 0;
    for g in 0..l.groups {
        let b = block(dev, &l, l.group_header(g), LockId::Group(g), BlockKind::GroupHeader).await;
        free += GroupHeader::decode(&b).unwrap().free_blocks;
    }
    free
}

#[tokio::test]
async fn ten_terabytes_take_seconds_and_little_room() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, 10 << 40).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let started = Instant::now();
    let mut steps = 0;
    let made = format(&dev, &FormatOptions::seeded(1), &mut |_| steps += 1).await.unwrap();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert!(steps > 2000, "progress was shown {steps} times");
    let room = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(room < 64 << 20, "{}", Bytes(room));
    assert_whole(&dev, &made).await;
    assert!(made.free_blocks > (10 << 40) / BLOCK * 99 / 100);
}

#[test]
fn uuids() {
    let u = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
    assert_eq!(uuid_text(&u), "00112233-4455-6677-8899-aabbccddeeff");
    assert_eq!(parse_uuid("00112233445566778899AABBCCDDEEFF"), Some(u));
    for bad in [
        "",
        "00112233-4455-6677-8899-aabbccddeef",
        "00000000-0000-0000-0000-000000000000",
        "zz112233445566778899aabbccddeeff",
    ] {
        assert_eq!(parse_uuid(bad), None, "{bad}");
    }
}

struct FixedClock;

impl fs_core::WallClock for FixedClock {
    fn now(&self) -> Time {
        Time { secs: 1_800_000_000, nanos: 1 }
    }
}

/// The smallest volumes serve every node they were made for, down to mail in a directory of each.
#[tokio::test(start_paused = true)]
async fn a_new_volume_can_be_mounted_by_every_node() {
    use fs_core::{Atime, Caller, MountConfig, NewNode, NoKernelCache, ROOT_INO, Volume};
    for (size, nodes) in [(6 << 20, 1), (16 << 20, 8)] {
        let disk = SimDisk::new(SimConfig::new(size, 5));
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        make(&raw, &FormatOptions { nodes: Some(nodes), ..FormatOptions::seeded(5) }).await.unwrap();
        let mut mounted = Vec::new();
        for n in 0..nodes {
            let cfg = MountConfig {
                device: disk.open(&format!("node{n}")),
                net: None,
                clock: Arc::new(FixedClock),
                kernel: Arc::new(NoKernelCache),
                host_name: format!("node{n}"),
                seed: n.into(),
                read_only: false,
                atime: Atime::Never,
                cache_bytes: 1 << 20,
                dirty_bytes: 1 << 20,
            };
            let v = Volume::mount(cfg).await.unwrap_or_else(|e| panic!("node {n} of {nodes}: {e}"));
            let who = Caller::default();
            let new = |mode| NewNode { mode, umask: 0, rdev: 0 };
            let dir = v.mkdir(who, ROOT_INO, format!("box{n}").as_bytes(), new(0o755)).await.unwrap().value.ino;
            let file = v.mknod(who, dir, b"mail", new(0o100600), false).await.unwrap().value.ino;
            v.write(file, 0, &[7; 10_000], Default::default()).await.unwrap();
            v.fsync(file, false).await.unwrap();
            mounted.push(v);
        }
        for v in mounted {
            v.unmount().await.unwrap();
        }
        let report = fs_core::check::check(&raw, None).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.dirs, report.files), (1 + u64::from(nodes), nodes.into()));
    }
}
