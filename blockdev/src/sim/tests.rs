use std::sync::Arc;

use tokio::time::{Duration, Instant, sleep, timeout};

use super::*;
use crate::{AlignedBuf, BlockDevice, Caw, DevError, FenceKey, Fenced, IoClass, Presence};

const MIB: u64 = 1 << 20;
const META: IoClass = IoClass::Meta;

fn buf(byte: u8, len: usize) -> Arc<AlignedBuf> {
    let mut b = AlignedBuf::zeroed(len);
    b.fill(byte);
    Arc::new(b)
}

fn key(slot: u16, incarnation: u32) -> FenceKey {
    FenceKey { slot, incarnation }
}

fn reservations(seed: u64) -> SimConfig {
    SimConfig {
        fencing: FencingKind::Reservations,
        late_write_delay: Duration::from_secs(5),
        ..SimConfig::new(MIB, seed)
    }
}

/// Which of `sectors` sectors from `offset` hold `byte`; the others must hold `old`.
fn arrived(disk: &SimDisk, offset: u64, sectors: usize, byte: u8, old: u8) -> Vec<bool> {
    let bytes = disk.read_raw(offset, sectors * 512);
    let whole = |s: &[u8]| {
        assert!(s.iter().all(|b| *b == byte) || s.iter().all(|b| *b == old), "a sector is torn");
        s[0] == byte
    };
    bytes.chunks(512).map(whole).collect()
}

async fn pending<F: Future>(f: F) -> bool {
    timeout(Duration::from_secs(3600), f).await.is_err()
}

/// Several nodes with work of all kinds, a crash and a power loss; returns what there was to see.
async fn scenario(seed: u64) -> (u64, Vec<u8>, Duration) {
    let disk = SimDisk::new(SimConfig { split_writes: true, ..SimConfig::new(MIB, seed) });
    let start = Instant::now();
    let mut tasks = Vec::new();
    for i in 0..4u8 {
        let node = disk.open(&format!("n{i}"));
        if i == 3 {
            node.crash_at(7);
        }
        tasks.push(tokio::spawn(async move {
            for round in 0..10u8 {
                node.write(META, 4096, buf(i * 16 + round, 8192), round % 3 == 0).await.unwrap();
                let seen = node.read(META, 0, 512).await.unwrap();
                let mut new = seen.to_vec();
                new[0] += 1;
                node.compare_and_write(0, &seen, &new).await.unwrap();
                if round == 5 {
                    node.flush(META).await.unwrap();
                }
            }
        }));
    }
    for task in tasks.drain(..3) {
        task.await.unwrap();
    }
    disk.power_loss();
    (disk.trace_hash(), disk.read_raw(0, 16384), start.elapsed())
}

#[test]
fn equal_seeds_give_equal_runs() {
    let run = |seed| {
        let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        rt.block_on(scenario(seed))
    };
    assert!((0..20).all(|seed| run(seed) == run(seed)));
    assert_ne!(run(1).0, run(2).0);
}

#[tokio::test(start_paused = true)]
async fn writes_in_flight_overtake_each_other_but_completed_ones_do_not() {
    let mut last = std::collections::BTreeSet::new();
    for seed in 0..30 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let (a, b) = (disk.open("a"), disk.open("b"));
        let (x, y) = tokio::join!(a.write(META, 0, buf(1, 512), false), b.write(META, 0, buf(2, 512), false));
        x.unwrap();
        y.unwrap();
        last.insert(disk.read_raw(0, 1)[0]);
        a.write(META, 0, buf(3, 512), false).await.unwrap();
        b.write(META, 0, buf(4, 512), false).await.unwrap();
        assert_eq!(a.read(META, 0, 512).await.unwrap()[..], buf(4, 512)[..]);
    }
    assert_eq!(last.into_iter().collect::<Vec<_>>(), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn power_loss_tears_unflushed_writes_and_spares_durable_ones() {
    let (mut whole, mut torn, mut lost, mut older) = (0, 0, 0, 0);
    for seed in 0..200 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let (a, b) = (disk.open("a"), disk.open("b"));
        a.write(META, 0, buf(1, 4096), true).await.unwrap();
        a.write(META, 4096, buf(2, 4096), false).await.unwrap();
        b.flush(META).await.unwrap();
        assert_eq!(disk.volatile_sectors(), 0);
        a.write(META, 8192, buf(3, 4096), false).await.unwrap();
        a.write(META, 16384, buf(4, 512), false).await.unwrap();
        a.write(META, 16384, buf(5, 512), false).await.unwrap();
        disk.power_loss();
        assert!(arrived(&disk, 0, 8, 1, 9).iter().all(|x| *x), "FUA is durable");
        assert!(arrived(&disk, 4096, 8, 2, 9).iter().all(|x| *x), "flushed by another node is durable");
        match arrived(&disk, 8192, 8, 3, 0).iter().filter(|x| **x).count() {
            0 => lost += 1,
            8 => whole += 1,
            _ => torn += 1,
        }
        older += usize::from(disk.read_raw(16384, 1)[0] == 4);
        assert!(a.flush(META).await.is_err(), "a survivor hears of the loss");
        a.flush(META).await.unwrap();
    }
    assert!(whole > 20 && torn > 10 && lost > 20 && older > 5, "{whole} {torn} {lost} {older}");
}

