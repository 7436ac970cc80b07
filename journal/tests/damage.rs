//! Damage in a journal is told from its end, wherever the end may legitimately be.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use blockdev::sim::{SimDisk, WriteFault};
use common::*;
use journal::*;

const RING: u64 = REGION.offset + 8192;
const SECTOR: u64 = 512;

/// Ring offsets of the records on the disk, by number.
fn records(disk: &SimDisk) -> Vec<(u64, u64)> {
    let ring = disk.read_raw(RING, (REGION.len - 8192) as usize);
    let starts = ring.chunks(SECTOR as usize).enumerate().filter(|(_, s)| s.starts_with(b"CLJR"));
    let number = |s: &[u8]| u64::from_le_bytes(s[24..32].try_into().unwrap());
    let mut all: Vec<_> = starts.map(|(i, s)| (number(s), i as u64 * SECTOR)).collect();
    all.sort_unstable();
    all
}

/// Commits `count` changes of one block, each in a record of its own.
async fn commits(j: &Journal, last: &mut Arc<Block>, count: usize) {
    for n in 0..count {
        let new = edit(last, 64 + n % 300 * 4, &(n as u32 + 1).to_le_bytes());
        let old = Some(std::mem::replace(last, new.clone()));
        j.install(changes(vec![change(FIRST, A, 5, new, old)]));
        j.commit().await.unwrap();
    }
}

async fn start(disk: &Arc<SimDisk>) -> (Arc<Journal>, Arc<Block>) {
    let (_, j) = open(disk, 1).await;
    let first = content(A, FIRST, 64, b"start");
    j.install(changes(vec![change(FIRST, A, 5, first.clone(), None)]));
    j.commit().await.unwrap();
    (j, first)
}

fn held() -> Held {
    Held::of(&[(A, 5)])
}

#[tokio::test(start_paused = true)]
async fn a_damaged_record_with_a_whole_one_behind_it_is_told() {
    for damaged in 0..8usize {
        let disk = disk(11);
        let (j, mut last) = start(&disk).await;
        commits(&j, &mut last, 7).await;
        lights_out(&disk);
        let all = records(&disk);
        assert_eq!(all.len(), 8);
        let (number, at) = all[damaged];
        disk.corrupt(RING + at, SECTOR as usize);
        let done = recover(&disk, 1, &held()).await;
        if damaged + 1 == all.len() {
            assert_eq!(done.unwrap().records, damaged, "as a record whose write was torn");
            continue;
        }
        let e = done.unwrap_err();
        assert!(matches!(e, JournalError::Damaged { slot: 3, .. }), "{e}");
        assert!(e.to_string().contains(&format!("record {number} cannot be read")), "{e}");
        assert!(placed(&disk, FIRST, A).is_none(), "nothing is replayed of half a journal");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_the_device_lost_or_put_elsewhere_is_told() {
    for fault in [WriteFault::Lost, WriteFault::Misdirected { to: FIRST * 4096 + (1 << 20) }] {
        let disk = disk(12);
        let (j, mut last) = start(&disk).await;
        commits(&j, &mut last, 3).await;
        disk.arm_write(RING..REGION.offset + REGION.len, fault);
        commits(&j, &mut last, 1).await;
        commits(&j, &mut last, 2).await;
        lights_out(&disk);
        let e = recover(&disk, 1, &held()).await.unwrap_err();
        assert!(e.to_string().contains("record 6 cannot be read"), "{fault:?}: {e}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_header_is_told_where_its_older_copy_leads_nowhere() {
    let disk = disk(13);
    let (j, mut last) = start(&disk).await;
    // Round the ring more than once: what the older copy of the header points to is overwritten.
    for _ in 0..40 {
        commits(&j, &mut last, 100).await;
        j.checkpoint().await.unwrap();
    }
    assert!(j.stats().checkpoints >= 3, "{:?}", j.stats());
    lights_out(&disk);
    let image = disk.snapshot();
    let generation = |copy: u64| disk.read_raw(REGION.offset + copy * 4096 + 24, 8);
    let newer = u64::from(
        u64::from_le_bytes(generation(1).try_into().unwrap()) > u64::from_le_bytes(generation(0).try_into().unwrap()),
    );
    assert!(recover(&disk, 1, &held()).await.is_ok());
    let disk = SimDisk::from_snapshot(blockdev::sim::SimConfig::new(8 * MIB, 1), &image);
    disk.corrupt(REGION.offset + newer * 4096, 512);
    let done = recover(&disk, 1, &held()).await;
    let all = placed(&disk, FIRST, A).is_some_and(|b| b == last[64..]);
    assert!(done.is_err() || all, "what was acknowledged is there, or its loss is told: {done:?}");
}

#[tokio::test(start_paused = true)]
async fn a_header_that_went_back_to_an_earlier_life_is_told() {
    let disk = disk(14);
    let before = disk.read_raw(REGION.offset, 8192);
    let (j, mut last) = start(&disk).await;
    commits(&j, &mut last, 3).await;
    lights_out(&disk);
    disk.write_raw(REGION.offset, &before);
    let e = recover(&disk, 1, &held()).await.unwrap_err();
    assert!(e.to_string().contains("of incarnation 0, but record"), "{e}");
    // A later life that changed nothing is no reason to complain.
    assert_eq!(recover(&disk, 2, &held()).await.unwrap().records, 0);
}
