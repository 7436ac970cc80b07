//! Several nodes that want the same locks, with hints that get lost and a device whose answers do.

use blockdev::sim::FaultRates;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Duration, Instant};

use super::harness::*;
use crate::simnet::NetRates;
use crate::*;

const D: LockId = LockId::Domain(3);

/// Random acquires and releases, voluntary and on demand; the oracle checks I4, this that nobody waits for ever.
async fn storm(seed: u64, rates: FaultRates, net: NetRates, rounds: usize) {
    let w = World::with(6, seed, |cfg| cfg.latency_us = 100..=1500).await;
    w.net.set_rates(net);
    let mut peers = Vec::new();
    for i in 0..4 {
        let options = Options { hints: i != 3, ..Options::default() };
        peers.push(std::sync::Arc::new(w.peer_with(options).await.unwrap()));
    }
    w.disk.set_rates(rates);
    let mut workers = Vec::new();
    for (i, peer) in peers.iter().enumerate() {
        let (peer, oracle) = (peer.clone(), w.oracle.clone());
        workers.push(tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed * 31 + i as u64);
            for _ in 0..rounds {
                let id = LockId::Domain(rng.random_range(0..3));
                let mode = if rng.random_bool(0.5) { Mode::Exclusive } else { Mode::Shared };
                let patience = Duration::from_millis(rng.random_range(1..60));
                if rng.random_bool(0.15) {
                    // Stops waiting: whatever is granted later must not block the others.
                    if let Ok(grant) = tokio::time::timeout(patience, peer.node.acquire(id, mode)).await {
                        grant.unwrap();
                        oracle.check(id);
                    }
                    continue;
                }
                let start = Instant::now();
                let pin = peer.client.pins.lock().await;
                drop(pin);
                let patience = Duration::from_secs(20);
                let taken = tokio::time::timeout(patience, peer.take(id, mode)).await;
                assert!(taken.is_ok(), "seed {seed}: {} waits for {id} {mode:?} since {start:?}", peer.id());
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..10))).await;
                if rng.random_bool(0.3) {
                    let _pin = peer.client.pins.lock().await;
                    peer.give(id, None).await;
                }
            }
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    for peer in &peers {
        assert!(peer.client.lapsed.lock().is_none(), "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn storm_with_lossy_hints() {
    for seed in 1..=6 {
        let delay = (Duration::from_micros(100), Duration::from_millis(30));
        storm(seed, FaultRates::default(), NetRates { loss: 0.3, duplicate: 0.2, delay, forged: 0.2 }, 60).await;
    }
}

#[tokio::test(start_paused = true)]
async fn storm_with_unknown_outcomes_and_miscompares() {
    for seed in [11, 12, 13, 14, 15, 1035] {
        let rates = FaultRates { caw_unknown: 0.1, caw_miscompare: 0.1, read_error: 0.01, ..FaultRates::default() };
        storm(seed, rates, NetRates::default(), 40).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_writer_is_not_starved_by_readers() {
    let w = World::new(6, 21).await;
    let readers = [w.peer().await, w.peer().await, w.peer().await].map(std::sync::Arc::new);
    let writer = w.peer().await;
    let reading: Vec<_> = readers
        .iter()
        .map(|r| {
            let r = r.clone();
            tokio::spawn(async move {
                loop {
                    r.take(D, Mode::Shared).await;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        })
        .collect();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(30)).await;
        let start = Instant::now();
        writer.take(D, Mode::Exclusive).await;
        assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
    }
    for r in reading {
        r.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_the_order_of_asking() {
    let w = World::new(8, 22).await;
    let holder = w.peer().await;
    let mut waiters = Vec::new();
    for _ in 0..5 {
        waiters.push(w.peer().await);
    }
    holder.client.pins.clone().lock_owned().await;
    let pin = holder.client.pins.clone().lock_owned().await;
    holder.take(D, Mode::Exclusive).await;
    let order = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for (i, waiter) in waiters.into_iter().enumerate() {
        let order = order.clone();
        tasks.push(tokio::spawn(async move {
            waiter.take(D, Mode::Exclusive).await;
            order.lock().push(i);
            tokio::time::sleep(Duration::from_millis(20)).await;
            waiter
        }));
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    drop(pin);
    let mut done = Vec::new();
    for task in tasks {
        done.push(task.await.unwrap());
    }
    assert_eq!(*order.lock(), [0, 1, 2, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_wait_blocks_nobody() {
    for hints in [true, false] {
        let w = World::new(4, 23).await;
        let a = w.peer_with(Options { hints, ..Options::default() }).await.unwrap();
        let b = w.peer_with(Options { hints, ..Options::default() }).await.unwrap();
        let c = w.peer_with(Options { hints, ..Options::default() }).await.unwrap();
        let pin = a.client.pins.clone().lock_owned().await;
        a.take(D, Mode::Exclusive).await;
        let wait = Duration::from_millis(100);
        tokio::time::timeout(wait, b.node.acquire(D, Mode::Exclusive)).await.unwrap_err();
        drop(pin);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(w.lock(D).held_by(b.id()), Some(Mode::Exclusive), "granted after it had stopped waiting");
        assert_eq!(b.node.held(D), None);
        let start = Instant::now();
        c.take(D, Mode::Exclusive).await;
        assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
        assert_eq!(b.node.stats().unwanted, 1);
        // The one that gave up can come back.
        b.take(D, Mode::Shared).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_hint_alone_grants_nothing_and_forged_ones_are_dropped() {
    let w = World::new(4, 24).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.take(D, Mode::Exclusive).await;
    let forged = |key: [u8; 32], sender: NodeId, receiver: NodeId, counter| {
        let hint = crate::hints::Hint {
            volume: w.layout.volume,
            sender,
            receiver,
            counter,
            id: D,
            news: crate::hints::News::Wanted(Mode::Exclusive),
        };
        hint.encode(&key)
    };
    let address = a.port.as_ref().unwrap().address();
    let before = a.node.stats();
    let wrong_life = NodeId { incarnation: 9, ..a.id() };
    let good = forged([5; 32], b.id(), a.id(), 77);
    w.net.inject(&address, forged([6; 32], b.id(), a.id(), 70));
    w.net.inject(&address, forged([5; 32], b.id(), wrong_life, 71));
    w.net.inject(&address, good[..40].to_vec());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(a.client.demands.lock().is_empty());
    assert_eq!(a.node.stats().hints_rejected - before.hints_rejected, 3);
    assert!(a.node.held(D).is_some());
    // An authentic one is obeyed once, however often it is played back.
    w.net.inject(&address, good.clone());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(a.node.held(D), None);
    a.take(D, Mode::Exclusive).await;
    w.net.inject(&address, good);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(a.node.held(D).is_some());
}

#[tokio::test(start_paused = true)]
async fn work_without_contention_costs_heartbeats_and_polls_only() {
    let w = World::new(4, 25).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.take(D, Mode::Exclusive).await;
    b.take(LockId::Group(1), Mode::Exclusive).await;
    let (before, hints) = (a.dev.stats().snapshot(), a.node.stats());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let idle = a.dev.stats().snapshot().since(&before);
    assert_eq!(idle.work(), Default::default());
    let liveness = idle.class(blockdev::IoClass::Liveness);
    assert!((9..=11).contains(&liveness.writes), "{liveness:?}");
    assert!(liveness.reads < 10 * 25 + 2 * 11, "{liveness:?}");
    assert_eq!(a.node.stats(), hints);
}

#[tokio::test(start_paused = true)]
async fn a_demand_that_came_to_nothing_is_repeated() {
    let w = World::new(4, 26).await;
    let a = w.peer_with(Options { manners: Manners::Stubborn, ..Options::default() }).await.unwrap();
    let b = w.peer().await;
    a.take(D, Mode::Exclusive).await;
    tokio::time::timeout(Duration::from_secs(4), b.node.acquire(D, Mode::Exclusive)).await.unwrap_err();
    let demands = a.client.demands.lock().len();
    assert!((2..=5).contains(&demands), "{demands}");
}