#[tokio::test(start_paused = true)]
async fn compare_and_write_is_volatile_until_a_flush() {
    let mut kept = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let a = disk.open("a");
        assert_eq!(a.compare_and_write(0, &[0; 512], &[1; 512]).await.unwrap(), Caw::Written);
        a.flush(META).await.unwrap();
        assert_eq!(a.compare_and_write(0, &[1; 512], &[2; 512]).await.unwrap(), Caw::Written);
        disk.power_loss();
        match disk.read_raw(0, 1)[0] {
            1 => {}
            2 => kept += 1,
            other => panic!("{other}"),
        }
    }
    assert!((10..90).contains(&kept), "{kept}");
}

#[tokio::test(start_paused = true)]
async fn flush_covers_only_what_completed_before_it_was_called() {
    let mut lost = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let (a, b) = (disk.open("a"), disk.open("b"));
        let (w, f) = tokio::join!(a.write(META, 0, buf(1, 512), false), b.flush(META));
        w.unwrap();
        f.unwrap();
        disk.power_loss();
        lost += usize::from(disk.read_raw(0, 1)[0] == 0);
    }
    assert!(lost > 20, "{lost}");
}

#[tokio::test(start_paused = true)]
async fn without_a_write_cache_nothing_is_volatile() {
    let disk = SimDisk::new(SimConfig { write_cache: false, ..SimConfig::new(MIB, 1) });
    let a = disk.open("a");
    a.write(META, 0, buf(1, 4096), false).await.unwrap();
    disk.power_loss();
    assert!(arrived(&disk, 0, 8, 1, 0).iter().all(|x| *x));
}

#[tokio::test(start_paused = true)]
async fn a_crashed_node_never_hears_again_and_leaves_torn_writes() {
    let (mut whole, mut torn, mut lost) = (0, 0, 0);
    for seed in 0..100 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let (a, b) = (disk.open("a"), disk.open("b"));
        a.register(key(1, 1)).await.unwrap();
        assert_eq!(b.presence(key(1, 1)).await.unwrap(), Presence::Present);
        assert_eq!(b.fence(key(1, 1)).await.unwrap(), Fenced::MustWait);
        assert!(b.register(key(1, 2)).await.is_err(), "the slot is taken");
        a.crash_at(3);
        let before = a.issued();
        a.read(META, 0, 512).await.unwrap();
        a.write(META, 0, buf(1, 4096), false).await.unwrap();
        let (write, ()) = tokio::join!(pending(a.write(META, 4096, buf(2, 4096), true)), a.crashed());
        assert!(write);
        assert_eq!(a.issued() - before, 3);
        assert!(pending(a.read(META, 0, 512)).await);
        assert!(pending(a.register(key(1, 1))).await);
        assert_eq!(b.read(META, 0, 512).await.unwrap()[0], 1, "a crash does not lose the device's cache");
        let now = arrived(&disk, 4096, 8, 2, 0);
        match now.iter().filter(|x| **x).count() {
            0 => lost += 1,
            8 => whole += 1,
            _ => torn += 1,
        }
        sleep(Duration::from_secs(600)).await;
        assert_eq!(arrived(&disk, 4096, 8, 2, 0), now, "nothing arrives once the node is gone");
        assert_eq!(b.presence(key(1, 1)).await.unwrap(), Presence::Gone);
        assert_eq!(b.fence(key(1, 1)).await.unwrap(), Fenced::Done);
    }
    assert!(whole > 15 && torn > 15 && lost > 15, "{whole} {torn} {lost}");
}

