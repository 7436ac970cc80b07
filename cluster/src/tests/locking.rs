//! Locks on a healthy cluster.

use tokio::time::{Duration, Instant};

use super::harness::*;
use crate::*;

const D: LockId = LockId::Domain(3);

#[tokio::test(start_paused = true)]
async fn uncontended_acquire_costs_one_read_and_one_compare_and_write() {
    let w = World::new(4, 1).await;
    let a = w.peer().await;
    let before = a.io();
    let grant = a.take(D, Mode::Exclusive).await;
    let after = a.io();
    assert_eq!((after.reads - before.reads, after.compare_and_writes - before.compare_and_writes), (1, 1));
    assert_eq!(grant.value, LockValue { root: 1000, next_local: 7, version: 0 });
    assert!(!grant.after_crash && !grant.open_elsewhere && grant.tenure > grant.previous_tenure);
    // From here on it is free.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(a.take(D, Mode::Shared).await, grant);
    assert_eq!(a.io(), after);
    a.give_with(
        D,
        Release { to: None, value: Some(LockValue { root: 5, next_local: 6, version: 3 }), open: false, cleaned: true },
    )
    .await;
    assert_eq!(a.io().compare_and_writes, after.compare_and_writes + 1);
    assert_eq!(a.io().reads, after.reads);
    assert_eq!(w.lock(D).value, LockValue { root: 5, next_local: 6, version: 3 });
}

#[tokio::test(start_paused = true)]
async fn tenure_tells_whether_caches_are_valid() {
    let w = World::new(4, 2).await;
    let (a, b) = (w.peer().await, w.peer().await);
    let first = a.take(D, Mode::Exclusive).await;
    a.give(D, None).await;
    let again = a.take(D, Mode::Exclusive).await;
    assert_eq!(again.previous_tenure, first.tenure, "nobody else had it");
    a.give(D, None).await;
    let reader = b.take(D, Mode::Shared).await;
    assert_eq!((reader.previous_tenure, reader.tenure), (again.tenure, again.tenure));
    let writer = b.take(D, Mode::Exclusive).await;
    assert_eq!(writer.previous_tenure, again.tenure, "the upgrade keeps the reader's caches");
    b.give(D, None).await;
    let back = a.take(D, Mode::Shared).await;
    assert_eq!(back.previous_tenure, writer.tenure, "not what a remembers: its caches are gone");
}

async fn handover(hints: bool) -> (Duration, Peer, Peer) {
    let w = World::new(4, 3).await;
    let a = w.peer_with(Options { hints, ..Options::default() }).await.unwrap();
    let b = w.peer_with(Options { hints, ..Options::default() }).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    a.take(D, Mode::Exclusive).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = (a.io(), b.io());
    let start = Instant::now();
    b.take(D, Mode::Exclusive).await;
    let took = start.elapsed();
    assert_eq!(a.io().compare_and_writes - before.0.compare_and_writes, 1, "holder");
    assert_eq!(b.io().compare_and_writes - before.1.compare_and_writes, 1, "waiter");
    assert_eq!(a.client.demands.lock().len(), 1);
    assert_eq!(a.node.held(D), None);
    (took, a, b)
}

#[tokio::test(start_paused = true)]
async fn handover_with_hints_is_fast() {
    let (took, a, b) = handover(true).await;
    assert!(took < Duration::from_millis(25), "{took:?}");
    assert_eq!(a.node.stats().doorbells_received + b.node.stats().doorbells_written, 0);
}

#[tokio::test(start_paused = true)]
async fn handover_without_hints_goes_through_the_doorbell() {
    let (took, a, b) = handover(false).await;
    assert!(took < Duration::from_millis(130), "{took:?}");
    assert_eq!((a.node.stats().doorbells_received, b.node.stats().doorbells_written), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn readers_share_and_a_writer_gets_in_between() {
    let w = World::new(4, 4).await;
    let (a, b, c) = (w.peer().await, w.peer().await, w.peer().await);
    a.take(D, Mode::Shared).await;
    b.take(D, Mode::Shared).await;
    assert!(a.client.demands.lock().is_empty());
    c.take(D, Mode::Exclusive).await;
    assert_eq!((a.node.held(D), b.node.held(D)), (None, None));
    // The reader's demand lowers the writer instead of ending it.
    a.take(D, Mode::Shared).await;
    assert_eq!(c.node.held(D).map(|g| g.mode), Some(Mode::Shared));
}

#[tokio::test(start_paused = true)]
async fn both_upgrade() {
    let w = World::new(4, 5).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.take(D, Mode::Shared).await;
    b.take(D, Mode::Shared).await;
    let start = Instant::now();
    tokio::join!(
        async {
            a.take(D, Mode::Exclusive).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        },
        async {
            b.take(D, Mode::Exclusive).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    );
    assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
}
