//! The journal on the simulated device, one promise at a time.

mod common;

use std::sync::Arc;

use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{BlockDevice, IoClass};
use cluster::LockId;
use common::*;
use journal::*;
use tokio::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_small_file_is_one_data_write_one_record_and_one_flush() {
    let disk = disk(1);
    let (dev, j) = open(&disk, 1).await;
    let first = content(A, FIRST, 100, b"tree");
    j.install(changes(vec![change(FIRST, A, 5, first.clone(), None)]));
    j.commit().await.unwrap();
    let before = dev.stats().snapshot();
    let tx = j.install(Install {
        changes: vec![change(FIRST, A, 5, edit(&first, 200, b"new file"), Some(first))],
        data: vec![data(FIRST + 10, 7, true), data(FIRST + 11, 8, true)],
        ..Install::default()
    });
    assert!(j.durable() < tx);
    j.commit().await.unwrap();
    assert_eq!(j.durable(), tx);
    let io = dev.stats().snapshot().since(&before);
    assert_eq!((io.class(IoClass::Data).writes, io.class(IoClass::Journal).writes), (1, 1));
    assert_eq!(io.class(IoClass::Journal).bytes_written, 512);
    assert_eq!((io.work().flushes, io.work().reads, io.work().writes), (1, 0, 2));
    let before = dev.stats().snapshot();
    j.commit().await.unwrap();
    assert_eq!(dev.stats().snapshot().since(&before).work(), Default::default(), "nothing to do, nothing done");
}

#[tokio::test(start_paused = true)]
async fn concurrent_commits_share_records() {
    let disk = disk(2);
    let (_, j) = open(&disk, 1).await;
    let mut tasks = Vec::new();
    for n in 0..32u64 {
        let j = j.clone();
        tasks.push(tokio::spawn(async move {
            let b = FIRST + n;
            let tx = j.install(changes(vec![change(b, A, 5, content(A, b, 99, &[n as u8; 3]), None)]));
            assert!(j.commit().await.unwrap() >= tx);
        }));
    }
    for t in tasks {
        t.await.unwrap();
    }
    assert!(j.stats().records <= 3, "{:?}", j.stats());
    lights_out(&disk);
    assert_eq!(recover(&disk, 1, &Held::of(&[(A, 5)])).await.unwrap().blocks_written, 32);
}

#[tokio::test(start_paused = true)]
async fn what_is_settled_is_in_place_and_a_lock_given_up_is_not_replayed() {
    let disk = disk(3);
    let (_, j) = open(&disk, 1).await;
    let (a, b) = (content(A, FIRST, 100, b"of A"), content(B, FIRST + 1, 100, b"of B"));
    j.install(changes(vec![change(FIRST, A, 5, a.clone(), None), change(FIRST + 1, B, 6, b.clone(), None)]));
    assert_eq!(j.get(FIRST).unwrap()[64..], a[64..]);
    assert!(j.is_pending(A) && j.is_pending(B) && !j.is_pending(G));
    j.settle(A).await.unwrap();
    assert!(!j.is_pending(A) && j.is_pending(B) && j.get(FIRST).is_none());
    lights_out(&disk);
    assert_eq!(placed(&disk, FIRST, A).unwrap(), a[64..], "I3: placed and flushed");
    assert_eq!(placed(&disk, FIRST + 1, B), None);
    // Another node has A now and changed the block; it must stay as that node left it. B in a later tenure likewise.
    let mut theirs = Block::clone(&edit(&a, 100, b"them"));
    journal::block::seal(&mut theirs, 4, 1);
    disk.write_raw(FIRST * 4096, &theirs);
    let report = recover(&disk, 1, &Held::of(&[(B, 7)])).await.unwrap();
    assert_eq!((report.blocks_written, report.changes_skipped), (0, 2), "I5");
    assert_eq!(disk.read_raw(FIRST * 4096, 4096), theirs[..]);
    recover(&disk, 1, &Held::of(&[(B, 6)])).await.unwrap();
    assert_eq!(placed(&disk, FIRST + 1, B).unwrap(), b[64..]);
}

