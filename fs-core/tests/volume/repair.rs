//! Volumes are damaged and repaired: the check finds nothing afterwards, and what could be read is still there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::common::{WHO, check_clean, dir, disk, file, mount, mount_on, try_mount};
use blockdev::BlockDevice;
use blockdev::sim::{OpKind, SimConfig, SimDisk};
use cluster::LockId;
use fs_core::check::Options;
use fs_core::format::layout::VolumeLayout;
use fs_core::format::superblock::Superblock;
use fs_core::repair::{Outcome, RepairError, correct};
use fs_core::{ROOT_INO, WriteOptions};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SIZE: u64 = 48 << 20;
const BLOCK: usize = 4096;

/// Path (two parts) and contents of every file.
type Files = BTreeMap<(String, String), Vec<u8>>;

async fn volume() -> (Arc<SimDisk>, Files) {
    let disk = disk(SIZE).await;
    let v = mount(&disk, "a").await;
    let mut files = Files::new();
    for d in 0..3 {
        let dname = format!("box{d}");
        let at = v.mkdir(WHO, ROOT_INO, dname.as_bytes(), dir()).await.expect("mkdir").value.ino;
        for n in 0..120usize {
            let name = format!("message{n}");
            let f = v.mknod(WHO, at, name.as_bytes(), file(), false).await.expect("create").value.ino;
            let body = vec![(n + d) as u8; (n * 131) % 9000];
            v.write(f, 0, &body, WriteOptions::default()).await.expect("write");
            files.insert((dname.clone(), name), body);
        }
    }
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    (disk, files)
}

fn blocks(disk: &SimDisk) -> Vec<(u64, u8, Vec<u8>)> {
    (1..SIZE / BLOCK as u64)
        .filter_map(|n| {
            let b = disk.read_raw(n * BLOCK as u64, BLOCK);
            (b[..4] == *b"CLFS").then(|| (n, b[4], b))
        })
        .collect()
}

fn copy(disk: &SimDisk, seed: u64) -> Arc<SimDisk> {
    let mut cfg = SimConfig::new(0, seed);
    cfg.fencing = blockdev::FencingKind::ProcessLock;
    SimDisk::from_snapshot(cfg, &disk.snapshot())
}

/// The files that are there under their names with their contents, by a mount of a copy.
async fn good(disk: &Arc<SimDisk>, files: &Files) -> BTreeSet<(String, String)> {
    let disk = copy(disk, 1);
    let mut good = BTreeSet::new();
    let patience = std::time::Duration::from_secs(600);
    let Ok(Ok(v)) = tokio::time::timeout(patience, try_mount(&disk, "reader")).await else { return good };
    for ((d, n), body) in files {
        let Ok(Some(at)) = v.lookup(ROOT_INO, d.as_bytes()).await.map(|x| x.value) else { continue };
        let Ok(Some(f)) = v.lookup(at.ino, n.as_bytes()).await.map(|x| x.value) else { continue };
        if v.read(f.ino, 0, 1 << 20).await.is_ok_and(|r| r.value == *body) {
            good.insert((d.clone(), n.clone()));
        }
    }
    good
}

async fn readable(disk: &Arc<SimDisk>, files: &Files) -> usize {
    good(disk, files).await.len()
}

async fn run(disk: &Arc<SimDisk>, seed: u64) -> Outcome {
    let dev: Arc<dyn BlockDevice> = disk.open("fsck");
    let done = fs_core::repair::run(&dev, true, Options::default(), seed, None).await;
    done.unwrap_or_else(|e| panic!("seed {seed}: {e}"))
}

/// Repairs, twice; gives what the first run did.
async fn repair_to_clean(disk: &Arc<SimDisk>, seed: u64) -> Vec<String> {
    let done = run(disk, seed).await;
    assert_eq!(done.report.violations, [], "seed {seed}");
    check_clean(disk, seed).await;
    // Also where the check sees nothing wrong, everything is looked at as the repair does it.
    let dev: Arc<dyn BlockDevice> = disk.open("fsck");
    let again = correct(&dev, None, true, seed + 1000, None).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    assert!(again.repairs.is_empty() && again.losses.is_empty(), "seed {seed}: a second run finds {again:?}");
    done.repairs.iter().map(ToString::to_string).collect()
}

