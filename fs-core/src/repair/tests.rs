//! The superblock and its copies, each lost in turn.

use blockdev::sim::{SimConfig, SimDisk};
use cluster::Timeouts;

use super::*;

const LAST: u64 = 999;
const NEAR: u64 = 7;

fn sample() -> Superblock {
    Superblock {
        compat: 0,
        incompat: 0,
        ro_compat: 0,
        uuid: [7; 16],
        label: "test".into(),
        blocks: LAST + 1,
        sector_size: 512,
        nodes: 2,
        bitmap_blocks: 1,
        journal_blocks: 256,
        groups: 1,
        domains_per_group: 64,
        group_blocks: 400,
        timeouts: Timeouts::default(),
        hint_key: [1; 32],
        created: 0,
        generation: 0,
        max_groups: 4,
    }
}

fn disk() -> Arc<SimDisk> {
    let disk = SimDisk::new(SimConfig::new((LAST + 1) * BLOCK, 1));
    let mut b = vec![0; BLOCK as usize];
    sample().encode(&mut b);
    disk.write_raw(0, &b);
    disk.write_raw(NEAR * BLOCK, &b);
    disk.write_raw(LAST * BLOCK, &b);
    disk
}

/// Damages a volume, repairs it twice, and gives the outcomes with whether all superblocks are whole at the end.
async fn repair(damage: impl FnOnce(&SimDisk), absent: bool) -> (Result<Vec<Repair>, RepairError>, bool) {
    let disk = disk();
    damage(&disk);
    let dev: Arc<dyn BlockDevice> = disk.open_raw();
    let first = superblock(&dev, absent).await;
    if first.is_ok() {
        assert_eq!(superblock(&dev, absent).await.unwrap(), [], "the second run finds nothing");
    }
    let whole = [0, NEAR, LAST].map(|b| Superblock::decode(&disk.read_raw(b * BLOCK, BLOCK as usize)).ok());
    (first, whole.iter().all(|s| s.as_ref() == Some(&sample())))
}

#[tokio::test(start_paused = true)]
async fn either_superblock_is_written_from_the_other() {
    let (r, whole) = repair(|_| (), false).await;
    assert!(r.unwrap().is_empty() && whole);
    let places = |r: Result<Vec<Repair>, RepairError>| r.unwrap().into_iter().map(|r| r.place).collect::<Vec<_>>();
    let (r, whole) = repair(|d| d.write_raw(50, &[0x55]), false).await;
    assert_eq!((places(r), whole), (vec!["superblock, block 0".to_string()], true));
    for (at, place) in [(NEAR, "copy of the superblock, block 7"), (LAST, "copy of the superblock, block 999")] {
        let (r, whole) = repair(|d| d.write_raw(at * BLOCK, &[0; 4096]), false).await;
        assert_eq!((places(r), whole), (vec![place.to_string()], true));
        // One copy is enough.
        let lost = |d: &SimDisk| {
            d.write_raw(at * BLOCK, &[0; 4096]);
            d.write_raw(50, &[0x55]);
        };
        let (r, whole) = repair(lost, false).await;
        assert_eq!((places(r), whole), (vec!["superblock, block 0".to_string(), place.to_string()], true));
    }
}

#[tokio::test(start_paused = true)]
async fn a_zeroed_superblock_comes_back_only_when_asked_for_and_what_is_not_ours_never() {
    let zero = |d: &SimDisk| d.write_raw(0, &[0; 4096]);
    assert!(matches!(repair(zero, false).await, (Err(RepairError::Superblock(SuperblockError::Absent)), false)));
    let (r, whole) = repair(zero, true).await;
    assert!(r.unwrap().len() == 1 && whole);
    let foreign = |d: &SimDisk| d.write_raw(0, &[0xeb; 4096]);
    assert!(matches!(repair(foreign, true).await, (Err(RepairError::Superblock(SuperblockError::Absent)), false)));
    // The copy of a volume of another size that once was here.
    let earlier = |d: &SimDisk| {
        let mut b = vec![0; BLOCK as usize];
        Superblock { blocks: LAST, ..sample() }.encode(&mut b);
        d.write_raw(LAST * BLOCK, &b);
        d.write_raw(NEAR * BLOCK, &[0; 4096]);
        d.write_raw(0, &[0; 4096]);
    };
    assert!(repair(earlier, true).await.0.is_err());
}