#[tokio::test(start_paused = true)]
async fn a_freed_block_that_became_data_is_not_overwritten_by_replay() {
    let disk = disk(4);
    let (_, j) = open(&disk, 1).await;
    let (tree, node) = (content(A, FIRST, 100, b"tree"), content(A, FIRST + 1, 100, b"node"));
    j.install(changes(vec![change(FIRST, A, 5, tree.clone(), None), change(FIRST + 1, A, 5, node, None)]));
    j.commit().await.unwrap();
    let less = edit(&tree, 100, b"less");
    j.install(Install {
        changes: vec![change(FIRST, A, 5, less.clone(), Some(tree))],
        revokes: vec![(FIRST + 1, 1)],
        ..Install::default()
    });
    j.commit().await.unwrap();
    let file = Install {
        changes: vec![change(FIRST, A, 5, edit(&less, 300, b"file"), Some(less))],
        data: vec![data(FIRST + 1, 9, true)],
        ..Install::default()
    };
    j.install(file);
    j.commit().await.unwrap();
    lights_out(&disk);
    recover(&disk, 1, &Held::of(&[(A, 5)])).await.unwrap();
    assert_eq!(disk.read_raw((FIRST + 1) * 4096, 4096), [9; 4096], "I6");
}

/// D1's block is freed and used by D2 within one transaction; D2 is then given away. D1's old record must not come back.
#[tokio::test(start_paused = true)]
async fn a_block_reused_in_the_transaction_that_freed_it_does_not_come_back() {
    let disk = disk(5);
    let (_, j) = open(&disk, 1).await;
    j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"old life"), None)]));
    j.commit().await.unwrap();
    let new = content(B, FIRST, 100, b"new life");
    let changes = vec![change(FIRST, B, 6, new.clone(), None)];
    j.install(Install { changes, revokes: vec![(FIRST, 1)], ..Install::default() });
    j.settle(B).await.unwrap();
    lights_out(&disk);
    recover(&disk, 1, &Held::of(&[(A, 5)])).await.unwrap();
    assert!(placed(&disk, FIRST, B).as_deref() == Some(&new[64..]), "I6");
}

#[tokio::test(start_paused = true)]
async fn the_newest_record_counts_only_if_its_data_arrived() {
    for arrives in [true, false] {
        let disk = disk(6);
        let (_, j) = open(&disk, 1).await;
        let old = content(A, FIRST, 100, b"old");
        j.install(changes(vec![change(FIRST, A, 5, old.clone(), None)]));
        j.commit().await.unwrap();
        let new = edit(&old, 100, b"new");
        let changes = vec![change(FIRST, A, 5, new.clone(), Some(old.clone()))];
        j.install(Install { changes, data: vec![data(FIRST + 5, 5, true)], ..Install::default() });
        if !arrives {
            disk.arm_write((FIRST + 5) * 4096..(FIRST + 6) * 4096, blockdev::sim::WriteFault::Lost);
        }
        j.commit().await.unwrap();
        lights_out(&disk);
        let report = recover(&disk, 1, &Held::of(&[(A, 5)])).await.unwrap();
        assert_eq!(report.dropped, !arrives);
        assert_eq!(placed(&disk, FIRST, A).unwrap(), if arrives { new[64..].to_vec() } else { old[64..].to_vec() });
    }
}

