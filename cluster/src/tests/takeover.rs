//! Nodes that die, hang, stall or lose the device.

use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, DevError, FencingKind, IoClass};
use tokio::time::{Duration, Instant};

use super::harness::*;
use crate::*;

const D: LockId = LockId::Domain(3);

/// How long a waiter is stopped by a holder that dies.
async fn takeover(fencing: FencingKind, seed: u64) -> (World, Duration) {
    let w = World::fenced_by(4, seed, fencing).await;
    let (a, b, c) = (w.peer().await, w.peer().await, w.peer().await);
    let held = a.take(D, Mode::Exclusive).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let dead = a.crash();
    let start = Instant::now();
    let grant = b.take(D, Mode::Exclusive).await;
    let took = start.elapsed();
    assert!(grant.after_crash);
    assert_eq!(grant.previous_tenure, held.tenure);
    assert_eq!(w.replays.log.lock().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [dead]);
    assert_eq!((w.slot(dead.slot).state, w.slot(dead.slot).last_end()), (SlotState::Free, LastEnd::Crash));
    let told = b.client.recovered.lock().len() + c.client.recovered.lock().len();
    assert_eq!(told, 1, "exactly one survivor recovers");
    (w, took)
}

#[tokio::test(start_paused = true)]
async fn a_dead_process_is_taken_over_within_two_heartbeats() {
    for seed in 41..45 {
        let (w, took) = takeover(FencingKind::ProcessLock, seed).await;
        assert!(took < 2 * w.timeouts.heartbeat() + Duration::from_millis(300), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_node_is_taken_over_by_reservations_after_its_lease() {
    let (w, took) = takeover(FencingKind::Reservations, 45).await;
    let bounds = w.timeouts.lease()..w.timeouts.dead_after() + 3 * w.timeouts.heartbeat();
    assert!(bounds.contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn without_fencing_the_queueing_time_is_waited_out() {
    let (w, took) = takeover(FencingKind::None, 46).await;
    let bounds =
        w.timeouts.dead_unfenced() - w.timeouts.heartbeat()..w.timeouts.dead_unfenced() + 3 * w.timeouts.heartbeat();
    assert!(bounds.contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_recoverer_that_dies_is_replaced() {
    let w = World::new(4, 47).await;
    let a = w.peer().await;
    let slow = || Options { replay_takes: Duration::from_secs(20), ..Options::default() };
    let b = w.peer_with(slow()).await.unwrap();
    a.take(D, Mode::Exclusive).await;
    let first = a.crash();
    until(Duration::from_secs(4), "b recovers a", || !w.replays.log.lock().is_empty()).await;
    let c = w.peer().await;
    let second = b.crash();
    let start = Instant::now();
    c.take(D, Mode::Exclusive).await;
    assert!(start.elapsed() < 5 * w.timeouts.heartbeat(), "{:?}", start.elapsed());
    let replayed: Vec<_> = w.replays.log.lock().iter().map(|(n, _)| *n).collect();
    assert_eq!(replayed, [first, second, first]);
    until(Duration::from_secs(3), "both are free", || {
        [first, second].iter().all(|n| w.slot(n.slot).state == SlotState::Free)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn many_survivors_one_replay_at_a_time() {
    for seed in 50..56 {
        let w = World::new(8, seed).await;
        let mut peers = Vec::new();
        for _ in 0..8 {
            peers.push(w.peer().await);
        }
        let dead: Vec<_> = peers.drain(..3).map(Peer::crash).collect();
        until(Duration::from_secs(5), "all recovered", || dead.iter().all(|n| w.slot(n.slot).state == SlotState::Free))
            .await;
        assert_eq!(w.replays.log.lock().len(), 3);
        assert_eq!(*w.replays.most.lock(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_replay_that_fails_is_tried_again() {
    let w = World::new(4, 57).await;
    let a = w.peer().await;
    let b = w.peer_with(Options { failures: 2, ..Options::default() }).await.unwrap();
    a.take(D, Mode::Exclusive).await;
    a.crash();
    b.take(D, Mode::Exclusive).await;
    assert_eq!(w.replays.log.lock().len(), 3);
}

async fn try_write(dev: &Arc<dyn BlockDevice>) -> std::result::Result<(), DevError> {
    dev.write(IoClass::Data, 1 << 19, Arc::new(AlignedBuf::zeroed(512)), false).await
}

#[tokio::test(start_paused = true)]
async fn a_node_cut_off_stops_writing_before_it_is_taken_over() {
    for (fencing, seed) in [(FencingKind::None, 58), (FencingKind::Reservations, 59), (FencingKind::ProcessLock, 60)] {
        let w = World::fenced_by(4, seed, fencing).await;
        let (a, b) = (w.peer().await, w.peer().await);
        a.take(D, Mode::Exclusive).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        a.dev.cut(true);
        let (dev, cut) = (a.node.guarded_device(), Instant::now());
        until(w.timeouts.lease() + Duration::from_millis(50), "lapse", || a.client.lapsed.lock().is_some()).await;
        assert!(matches!(try_write(&dev).await, Err(DevError::Fenced)));
        assert!(w.replays.log.lock().is_empty(), "nobody was faster");
        assert!(a.client.lapsed.lock().unwrap() - cut <= w.timeouts.lease() + Duration::from_millis(10));
        assert!(matches!(a.node.acquire(D, Mode::Shared).await, Err(ClusterError::Lapsed)));
        assert_eq!(a.node.held(D), None);
        b.take(D, Mode::Exclusive).await;
        let (dead, at) = w.replays.log.lock()[0];
        assert_eq!(dead, a.id());
        assert!(at > a.client.lapsed.lock().unwrap());
        // The path is back: still nothing may be written under the old life, and a new one starts elsewhere.
        a.dev.cut(false);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(matches!(try_write(&dev).await, Err(DevError::Fenced)));
        let again = w.peer_on(a.dev.clone(), Options::default()).await.unwrap();
        assert!(try_write(&again.node.guarded_device()).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_hangs_and_wakes_finds_itself_lapsed() {
    let w = World::fenced_by(4, 61, FencingKind::Reservations).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.take(D, Mode::Exclusive).await;
    a.dev.hang(true);
    b.take(D, Mode::Exclusive).await;
    a.dev.hang(false);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(a.client.lapsed.lock().is_some());
    assert!(matches!(try_write(&a.node.guarded_device()).await, Err(DevError::Fenced)));
}

#[tokio::test(start_paused = true)]
async fn a_stall_of_the_device_kills_nobody() {
    for (fencing, seed) in [(FencingKind::None, 62), (FencingKind::Reservations, 63), (FencingKind::ProcessLock, 64)] {
        let w = World::fenced_by(4, seed, fencing).await;
        let (a, b) = (w.peer().await, w.peer().await);
        a.take(D, Mode::Exclusive).await;
        for _ in 0..4 {
            w.disk.stall(w.timeouts.lease() - 2 * w.timeouts.heartbeat());
            tokio::time::sleep(Duration::from_secs(8)).await;
        }
        assert!(a.client.lapsed.lock().is_none() && b.client.lapsed.lock().is_none());
        assert!(a.node.held(D).is_some());
        assert!(w.replays.log.lock().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_is_declared_dead_by_a_node_that_was_stalled_itself() {
    // Only b is slow: what it saw before and after says nothing of what happened in between.
    let w = World::fenced_by(4, 65, FencingKind::Reservations).await;
    let (a, b) = (w.peer().await, w.peer().await);
    for _ in 0..5 {
        b.dev.hang(true);
        tokio::time::sleep(w.timeouts.lease() - Duration::from_millis(1500)).await;
        b.dev.hang(false);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    assert!(a.client.lapsed.lock().is_none());
    assert!(w.replays.log.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn all_dead_one_slot_is_adopted_and_the_others_recovered() {
    for (fencing, seed) in [(FencingKind::ProcessLock, 66), (FencingKind::Reservations, 67), (FencingKind::None, 68)] {
        let w = World::fenced_by(2, seed, fencing).await;
        let (a, b) = (w.peer().await, w.peer().await);
        a.take(D, Mode::Exclusive).await;
        let dead = [a.crash(), b.crash()];
        let start = Instant::now();
        let c = w.peer().await;
        assert!(start.elapsed() < w.timeouts.dead_unfenced() + 4 * w.timeouts.heartbeat());
        assert!(dead.contains(&NodeId { slot: c.id().slot, incarnation: 1 }));
        assert_eq!(c.id().incarnation, 2);
        assert_eq!(w.replays.log.lock()[0].0.slot, c.id().slot, "replayed before the join ended");
        assert!(c.take(D, Mode::Exclusive).await.after_crash);
        until(w.timeouts.dead_unfenced() + Duration::from_secs(9), "the other", || w.replays.log.lock().len() == 2)
            .await;
        assert_eq!(*w.replays.most.lock(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_adopter_that_dies_is_replaced() {
    for fencing in [FencingKind::ProcessLock, FencingKind::Reservations] {
        let w = World::fenced_by(1, 69, fencing).await;
        let a = w.peer().await;
        a.take(D, Mode::Exclusive).await;
        let dead = a.crash();
        let dev = w.disk.open("adopter");
        let slow = Options { replay_takes: Duration::from_secs(60), ..Options::default() };
        {
            let join = w.peer_on(dev.clone(), slow);
            tokio::pin!(join);
            let adopting = until(Duration::from_secs(30), "adoption", || w.slot(0).state != SlotState::Live);
            tokio::select! { biased; () = adopting => {}, _ = &mut join => panic!("too fast") }
        }
        dev.crash();
        assert!(matches!(w.slot(0).state, SlotState::Adopting { next: 2 }));
        let b = w.peer().await;
        assert_eq!(b.id(), NodeId { slot: 0, incarnation: 3 });
        assert!(w.replays.log.lock().iter().all(|(n, _)| *n == dead));
        assert!(b.take(D, Mode::Exclusive).await.after_crash);
    }
}

#[tokio::test(start_paused = true)]
async fn an_adoption_whose_replay_fails_tells_why() {
    let w = World::new(1, 70).await;
    w.peer().await.crash();
    let error = w.peer_with(Options { failures: 1, ..Options::default() }).await.err();
    assert!(matches!(error, Some(ClusterError::Recovery { slot: 0, .. })), "{error:?}");
    assert_eq!(w.peer().await.id(), NodeId { slot: 0, incarnation: 3 });
}

#[tokio::test(start_paused = true)]
async fn membership_survives_unknown_outcomes() {
    use blockdev::sim::FaultRates;
    for seed in 80..90 {
        let w = World::new(4, seed).await;
        w.disk.set_rates(FaultRates { caw_unknown: 0.4, caw_miscompare: 0.2, ..FaultRates::default() });
        let (a, b) = (w.peer().await, w.peer().await);
        a.take(D, Mode::Exclusive).await;
        let dead = a.crash();
        b.take(D, Mode::Exclusive).await;
        assert_eq!(w.replays.log.lock().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [dead], "seed {seed}");
        b.node.leave().await.unwrap();
        assert_eq!(w.slot(b.id().slot).last_end(), LastEnd::Clean);
    }
}

/// An unmount is not kept waiting for a compare-and-write of long ago.
#[tokio::test(start_paused = true)]
async fn unknown_outcomes_do_not_delay_leaving() {
    use blockdev::sim::FaultRates;
    let w = World::new(2, 92).await;
    let a = w.peer().await;
    w.disk.set_rates(FaultRates { caw_unknown: 0.9, ..FaultRates::default() });
    a.take(D, Mode::Exclusive).await;
    w.disk.set_rates(FaultRates::default());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let start = Instant::now();
    a.node.leave().await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_run() {
    async fn run() -> u64 {
        let w = World::new(4, 91).await;
        let (a, b, c) = (w.peer().await, w.peer().await, w.peer().await);
        a.take(D, Mode::Exclusive).await;
        b.take(D, Mode::Shared).await;
        a.crash();
        tokio::join!(b.take(D, Mode::Exclusive), c.take(D, Mode::Exclusive));
        w.disk.trace_hash()
    }
    assert_eq!(run().await, run().await);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_what_cannot_be_recovered_gets_an_error() {
    let w = World::fenced_by(4, 70, FencingKind::ProcessLock).await;
    let hopeless = Options { failures: u32::MAX, ..Options::default() };
    let (a, b) = (w.peer().await, w.peer_with(hopeless).await.unwrap());
    a.take(D, Mode::Exclusive).await;
    let slot = a.crash().slot;
    let start = Instant::now();
    let err = b.node.acquire(D, Mode::Shared).await.unwrap_err();
    assert!(matches!(err, ClusterError::Recovery { slot: s, .. } if s == slot), "{err}");
    assert!(start.elapsed() < Duration::from_secs(20));
    // The rest of the volume can be used, and the node can leave.
    b.take(LockId::Domain(2), Mode::Exclusive).await;
    b.node.leave().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_damaged_slot_block_is_told_to_who_waits_for_its_node() {
    let w = World::fenced_by(4, 71, FencingKind::ProcessLock).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.take(D, Mode::Exclusive).await;
    let slot = a.crash().slot;
    let at = w.layout.slot_block(slot);
    let raw = w.disk.open_raw();
    raw.write(IoClass::Meta, at, Arc::new(AlignedBuf::zeroed(512)), true).await.unwrap();
    let err = b.node.acquire(D, Mode::Shared).await.unwrap_err();
    assert!(matches!(err, ClusterError::Damaged { offset, .. } if offset == at), "{err}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_can_read_nothing_for_a_lease_ends_and_the_others_go_on() {
    let w = World::new(4, 77).await;
    let dev = w.disk.open("deaf");
    let (a, b) = (w.peer_on(dev.clone(), Options::default()).await.unwrap(), w.peer().await);
    a.take(D, Mode::Exclusive).await;
    dev.fail_all_reads(true);
    tokio::time::sleep(w.timeouts.lease() / 2).await;
    dev.fail_all_reads(false);
    tokio::time::sleep(w.timeouts.lease()).await;
    assert!(a.node.is_live(), "shorter than a lease it is nothing");
    dev.fail_all_reads(true);
    let start = Instant::now();
    b.take(D, Mode::Exclusive).await;
    let took = start.elapsed();
    assert!(took < w.timeouts.lease() + 4 * w.timeouts.heartbeat(), "{took:?}");
    assert!(!a.node.is_live());
}
