//! File locks of several nodes on the simulated device: exclusion, waking, order, and what they cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::common::{WHO, check_clean, dir, disk, file, mount, mount_on};
use blockdev::sim::SimDisk;
use fs_core::{FileLock, FsError, HeldLock, ROOT_INO, Space, TO_THE_END, Volume, WriteOptions};
use tokio::time::Instant;

fn write(owner: u64) -> FileLock {
    FileLock { space: Space::Record, owner, first: 0, last: TO_THE_END, exclusive: true, pid: 100 + owner as u32 }
}

fn read(owner: u64) -> FileLock {
    FileLock { exclusive: false, ..write(owner) }
}

fn flock(owner: u64, exclusive: bool) -> FileLock {
    FileLock { space: Space::Flock, exclusive, ..write(owner) }
}

async fn never() {
    std::future::pending().await
}

async fn wait(v: &Volume, f: u64, l: FileLock) {
    v.lock(f, l, never()).await.expect("lock");
}

fn refused(r: fs_core::Result<()>) {
    assert!(matches!(r, Err(FsError::Locked)), "{r:?}");
}

/// A directory with an open file, in a domain of its own.
async fn open_file(v: &Volume) -> u64 {
    let d = v.mkdir(WHO, ROOT_INO, b"box", dir()).await.expect("mkdir").value.ino;
    v.mknod(WHO, d, b"mbox", file(), true).await.expect("create").value.ino
}

async fn three() -> (Arc<SimDisk>, [Arc<Volume>; 3], u64) {
    let disk = disk(64 << 20).await;
    let all = [mount(&disk, "a").await, mount(&disk, "b").await, mount(&disk, "c").await];
    let f = open_file(&all[0]).await;
    for v in &all[1..] {
        drop(v.open(f).await.expect("open"));
    }
    (disk, all, f)
}