/// Two domains share a commit with fresh data of A; A goes to another node, which overwrites that data in place.
#[tokio::test(start_paused = true)]
async fn another_nodes_overwrite_after_the_handover_costs_no_acknowledged_change() {
    let disk = disk(7);
    let (_, j) = open(&disk, 1).await;
    let b = content(B, FIRST + 1, 100, b"acknowledged");
    j.install(Install {
        changes: vec![
            change(FIRST, A, 5, content(A, FIRST, 100, b"file"), None),
            change(FIRST + 1, B, 6, b.clone(), None),
        ],
        data: vec![data(FIRST + 5, 5, true)],
        ..Install::default()
    });
    j.commit().await.unwrap();
    j.settle(A).await.unwrap();
    disk.write_raw((FIRST + 5) * 4096, &[77; 4096]);
    lights_out(&disk);
    let report = recover(&disk, 1, &Held::of(&[(B, 6)])).await.unwrap();
    assert!(!report.dropped && placed(&disk, FIRST + 1, B).as_deref() == Some(&b[64..]), "I11 {report:?}");
}

fn slow_disk(seed: u64) -> Arc<SimDisk> {
    let disk = SimDisk::new(SimConfig { latency_us: 100..=60_000, ..SimConfig::new(8 * MIB, seed) });
    disk.write_raw(REGION.offset, &initial_header(REGION));
    disk
}

/// Data summed by the newest record is replaced by a transaction that does not become durable.
#[tokio::test(start_paused = true)]
async fn overwriting_summed_data_costs_no_acknowledged_change() {
    for (fresh, seed) in (0..200).map(|n| (n % 2 == 0, n)) {
        let disk = slow_disk(seed);
        let (_, j) = open(&disk, 1).await;
        let old = content(A, FIRST, 100, b"acknowledged");
        let changes = vec![change(FIRST, A, 5, old.clone(), None)];
        j.install(Install { changes, data: vec![data(FIRST + 5, 5, true)], ..Install::default() });
        j.commit().await.unwrap();
        // Fresh: freed by the record that wrote it, and allocated again.
        let new = edit(&old, 100, b"never");
        let changes = vec![change(FIRST, A, 5, new.clone(), Some(old.clone()))];
        j.install(Install { changes, data: vec![data(FIRST + 5, 6, fresh)], ..Install::default() });
        let j2 = j.clone();
        let commit = tokio::spawn(async move { j2.commit().await });
        tokio::time::sleep(Duration::from_millis(seed % 90)).await;
        let acked = commit.is_finished();
        lights_out(&disk);
        let report = recover(&disk, 1, &Held::of(&[(A, 5)])).await.unwrap();
        let got = placed(&disk, FIRST, A).unwrap_or_else(|| panic!("I11, seed {seed} {report:?}"));
        assert!(got == new[64..] || (!acked && got == old[64..]), "seed {seed}");
    }
}

/// A slow placing of a block is under way while the block is freed and becomes data.
#[tokio::test(start_paused = true)]
async fn a_late_placing_never_lands_on_a_blocks_next_life() {
    for seed in 0..300 {
        let disk = slow_disk(seed);
        let (_, j) = open(&disk, 1).await;
        j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"node"), None)]));
        j.commit().await.unwrap();
        let j2 = j.clone();
        let placing = tokio::spawn(async move { j2.settle(A).await });
        tokio::time::sleep(Duration::from_millis(1)).await;
        j.install(Install { revokes: vec![(FIRST, 1)], ..Install::default() });
        j.commit().await.unwrap();
        j.install(Install { data: vec![data(FIRST, 9, true)], ..Install::default() });
        j.commit().await.unwrap();
        placing.await.unwrap().unwrap();
        assert!(disk.read_raw(FIRST * 4096, 4096) == [9; 4096], "seed {seed}");
    }
}

/// The caller of settle goes away in the middle; the lock is given up by somebody else's settle.
#[tokio::test(start_paused = true)]
async fn a_settle_that_nobody_waits_for_any_more_leaves_no_write_in_flight() {
    for seed in 0..100 {
        let disk = slow_disk(seed);
        let (_, j) = open(&disk, 1).await;
        j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"mine"), None)]));
        j.commit().await.unwrap();
        let _ = tokio::time::timeout(Duration::from_millis(1), j.settle(A)).await;
        j.settle(A).await.unwrap();
        disk.write_raw(FIRST * 4096, &[7; 4096]);
        tokio::time::sleep(Duration::from_secs(60)).await;
        disk.settle();
        assert!(disk.read_raw(FIRST * 4096, 4096) == [7; 4096], "seed {seed}: a write arrived late");
    }
}