#[tokio::test(start_paused = true)]
async fn a_whole_volume_is_left_alone() {
    let (disk, files) = volume().await;
    let before = disk.read_raw(64 << 10, (SIZE - (64 << 10)) as usize);
    assert_eq!(repair_to_clean(&disk, 1).await, [""; 0]);
    let after = disk.read_raw(64 << 10, before.len());
    let differs = before.chunks(BLOCK).zip(after.chunks(BLOCK)).filter(|(a, b)| a != b && a[..4] == *b"CLFS").count();
    assert_eq!(differs, 0);
    assert_eq!(readable(&disk, &files).await, files.len());
}

#[tokio::test(start_paused = true)]
async fn no_file_is_lost_with_a_block_that_only_leads_to_others() {
    let (whole, files) = volume().await;
    for (number, kind, b) in blocks(&whole) {
        // Kind 2 with level 1 is a leaf: that one holds what cannot be had elsewhere.
        if kind == 2 && b[64] == 1 {
            continue;
        }
        let disk = copy(&whole, number);
        disk.write_raw(number * BLOCK as u64, &[0; BLOCK]);
        repair_to_clean(&disk, number).await;
        assert_eq!(readable(&disk, &files).await, files.len(), "block {number} of kind {kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_is_damaged_the_check_is_clean_after_repair() {
    let rounds: u64 = std::env::var("CLUSTERFS_REPAIR_ROUNDS").ok().and_then(|x| x.parse().ok()).unwrap_or(30);
    let (whole, files) = volume().await;
    let all = blocks(&whole);
    for round in 0..rounds {
        let mut rng = StdRng::seed_from_u64(round);
        let disk = copy(&whole, round);
        for _ in 0..rng.random_range(1..5) {
            let (number, _, mut b) = all[rng.random_range(0..all.len())].clone();
            match rng.random_range(0..3) {
                0 => b.fill(0),
                1 => b[64..].copy_from_slice(&all[rng.random_range(0..all.len())].2[64..]),
                _ => {
                    for _ in 0..rng.random_range(1..8) {
                        let at = rng.random_range(64..BLOCK);
                        b[at] ^= 1 << rng.random_range(0..8);
                    }
                }
            }
            if b[0] != 0 && rng.random() {
                journal::block::seal(&mut b, 1, 1);
            }
            disk.write_raw(number * BLOCK as u64, &b);
        }
        let before = good(&disk, &files).await;
        let done = repair_to_clean(&disk, round).await;
        let after = good(&disk, &files).await;
        let lost: Vec<_> = before.difference(&after).collect();
        assert!(lost.is_empty(), "round {round}: can be read no more: {lost:?}\n{}", done.join("\n"));
    }
}

/// A volume whose node died with everything synced but most of it in its journal only.
async fn crashed_volume() -> (Arc<SimDisk>, Files, Vec<u32>) {
    let (disk, mut files) = volume().await;
    let node = disk.open("b");
    let v = mount_on(node.clone(), "b").await;
    let mut domains = Vec::new();
    for d in 0..3 {
        let at = v.lookup(ROOT_INO, format!("box{d}").as_bytes()).await.expect("lookup").value.expect("box").ino;
        domains.push((at >> 40) as u32);
        for n in 0..20usize {
            let name = format!("late{n}");
            let f = v.mknod(WHO, at, name.as_bytes(), file(), false).await.expect("create").value.ino;
            let body = vec![n as u8; n * 300];
            v.write(f, 0, &body, WriteOptions::default()).await.expect("write");
            v.fsync(f, false).await.expect("fsync");
            files.insert((format!("box{d}"), name), body);
        }
    }
    v.fsync(ROOT_INO, false).await.expect("fsync");
    node.crash();
    (disk, files, domains)
}

fn layout(disk: &SimDisk) -> VolumeLayout {
    Superblock::decode(&disk.read_raw(0, BLOCK)).expect("superblock").layout()
}

#[tokio::test(start_paused = true)]
async fn damaged_slot_blocks_cost_nothing() {
    let (whole, files, _) = crashed_volume().await;
    let cluster = layout(&whole).cluster();
    let slots = 0..cluster.nodes;
    let cases: Vec<(Vec<u16>, bool)> =
        slots.clone().map(|s| (vec![s], true)).chain([(slots.collect(), true), (vec![0], false)]).collect();
    for (n, (slots, heartbeats)) in (0..).zip(cases) {
        let disk = copy(&whole, n);
        for s in &slots {
            disk.write_raw(cluster.slot_block(*s) + 16, &[0xee; 40]);
            if !heartbeats {
                disk.write_raw(cluster.heartbeat(*s), &[0; 512]);
            }
        }
        let done = repair_to_clean(&disk, n).await;
        assert!(slots.iter().all(|s| done.iter().any(|l| l.starts_with(&format!("slot {s}: ")))), "{done:?}");
        assert_eq!(readable(&disk, &files).await, files.len(), "slots {slots:?}: {done:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_lives_behind_a_damaged_slot_block_is_not_disturbed() {
    let (disk, _) = volume().await;
    let v = mount(&disk, "a").await;
    let slot = layout(&disk).cluster().slot_block(0);
    let good = disk.read_raw(slot, 512);
    disk.write_raw(slot + 20, &[0xee; 4]);
    let dev: Arc<dyn BlockDevice> = disk.open("fsck");
    let e = fs_core::repair::run(&dev, true, Options::default(), 9, None).await.expect_err("it lives");
    assert!(e.to_string().contains("mounted by a host without a name (slot 0)"), "{e}");
    disk.write_raw(slot, &good);
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn of_a_journal_that_does_not_fit_the_rest_is_replayed() {
    let (whole, files, domains) = crashed_volume().await;
    let l = layout(&whole);
    let lock = l.cluster().lock_block(LockId::Domain(domains[1])).expect("lock block");
    let disk = copy(&whole, 1);
    disk.write_raw(lock + 30, &[0xee; 20]);
    let done = repair_to_clean(&disk, 1).await;
    assert!(done.iter().any(|l| l.contains("taken as held until the node died")), "{done:?}");
    assert_eq!(readable(&disk, &files).await, files.len(), "{done:?}");

    // Headers gone: the records are looked for. One of two gone: the other leads to an earlier life.
    let at = l.journal(0).offset;
    for (n, (from, len)) in (2..).zip([(0, 2 * BLOCK), (0, BLOCK), (BLOCK, BLOCK)]) {
        let disk = copy(&whole, n);
        disk.write_raw(at + from as u64, &vec![0; len]);
        let done = repair_to_clean(&disk, n).await;
        assert_eq!(readable(&disk, &files).await, files.len(), "{from} {len}: {done:?}");
    }
    let disk = copy(&whole, 5);
    disk.write_raw(at, &vec![0; l.journal(0).len as usize]);
    let done = repair_to_clean(&disk, 5).await;
    assert!(done.iter().any(|l| l.contains("journal of node 0.2: emptied")), "{done:?}");
    let left = readable(&disk, &files).await;
    assert!(left >= files.len() - 60, "{left} of {}: {done:?}", files.len());
    // A slot that nobody died in: nothing is lost with its journal.
    let disk = copy(&whole, 6);
    disk.write_raw(l.journal(3).offset, &[0; 2 * BLOCK]);
    let done = repair_to_clean(&disk, 6).await;
    assert!(done.iter().any(|l| l.starts_with("journal of slot 3: emptied")), "{done:?}");
    assert_eq!(readable(&disk, &files).await, files.len());
}

#[tokio::test(start_paused = true)]
async fn a_crash_of_the_repair_is_repaired_by_another() {
    let (whole, files, _) = crashed_volume().await;
    let inner = blocks(&whole).into_iter().find(|(_, kind, b)| *kind == 2 && b[64] > 1).expect("an inner node").0;
    let slot = layout(&whole).cluster().slot_block(0);
    let points = [(OpKind::Write, 0..66, 6), (OpKind::CompareAndWrite, 0..24, 3), (OpKind::Flush, 0..12, 2)];
    for (kind, range, step) in points {
        for n in range.step_by(step) {
            let disk = copy(&whole, n);
            disk.write_raw(inner * BLOCK as u64, &[0; BLOCK]);
            disk.write_raw(slot + 16, &[0xee; 8]);
            let node = disk.open("fsck");
            node.crash_at_kind(kind, n);
            let dev: Arc<dyn BlockDevice> = node.clone();
            let first = tokio::select! {
                biased;
                () = node.crashed() => None,
                r = fs_core::repair::run(&dev, true, Options::default(), n, None) => Some(r.expect("repair")),
            };
            drop((first, dev, node));
            repair_to_clean(&disk, n + 100).await;
            assert_eq!(readable(&disk, &files).await, files.len(), "crash at {kind:?} {n}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_mounted_volume_is_not_repaired() {
    let (disk, _) = volume().await;
    let v = mount(&disk, "a").await;
    let dev: Arc<dyn BlockDevice> = disk.open("fsck");
    let e = correct(&dev, None, true, 9, None).await.expect_err("mounted");
    assert!(matches!(&e, RepairError::Cluster(cluster::ClusterError::InUse { host, .. }) if host == "a"), "{e}");
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}