async fn end(disk: &Arc<SimDisk>, nodes: &[Arc<Volume>]) {
    for v in nodes {
        v.unmount().await.expect("unmount");
    }
    check_clean(disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn locks_exclude_across_nodes_and_tell_who_is_in_the_way() {
    let (disk, [a, b, c], f) = three().await;
    let part = |l: FileLock, first, last| FileLock { first, last, ..l };
    a.try_lock(f, part(write(1), 10, 19)).await.expect("free");
    refused(b.try_lock(f, part(read(1), 19, 30)).await);
    b.try_lock(f, part(read(1), 20, 30)).await.expect("beside it");
    c.try_lock(f, part(read(1), 25, TO_THE_END)).await.expect("shared");
    refused(a.try_lock(f, part(write(1), 0, 20)).await);
    let found = c.test_lock(f, write(1)).await.expect("test");
    assert_eq!(found, Some(HeldLock { first: 10, last: 19, exclusive: true, pid: None }));
    let found = a.test_lock(f, write(2)).await.expect("test");
    assert_eq!(found, Some(HeldLock { first: 10, last: 19, exclusive: true, pid: Some(101) }));
    // A downgrade in the middle, then part of it goes.
    a.try_lock(f, part(read(1), 12, 15)).await.expect("downgrade");
    b.try_lock(f, part(read(2), 12, 15)).await.expect("readers share it");
    refused(b.try_lock(f, part(read(2), 11, 12)).await);
    a.unlock(f, part(write(1), 0, 11)).await.expect("unlock");
    b.try_lock(f, part(write(2), 10, 11)).await.expect("free now");
    a.unlock(f, FileLock::all_of(Space::Record, 1)).await.expect("close");
    assert_eq!(b.test_lock(f, part(write(2), 12, 19)).await.expect("test"), None);
    end(&disk, &[a, b, c]).await;
}

#[tokio::test(start_paused = true)]
async fn flock_is_apart_from_fcntl_and_converts() {
    let (disk, [a, b, c], f) = three().await;
    a.try_lock(f, write(1)).await.expect("fcntl");
    b.try_lock(f, flock(1, true)).await.expect("flock does not meet it");
    refused(c.try_lock(f, flock(1, false)).await);
    b.try_lock(f, flock(1, false)).await.expect("shared now");
    c.try_lock(f, flock(1, false)).await.expect("shared");
    // Both want more: the first gives up what it has, as on Linux, so that one of them gets it.
    let (bb, cc) = (b.clone(), c.clone());
    let both = async {
        tokio::join!(
            async {
                wait(&bb, f, flock(1, true)).await;
                bb.unlock(f, flock(1, true)).await.expect("unlock");
            },
            async {
                wait(&cc, f, flock(1, true)).await;
                cc.unlock(f, flock(1, true)).await.expect("unlock");
            }
        )
    };
    tokio::time::timeout(Duration::from_secs(2), both).await.expect("no deadlock");
    a.try_lock(f, flock(9, true)).await.expect("free");
    end(&disk, &[a, b, c]).await;
}

/// The unlock wakes the waiter, through the doorbell alone here, in well under the time after which a waiter looks by itself.
#[tokio::test(start_paused = true)]
async fn a_waiter_is_woken_by_the_unlock() {
    let (disk, [a, b, c], f) = three().await;
    for round in 0..10 {
        wait(&a, f, write(1)).await;
        let waiting = {
            let b = b.clone();
            tokio::spawn(async move {
                wait(&b, f, write(1)).await;
                Instant::now()
            })
        };
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!waiting.is_finished(), "round {round}: both have it");
        let unlocked = Instant::now();
        a.unlock(f, write(1)).await.expect("unlock");
        let took = waiting.await.expect("waiter") - unlocked;
        assert!(took < Duration::from_millis(400), "round {round}: {took:?}");
        b.unlock(f, write(1)).await.expect("unlock");
    }
    end(&disk, &[a, b, c]).await;
}

#[tokio::test(start_paused = true)]
async fn a_writer_is_served_between_readers_and_all_in_the_order_of_asking() {
    let (disk, nodes, f) = three().await;
    let [a, b, c] = &nodes;
    wait(a, f, read(1)).await;
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for (n, (v, l)) in [(b, write(1)), (c, read(1)), (a, read(2)), (b, write(2)), (c, write(3))].into_iter().enumerate()
    {
        let (v, order) = (v.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            wait(&v, f, l).await;
            order.lock().push(n);
            tokio::time::sleep(Duration::from_millis(50)).await;
            v.unlock(f, l).await.expect("unlock");
        }));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(order.lock().is_empty(), "the readers wait behind the writer: {:?}", order.lock());
    refused(a.try_lock(f, read(7)).await);
    a.unlock(f, read(1)).await.expect("unlock");
    for t in tasks {
        tokio::time::timeout(Duration::from_secs(5), t).await.expect("in time").expect("waiter");
    }
    let mut got = order.lock().clone();
    got[1..3].sort_unstable();
    assert_eq!(got, [0, 1, 2, 3, 4]);
    end(&disk, &nodes).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_nodes_locks_and_waits_end_with_it() {
    let disk = disk(64 << 20).await;
    let (dev_a, dev_b) = (disk.open("a"), disk.open("b"));
    let (a, b) = (mount_on(dev_a.clone(), "a").await, mount_on(dev_b.clone(), "b").await);
    let c = mount(&disk, "c").await;
    let f = open_file(&a).await;
    drop((b.open(f).await.expect("open"), c.open(f).await.expect("open")));
    wait(&a, f, write(1)).await;
    let waiter = |v: &Arc<Volume>| {
        let v = v.clone();
        tokio::spawn(async move { v.lock(f, write(1), never()).await })
    };
    let lost = waiter(&b);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let served = waiter(&c);
    tokio::time::sleep(Duration::from_millis(300)).await;
    dev_b.crash();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!served.is_finished(), "the dead waiter held nothing");
    dev_a.crash();
    let start = Instant::now();
    served.await.expect("waiter").expect("lock");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    lost.abort();
    end(&disk, &[c]).await;
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_wait_leaves_nothing_behind() {
    let (disk, [a, b, c], f) = three().await;
    wait(&a, f, write(1)).await;
    b.try_lock(f, FileLock { first: 5, last: 5, ..read(3) }).await.expect_err("held");
    let soon = tokio::time::sleep(Duration::from_millis(300));
    let r = b.lock(f, write(3), soon).await;
    assert!(matches!(r, Err(FsError::Interrupted)), "{r:?}");
    // One that was dropped.
    let dropped = tokio::time::timeout(Duration::from_millis(300), c.lock(f, write(3), never())).await;
    assert!(dropped.is_err());
    tokio::time::sleep(Duration::from_millis(500)).await;
    a.unlock(f, write(1)).await.expect("unlock");
    a.try_lock(f, write(2)).await.expect("nobody is ahead");
    end(&disk, &[a, b, c]).await;
}

#[tokio::test(start_paused = true)]
async fn a_circle_of_waits_is_refused() {
    let (disk, [a, b, c], f) = three().await;
    let other = a.mkdir(WHO, ROOT_INO, b"other", dir()).await.expect("mkdir").value.ino;
    let g = a.mknod(WHO, other, b"g", file(), true).await.expect("create").value.ino;
    // Within a node, in two domains.
    wait(&a, f, write(1)).await;
    wait(&a, g, write(2)).await;
    let waiting = {
        let a = a.clone();
        tokio::spawn(async move { a.lock(g, write(1), never()).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    let r = a.lock(f, write(2), never()).await;
    assert!(matches!(r, Err(FsError::Deadlock)), "{r:?}");
    a.unlock(g, FileLock::all_of(Space::Record, 2)).await.expect("unlock");
    waiting.await.expect("waiter").expect("lock");
    a.unlock(g, FileLock::all_of(Space::Record, 1)).await.expect("unlock");
    // Between nodes, in one domain.
    let part = |l: FileLock, at| FileLock { first: at, last: at, ..l };
    a.unlock(f, FileLock::all_of(Space::Record, 1)).await.expect("unlock");
    wait(&a, f, part(write(1), 0)).await;
    wait(&b, f, part(write(1), 1)).await;
    let waiting = {
        let a = a.clone();
        tokio::spawn(async move { a.lock(f, part(write(1), 1), never()).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    let r = b.lock(f, part(write(1), 0), never()).await;
    assert!(matches!(r, Err(FsError::Deadlock)), "{r:?}");
    b.unlock(f, FileLock::all_of(Space::Record, 1)).await.expect("unlock");
    waiting.await.expect("waiter").expect("lock");
    end(&disk, &[a, b, c]).await;
}

/// Read locks crosswise with writers waiting behind them: no circle on a local filesystem, so none here.
#[tokio::test(start_paused = true)]
async fn waiting_behind_waiters_ends() {
    let (disk, [a, b, c], f) = three().await;
    let other = a.mkdir(WHO, ROOT_INO, b"other", dir()).await.expect("mkdir").value.ino;
    let g = a.mknod(WHO, other, b"g", file(), true).await.expect("create").value.ino;
    wait(&a, f, read(1)).await;
    wait(&b, g, read(1)).await;
    let writer = |v: &Arc<Volume>, on| {
        let v = v.clone();
        tokio::spawn(async move {
            wait(&v, on, write(5)).await;
            v.unlock(on, write(5)).await.expect("unlock");
        })
    };
    let writers = [writer(&c, f), writer(&c, g)];
    tokio::time::sleep(Duration::from_millis(300)).await;
    let crosswise = async { tokio::join!(wait(&a, g, read(1)), wait(&b, f, read(1))) };
    tokio::time::timeout(Duration::from_secs(8), crosswise).await.expect("they overtake the writers");
    for (v, on) in [(&a, f), (&a, g), (&b, f), (&b, g)] {
        v.unlock(on, read(1)).await.expect("unlock");
    }
    for w in writers {
        w.await.expect("writer");
    }
    end(&disk, &[a, b, c]).await;
}

/// A counter in a file, read and written under each kind of lock by many owners on all nodes.
#[tokio::test(start_paused = true)]
async fn a_counter_under_locks_counts_everything() {
    for lock in [write as fn(u64) -> FileLock, |o| flock(o, true)] {
        let (disk, nodes, f) = three().await;
        nodes[0].write(f, 0, &0u64.to_le_bytes(), WriteOptions::default()).await.expect("write");
        let inside = Arc::new(AtomicU64::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for owner in 0..9u64 {
            let (v, inside) = (nodes[owner as usize % 3].clone(), inside.clone());
            tasks.spawn(async move {
                for _ in 0..20 {
                    wait(&v, f, lock(owner)).await;
                    assert_eq!(inside.fetch_add(1, Relaxed), 0, "two hold the lock");
                    let now = v.read(f, 0, 8).await.expect("read").value;
                    let now = u64::from_le_bytes(now.try_into().expect("8 bytes"));
                    drop(v.write(f, 0, &(now + 1).to_le_bytes(), WriteOptions::default()).await.expect("write"));
                    inside.fetch_sub(1, Relaxed);
                    v.unlock(f, lock(owner)).await.expect("unlock");
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("worker");
        }
        assert_eq!(nodes[0].read(f, 0, 8).await.expect("read").value, 180u64.to_le_bytes());
        end(&disk, &nodes).await;
    }
}

/// An unlock may have to wait for the domain, its process not: what is asked next, by the same owner too, comes after it.
#[tokio::test(start_paused = true)]
async fn an_unlock_that_waits_takes_nothing_that_was_asked_for_later() {
    let (disk, [a, b, c], f) = three().await;
    for l in [write(1), flock(1, true)] {
        wait(&a, f, l).await;
        // The domain goes to another node.
        refused(b.try_lock(f, l).await);
        assert!(a.begin_unlock(f, l));
        let (again, unlocked) = tokio::join!(a.try_lock(f, l), a.finish_unlocks(f));
        again.expect("its own lock was given up");
        unlocked.expect("unlock");
        refused(b.try_lock(f, l).await);
        a.unlock(f, l).await.expect("unlock");
        b.try_lock(f, l).await.expect("free");
        b.unlock(f, l).await.expect("unlock");
    }
    end(&disk, &[a, b, c]).await;
}

#[tokio::test(start_paused = true)]
async fn locks_that_nobody_else_asks_for_cost_no_io() {
    let (disk, nodes, f) = three().await;
    let a = &nodes[0];
    wait(a, f, write(1)).await;
    a.unlock(f, write(1)).await.expect("unlock");
    let (io, locks) = (a.device_stats(), a.lock_stats());
    for i in 0..500 {
        wait(a, f, write(i % 3)).await;
        a.unlock(f, write(i % 3)).await.expect("unlock");
        wait(a, f, flock(i % 3, true)).await;
        assert!(a.begin_unlock(f, FileLock::all_of(Space::Flock, i % 3)));
        a.finish_unlocks(f).await.expect("close");
    }
    let c = a.device_stats().since(&io).work();
    assert_eq!(c, blockdev::ClassStats::default());
    let after = a.lock_stats();
    assert_eq!(
        (after.hints_sent, after.doorbells_written, after.wakes),
        (locks.hints_sent, locks.doorbells_written, locks.wakes)
    );
    end(&disk, &nodes).await;
}

/// Two nodes that want the same lock all the time: what a change of hands costs.
#[tokio::test(start_paused = true)]
async fn what_a_handover_costs() {
    let (disk, nodes, f) = three().await;
    let before: Vec<_> = nodes.iter().map(|v| v.device_stats()).collect();
    const ROUNDS: u64 = 50;
    let work = |v: Arc<Volume>| async move {
        for _ in 0..ROUNDS {
            wait(&v, f, write(1)).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            v.unlock(f, write(1)).await.expect("unlock");
        }
    };
    tokio::join!(work(nodes[0].clone()), work(nodes[1].clone()));
    let costs: Vec<_> = nodes[..2].iter().zip(&before).map(|(v, b)| v.device_stats().since(b).work()).collect();
    let each = |f: fn(&blockdev::ClassStats) -> u64| costs.iter().map(f).sum::<u64>() as f64 / (2 * ROUNDS) as f64;
    let (swaps, writes, reads) = (each(|c| c.compare_and_writes), each(|c| c.writes), each(|c| c.reads));
    println!("each time the lock changes hands: {swaps:.2} compare-and-writes, {writes:.2} writes, {reads:.2} reads");
    assert!(swaps <= 2.5, "{swaps} compare-and-writes");
    end(&disk, &nodes).await;
}