#[tokio::test(start_paused = true)]
async fn giving_a_lock_up_costs_one_flush_besides_the_commit() {
    let disk = disk(10);
    let (dev, j) = open(&disk, 1).await;
    let first = content(A, FIRST, 100, b"first");
    j.install(changes(vec![change(FIRST, A, 5, first.clone(), None)]));
    let before = dev.stats().snapshot();
    j.commit().await.unwrap();
    let io = dev.stats().snapshot().since(&before).work();
    // The first record under a lock must not outlive the compare-and-write that took the lock.
    assert_eq!((io.flushes, io.writes, io.reads), (2, 1, 0));
    let changes = vec![change(FIRST, A, 5, content(A, FIRST, 100, b"file"), Some(first))];
    j.install(Install { changes, data: vec![data(FIRST + 5, 5, true)], ..Install::default() });
    let before = dev.stats().snapshot();
    j.settle(A).await.unwrap();
    let io = dev.stats().snapshot().since(&before).work();
    // Record and data; then the block and an empty record.
    assert_eq!((io.flushes, io.writes, io.reads), (2, 4, 0));
    let before = dev.stats().snapshot();
    j.settle(A).await.unwrap();
    assert_eq!(dev.stats().snapshot().since(&before).work(), Default::default());
}

#[tokio::test(start_paused = true)]
async fn thousands_of_records_wrap_around_the_ring_and_the_last_is_found() {
    let disk = disk(8);
    let mut last: Vec<Arc<Block>> = (0..8).map(|n| content(A, FIRST + n, 100, b"start")).collect();
    for incarnation in 1..=2u32 {
        let (_, j) = open(&disk, incarnation).await;
        for i in 0..3000u64 {
            let n = (i % 8) as usize;
            j.throttle().await.unwrap();
            let text: Vec<u8> = (0..(i * 37 % 700 + 1)).map(|k| (k + i) as u8).collect();
            let new = edit(&last[n], 100 + n, &text);
            let old = (incarnation > 1 || i >= 8).then(|| last[n].clone());
            j.install(changes(vec![change(FIRST + n as u64, A, 5, new.clone(), old)]));
            last[n] = new;
            j.commit().await.unwrap();
        }
        lights_out(&disk);
        recover(&disk, incarnation, &Held::of(&[(A, 5)])).await.unwrap();
        for (n, b) in last.iter().enumerate() {
            assert_eq!(placed(&disk, FIRST + n as u64, A).unwrap(), b[64..]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_clean_unmount_leaves_nothing_and_a_failed_write_stops_everything() {
    let disk = disk(9);
    let (dev, j) = open(&disk, 1).await;
    j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"x"), None)]));
    j.close().await.unwrap();
    let reader: Arc<dyn BlockDevice> = dev.clone();
    assert!(scan(&reader, REGION, node(1)).await.unwrap().records.is_empty());
    // Work that has not heard of the end: after a clean one nobody would replay it.
    j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"y"), None)]));
    assert!(matches!(j.commit().await, Err(JournalError::Closed)));
    assert!(matches!(j.settle(A).await, Err(JournalError::Closed)));
    assert!(scan(&reader, REGION, node(1)).await.unwrap().records.is_empty());
    drop(j);
    let (_dev, j) = open(&disk, 2).await;
    j.install(changes(vec![change(FIRST, A, 5, content(A, FIRST, 100, b"y"), None)]));
    disk.fail_writes(REGION.offset + 8192..REGION.offset + REGION.len);
    assert!(matches!(j.commit().await, Err(JournalError::Device(_))));
    disk.heal();
    assert!(matches!(j.commit().await, Err(JournalError::Failed(_))), "I9");
    assert!(matches!(j.settle(LockId::Group(9)).await, Err(JournalError::Failed(_))));
}
