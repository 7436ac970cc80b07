//! Volumes that are locked without compare-and-write.

use std::sync::Arc;

use blockdev::{BlockDevice, Caw, IoClass};
use tokio::time::{Duration, Instant};

use super::harness::*;
use crate::*;

const D: LockId = LockId::Domain(3);

#[tokio::test(start_paused = true)]
async fn a_lock_costs_three_reads_and_three_writes() {
    let w = World::plain(3, 61, |_| {}).await;
    let (a, b) = (w.peer().await, w.peer().await);
    assert_ne!(a.id().slot, b.id().slot);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = a.io();
    a.take(D, Mode::Exclusive).await;
    // The cell is lowered behind the answer.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let after = a.io();
    assert_eq!((after.reads - before.reads, after.writes - before.writes), (3, 3));
    assert_eq!(after.compare_and_writes, 0, "it has none");
    b.take(D, Mode::Exclusive).await;
    assert_eq!(w.lock(D).held_by(b.id()), Some(Mode::Exclusive));
}

#[tokio::test(start_paused = true)]
async fn many_join_at_once_each_in_a_slot_of_its_own() {
    for seed in 62..66 {
        let w = World::plain(6, seed, |_| {}).await;
        let join = || w.peer_with(Options::default());
        let (a, b, c, d) = tokio::join!(join(), join(), join(), join());
        let slots: std::collections::BTreeSet<_> = [a, b, c, d].map(|p| p.unwrap().id().slot).into();
        assert_eq!(slots.len(), 4);
    }
}

/// Changes the sector `n` times, as many as have succeeded are returned.
async fn count_up(dev: Arc<dyn BlockDevice>, at: u64, n: u64) -> u64 {
    let mut done = 0;
    for _ in 0..n {
        let Ok(old) = dev.read(IoClass::Lock, at, 512).await else { break };
        let mut new = old.to_vec();
        let value = u64::from_le_bytes(old[..8].try_into().unwrap()) + 1;
        new[..8].copy_from_slice(&value.to_le_bytes());
        match dev.compare_and_write(at, &old, &new).await {
            Ok(Caw::Written) => done += 1,
            Ok(Caw::Mismatch(_)) => {}
            Err(_) => break,
        }
    }
    done
}

#[tokio::test(start_paused = true)]
async fn no_change_is_lost() {
    for seed in 70..76 {
        let w = World::plain(4, seed, |cfg| cfg.latency_us = 100..=8000).await;
        let peers = [w.peer().await, w.peer().await, w.peer().await, w.peer().await];
        let at = 768 << 10;
        let tasks: Vec<_> = peers.iter().map(|p| tokio::spawn(count_up(p.node.guarded_device(), at, 150))).collect();
        let mut done = 0;
        for t in tasks {
            let of_one = t.await.unwrap();
            assert!(of_one > 0, "seed {seed}: one never gets its turn");
            done += of_one;
        }
        let sector = w.disk.read_raw(at, 512);
        assert_eq!(u64::from_le_bytes(sector[..8].try_into().unwrap()), done, "seed {seed}");
    }
}

/// Dies at each I/O of a change: the others get the lock no later than a takeover takes.
#[tokio::test(start_paused = true)]
async fn a_crash_inside_stops_the_others_no_longer_than_a_takeover() {
    for n in 1..=7 {
        let w = World::plain(3, 80 + n, |cfg| cfg.late_write_delay = Duration::from_secs(4)).await;
        let (a, b, c) = (w.peer().await, w.peer().await, w.peer().await);
        tokio::time::sleep(Duration::from_secs(3)).await;
        a.dev.crash_at(n);
        let id = a.id();
        let dying = a.node.clone();
        let acquire = tokio::spawn(async move { dying.acquire(D, Mode::Exclusive).await });
        tokio::time::timeout(Duration::from_secs(30), a.dev.crashed()).await.unwrap();
        let start = Instant::now();
        a.crash();
        let longest = w.timeouts.dead_unfenced() + 4 * w.timeouts.heartbeat() + Duration::from_secs(5);
        let (first, second) =
            tokio::join!(b.node.acquire(D, Mode::Exclusive), c.node.acquire(LockId::Domain(4), Mode::Shared));
        first.unwrap();
        second.unwrap();
        assert!(start.elapsed() < longest, "I/O {n}: {:?}", start.elapsed());
        until(longest, "recovery", || w.slot(id.slot).state == SlotState::Free).await;
        acquire.abort();
        assert_eq!(w.replays.log.lock().iter().filter(|(v, _)| *v == id).count(), 1, "I/O {n}");
        // The next in that slot finds no cell of its predecessor raised.
        let d = w.peer().await;
        assert_eq!(d.id(), NodeId { slot: id.slot, incarnation: 2 });
        d.take(D, Mode::Exclusive).await;
    }
}

/// A joining node dies at each of its first I/Os: others take other slots, and that one too when it was waited out.
#[tokio::test(start_paused = true)]
async fn a_joining_node_may_die_anywhere() {
    for n in 1..=30 {
        let w = World::plain(2, 120 + n, |_| {}).await;
        let dev = w.disk.open("dies");
        dev.crash_at(n);
        let crashed = dev.clone();
        tokio::select! {
            joined = w.peer_on(dev, Options { name: "dies", ..Options::default() }) => drop(joined.map(|p| p.crash())),
            () = crashed.crashed() => {}
        }
        let b = w.peer_with(Options::default()).await.unwrap_or_else(|e| panic!("I/O {n}: {e}"));
        let c = w.peer_with(Options::default()).await.unwrap_or_else(|e| panic!("I/O {n}, the second: {e}"));
        assert_ne!(b.id().slot, c.id().slot, "I/O {n}");
        b.take(D, Mode::Exclusive).await;
        c.take(D, Mode::Exclusive).await;
    }
}

#[tokio::test(start_paused = true)]
async fn everybody_leaves_and_comes_back() {
    let w = World::plain(2, 160, |_| {}).await;
    for life in 1..4 {
        let (a, b) = (w.peer().await, w.peer().await);
        assert_eq!((a.id().incarnation, b.id().incarnation), (life, life));
        a.take(D, Mode::Shared).await;
        b.take(D, Mode::Shared).await;
        a.node.leave().await.unwrap();
        b.node.leave().await.unwrap();
    }
}