#[tokio::test(start_paused = true)]
async fn crash_at_a_kind_counts_only_that_kind() {
    let disk = SimDisk::new(SimConfig::new(MIB, 5));
    let a = disk.open("a");
    a.crash_at_kind(OpKind::Flush, 2);
    a.write(META, 0, buf(1, 512), false).await.unwrap();
    a.flush(META).await.unwrap();
    a.compare_and_write(0, &[1; 512], &[2; 512]).await.unwrap();
    assert_eq!((a.issued(), a.issued_of(OpKind::Flush), a.mode()), (3, 1, NodeMode::Live));
    assert!(pending(a.flush(META)).await);
    assert_eq!(a.mode(), NodeMode::Crashed);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_write_arrives_all_the_same() {
    let disk = SimDisk::new(SimConfig { latency_us: 50_000..=60_000, ..SimConfig::new(MIB, 1) });
    let a = disk.open("a");
    assert!(timeout(Duration::from_millis(1), a.write(META, 0, buf(1, 512), false)).await.is_err());
    sleep(Duration::from_millis(100)).await;
    assert_eq!(disk.read_raw(0, 1), [1]);
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_closed_node_arrives_once_it_counts_as_gone() {
    let mut arrivals = 0;
    for seed in 0..50 {
        let disk = SimDisk::new(SimConfig { latency_us: 50_000..=60_000, ..SimConfig::new(MIB, seed) });
        let (a, b) = (disk.open("a"), disk.open("b"));
        a.register(key(1, 1)).await.unwrap();
        assert!(timeout(Duration::from_millis(1), a.write(META, 0, buf(1, 512), false)).await.is_err());
        drop(a);
        assert_eq!(b.presence(key(1, 1)).await.unwrap(), Presence::Gone);
        let then = disk.read_raw(0, 1);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(disk.read_raw(0, 1), then);
        arrivals += then[0];
    }
    assert!((5..45).contains(&arrivals), "{arrivals}");
}

#[tokio::test(start_paused = true)]
async fn a_sector_rewritten_without_a_flush_keeps_its_durable_content() {
    let mut first = 0;
    for seed in 0..50 {
        let disk = SimDisk::new(SimConfig { latency_us: 1..=10, ..SimConfig::new(MIB, seed) });
        let a = disk.open("a");
        a.write(META, 0, buf(1, 512), true).await.unwrap();
        for i in 2..102 {
            a.write(META, 0, buf(i, 512), false).await.unwrap();
        }
        disk.power_loss();
        first += usize::from(disk.read_raw(0, 1)[0] == 1);
    }
    assert!(first > 5, "{first}");
}

#[tokio::test(start_paused = true)]
async fn compare_and_write_is_atomic_among_nodes() {
    for seed in 0..10 {
        let disk = SimDisk::new(SimConfig::new(MIB, seed));
        let mut tasks = Vec::new();
        for i in 0..5 {
            let node = disk.open(&format!("n{i}"));
            tasks.push(tokio::spawn(async move {
                for _ in 0..20 {
                    let mut seen = node.read(META, 512, 512).await.unwrap().to_vec();
                    loop {
                        let n = u64::from_le_bytes(seen[..8].try_into().unwrap());
                        let mut new = seen.clone();
                        new[..8].copy_from_slice(&(n + 1).to_le_bytes());
                        match node.compare_and_write(512, &seen, &new).await.unwrap() {
                            Caw::Written => break,
                            Caw::Mismatch(now) => seen = now,
                        }
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(disk.read_raw(512, 8), 100u64.to_le_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn compare_and_write_of_unknown_outcome_happened_or_not() {
    let (mut done, mut unknown) = (0, 0);
    let disk = SimDisk::new(SimConfig::new(MIB, 3));
    disk.set_rates(FaultRates { caw_unknown: 0.5, ..FaultRates::default() });
    let a = disk.open("a");
    for _ in 0..100 {
        disk.write_raw(0, &[0; 512]);
        match a.compare_and_write(0, &[0; 512], &[1; 512]).await {
            Ok(caw) => assert_eq!((caw, disk.read_raw(0, 1)[0]), (Caw::Written, 1)),
            Err(DevError::Unknown { .. }) => {
                unknown += 1;
                done += u8::from(disk.read_raw(0, 1)[0] == 1);
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!((30..70).contains(&unknown) && done > 10 && done < unknown - 10, "{done} of {unknown}");
}

#[tokio::test(start_paused = true)]
async fn a_node_cut_off_fails_slowly_and_its_writes_may_come_late() {
    let (mut early, mut late, mut never) = (0, 0, 0);
    for seed in 0..100 {
        let disk = SimDisk::new(reservations(seed));
        let a = disk.open("a");
        let start = Instant::now();
        let write = a.write(META, 0, buf(1, 512), false);
        let (result, ()) = tokio::join!(write, async { a.cut(true) });
        assert!(matches!(result, Err(DevError::Unknown { .. })));
        assert!(start.elapsed() >= Duration::from_secs(2));
        let then = disk.read_raw(0, 1)[0];
        assert!(matches!(a.write(META, 4096, buf(1, 512), false).await, Err(DevError::Unknown { .. })));
        sleep(Duration::from_secs(10)).await;
        match (then, disk.read_raw(0, 1)[0]) {
            (1, 1) => early += 1,
            (0, 1) => late += 1,
            _ => never += 1,
        }
        assert_eq!(disk.read_raw(4096, 1)[0], 0, "what is issued while cut off does not arrive");
        a.cut(false);
        a.write(META, 4096, buf(1, 512), false).await.unwrap();
    }
    assert!(early > 10 && late > 10 && never > 10, "{early} {late} {never}");
}

#[tokio::test(start_paused = true)]
async fn fencing_by_reservation_stops_late_writes() {
    for seed in 0..100 {
        let disk = SimDisk::new(reservations(seed));
        let (a, b) = (disk.open("a"), disk.open("b"));
        a.register(key(0, 7)).await.unwrap();
        let write = tokio::spawn({
            let a = a.clone();
            async move { a.write(META, 0, buf(1, 512), false).await }
        });
        tokio::task::yield_now().await;
        if seed % 2 == 0 {
            a.hang(true)
        } else {
            a.cut(true)
        }
        assert_eq!(b.presence(key(0, 7)).await.unwrap(), Presence::Unknown);
        assert_eq!(b.fence(key(0, 7)).await.unwrap(), Fenced::Done);
        let then = disk.read_raw(0, 1);
        sleep(Duration::from_secs(10)).await;
        assert_eq!(disk.read_raw(0, 1), then, "nothing arrives after the fence");
        let queued = a.clone();
        let queued = tokio::spawn(async move { queued.write(META, 512, buf(1, 512), false).await });
        tokio::task::yield_now().await;
        a.hang(false);
        a.cut(false);
        // Cut off, its outcome is unknown; hung, it is refused on waking, even by the new incarnation.
        a.register(key(0, 8)).await.unwrap();
        assert!(matches!(queued.await.unwrap(), Err(DevError::Fenced | DevError::Unknown { .. })));
        assert_eq!(disk.read_raw(512, 1), [0]);
        assert!(matches!(write.await.unwrap(), Ok(()) | Err(DevError::Unknown { .. })));
        a.write(META, 512, buf(1, 512), false).await.unwrap();
        b.fence(key(0, 8)).await.unwrap();
        assert!(matches!(a.write(META, 512, buf(2, 512), false).await, Err(DevError::Fenced)));
        assert!(matches!(a.flush(META).await, Err(DevError::Fenced)));
        assert!(matches!(a.compare_and_write(512, &[1; 512], &[2; 512]).await, Err(DevError::Fenced)));
        assert_eq!(a.read(META, 512, 512).await.unwrap()[0], 1);
    }
}

#[tokio::test(start_paused = true)]
async fn without_fencing_one_must_wait() {
    let disk = SimDisk::new(SimConfig { fencing: FencingKind::None, ..SimConfig::new(MIB, 1) });
    let (a, b) = (disk.open("a"), disk.open("b"));
    a.register(key(0, 1)).await.unwrap();
    a.crash();
    assert_eq!(b.presence(key(0, 1)).await.unwrap(), Presence::Unknown);
    assert_eq!(b.fence(key(0, 1)).await.unwrap(), Fenced::MustWait);
}

#[tokio::test(start_paused = true)]
async fn a_hung_node_proceeds_when_let_go() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let a = disk.open("a");
    a.register(key(0, 1)).await.unwrap();
    a.hang(true);
    let start = Instant::now();
    let let_go = async {
        sleep(Duration::from_secs(50)).await;
        assert_eq!(disk.read_raw(0, 1)[0], 0);
        assert_eq!(disk.open("b").presence(key(0, 1)).await.unwrap(), Presence::Present);
        a.hang(false);
    };
    let (result, ()) = tokio::join!(a.write(META, 0, buf(1, 512), false), let_go);
    result.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(50));
    assert_eq!(disk.read_raw(0, 1)[0], 1);
}

#[tokio::test(start_paused = true)]
async fn a_stall_delays_everything() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let (a, b) = (disk.open("a"), disk.open("b"));
    let start = Instant::now();
    let stalled = async { disk.stall(Duration::from_secs(20)) };
    let later = async {
        sleep(Duration::from_secs(5)).await;
        b.read(META, 0, 512).await
    };
    let (w, (), r) = tokio::join!(a.write(META, 0, buf(1, 512), false), stalled, later);
    w.unwrap();
    r.unwrap();
    assert!((20_000..20_100).contains(&start.elapsed().as_millis()));
    a.read(META, 0, 512).await.unwrap();
    assert!(start.elapsed().as_millis() < 20_100);
}

#[tokio::test(start_paused = true)]
async fn bad_ranges_and_lying_writes() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let a = disk.open("a");
    disk.fail_reads(512..1024);
    disk.fail_writes(2048..2560);
    assert!(matches!(a.read(META, 0, 4096).await, Err(DevError::Io { op: "read", offset: 0, len: 4096, .. })));
    a.read(META, 1024, 512).await.unwrap();
    assert!(matches!(a.write(META, 0, buf(1, 4096), false).await, Err(DevError::Io { op: "write", .. })));
    assert_eq!(disk.read_raw(2048, 1), [0]);
    disk.heal();
    a.write(META, 0, buf(2, 4096), false).await.unwrap();
    assert_eq!(a.read(META, 0, 4096).await.unwrap()[..], buf(2, 4096)[..]);

    disk.arm_write(0..512, WriteFault::Lost);
    disk.arm_write(512..1024, WriteFault::Misdirected { to: 8192 });
    a.write(META, 0, buf(3, 512), false).await.unwrap();
    a.write(META, 512, buf(4, 512), false).await.unwrap();
    assert_eq!((disk.read_raw(0, 1)[0], disk.read_raw(512, 1)[0], disk.read_raw(8192, 1)[0]), (2, 2, 4));
    disk.corrupt(600, 10);
    let now = disk.read_raw(512, 512);
    assert!(now[..88] == [2; 88] && now[88..98] != [2; 10] && now[98..] == [2; 414]);
}

#[tokio::test(start_paused = true)]
async fn rates_of_errors() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let a = disk.open("a");
    let always = FaultRates { read_error: 1.0, write_unknown: 1.0, flush_error: 1.0, ..FaultRates::default() };
    disk.set_rates(always);
    assert!(matches!(a.read(META, 0, 512).await, Err(DevError::Io { .. })));
    assert!(matches!(a.write(META, 0, buf(1, 512), true).await, Err(DevError::Unknown { .. })));
    assert!(matches!(a.flush(META).await, Err(DevError::Io { .. })));
    disk.set_rates(FaultRates { write_error: 1.0, caw_miscompare: 1.0, ..FaultRates::default() });
    assert!(matches!(a.write(META, 0, buf(1, 512), false).await, Err(DevError::Io { .. })));
    assert_eq!(a.compare_and_write(4096, &[0; 512], &[1; 512]).await.unwrap(), Caw::Mismatch(vec![0; 512]));
}

#[tokio::test(start_paused = true)]
async fn readers_can_see_half_of_a_split_write() {
    let mut half = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(SimConfig { split_writes: true, ..SimConfig::new(MIB, seed) });
        let (a, b) = (disk.open("a"), disk.open("b"));
        let (w, r) = tokio::join!(a.write(META, 0, buf(1, 4096), false), b.read(META, 0, 4096));
        w.unwrap();
        let sum: usize = r.unwrap().iter().map(|b| usize::from(*b)).sum();
        half += usize::from(sum > 0 && sum < 4096);
        assert_eq!(b.read(META, 0, 4096).await.unwrap()[..], buf(1, 4096)[..]);
    }
    assert!(half > 10, "{half}");
}

#[tokio::test(start_paused = true)]
async fn misaligned_and_outside_operations_are_refused_and_not_counted() {
    let disk = SimDisk::new(SimConfig { sector_size: 4096, ..SimConfig::new(MIB, 1) });
    let a = disk.open("a");
    let range = |r: Result<(), DevError>| assert!(matches!(r, Err(DevError::Range { .. })));
    range(a.read(META, 512, 4096).await.map(|_| ()));
    range(a.readv(META, 0, &[4096, 512]).await.map(|_| ()));
    range(a.read(META, MIB, 4096).await.map(|_| ()));
    range(a.write(META, MIB - 4096, buf(0, 8192), false).await);
    range(a.compare_and_write(0, &[0; 512], &[0; 512]).await.map(|_| ()));
    range(a.compare_and_write(0, &[0; 8192], &[0; 8192]).await.map(|_| ()));
    range(a.discard(0, u64::MAX).await);
    assert_eq!(a.stats().snapshot().work(), Default::default());
}

#[tokio::test(start_paused = true)]
async fn stats_count_per_class() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let a = disk.open("a");
    a.readv(IoClass::Data, 0, &[512, 1024]).await.unwrap();
    a.writev(IoClass::Journal, 0, vec![buf(1, 512), buf(2, 512)], true).await.unwrap();
    a.flush(IoClass::Journal).await.unwrap();
    a.compare_and_write(8192, &[0; 512], &[1; 512]).await.unwrap();
    a.write(IoClass::Liveness, 4096, buf(1, 512), false).await.unwrap();
    let s = a.stats().snapshot();
    assert_eq!((s.class(IoClass::Data).reads, s.class(IoClass::Data).bytes_read), (1, 1536));
    let journal = s.class(IoClass::Journal);
    assert_eq!((journal.writes, journal.bytes_written, journal.flushes), (1, 1024, 1));
    assert_eq!(s.class(IoClass::Lock).compare_and_writes, 1);
    assert_eq!((s.class(IoClass::Liveness).writes, s.work().writes), (1, 1));
    assert_eq!(disk.open("b").stats().snapshot(), Default::default());
}

#[tokio::test(start_paused = true)]
async fn discard_leaves_the_neighbours_alone() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let a = disk.open("a");
    a.write(META, 0, buf(1, 16384), true).await.unwrap();
    a.discard(512, 8192).await.unwrap();
    let gone = arrived(&disk, 512, 16, 1, 0);
    assert!(gone.contains(&false));
    assert!(arrived(&disk, 0, 1, 1, 0)[0] && arrived(&disk, 8704, 15, 1, 0).iter().all(|x| *x));
    assert_eq!(disk.read_raw(16384, 4), [0; 4]);
}

#[test]
fn raw_access_needs_no_clock_and_snapshots_are_independent() {
    let disk = SimDisk::new(SimConfig::new(MIB, 1));
    let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
    rt.block_on(async {
        let raw = disk.open_raw();
        raw.write(META, 4096, buf(7, 512), false).await.unwrap();
        raw.flush(META).await.unwrap();
        assert_eq!(raw.read(META, 4096, 512).await.unwrap()[0], 7);
    });
    let image = disk.snapshot();
    disk.write_raw(4096, &[8]);
    disk.power_loss();
    let copy = SimDisk::from_snapshot(SimConfig::new(0, 2), &image);
    assert_eq!((copy.read_raw(4096, 2), disk.read_raw(4096, 2)), (vec![7, 7], vec![8, 7]));
    assert_eq!(copy.geometry().size, MIB);

    let file = tempfile::NamedTempFile::new().unwrap();
    image.save(file.path()).unwrap();
    let back = SimImage::load(file.path()).unwrap();
    assert!(back.pages == image.pages && back.size() == MIB);
}
