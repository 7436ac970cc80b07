//! Joining, leaving, creating locks.

use blockdev::{BlockDevice, FencingKind};
use tokio::time::{Duration, Instant};

use super::harness::*;
use crate::*;

const D: LockId = LockId::Domain(3);
/// mkfs has written nothing there.
const FRESH: LockId = LockId::Domain(50);

#[tokio::test(start_paused = true)]
async fn slots_are_claimed_given_back_and_reused() {
    let w = World::new(3, 31).await;
    let a = w.peer_with(Options { name: "a", ..Options::default() }).await.unwrap();
    let b = w.peer_with(Options { name: "b", ..Options::default() }).await.unwrap();
    assert_eq!((a.id(), b.id()), (NodeId { slot: 0, incarnation: 1 }, NodeId { slot: 1, incarnation: 1 }));
    b.take(D, Mode::Exclusive).await;
    b.node.leave().await.unwrap();
    assert_eq!((w.slot(1).state, w.slot(1).last_end()), (SlotState::Free, LastEnd::Clean));
    assert!(matches!(b.node.acquire(D, Mode::Shared).await, Err(ClusterError::Leaving)));
    assert!(matches!(b.node.guarded_device().flush(blockdev::IoClass::Data).await, Err(blockdev::DevError::Fenced)));
    // All its locks are free at once, with nothing to look for.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = Instant::now();
    let grant = a.node.acquire(D, Mode::Exclusive).await.unwrap();
    assert!(!grant.after_crash && start.elapsed() < Duration::from_millis(20));
    let c = w.peer_with(Options { name: "b", ..Options::default() }).await.unwrap();
    assert_eq!(c.id(), NodeId { slot: 1, incarnation: 2 }, "the host's last slot");
    assert!(w.replays.log.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn leaving_frees_locks_for_waiters() {
    let w = World::new(3, 32).await;
    let a = w.peer_with(Options { manners: Manners::Stubborn, ..Options::default() }).await.unwrap();
    let b = w.peer().await;
    a.take(D, Mode::Exclusive).await;
    let start = Instant::now();
    let (grant, left) = tokio::join!(b.node.acquire(D, Mode::Exclusive), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        a.node.leave().await
    });
    left.unwrap();
    assert!(!grant.unwrap().after_crash);
    assert!(start.elapsed() < Duration::from_millis(200) + w.timeouts.heartbeat() * 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn all_slots_in_use() {
    for fencing in [FencingKind::ProcessLock, FencingKind::Reservations, FencingKind::None] {
        let w = World::fenced_by(2, 33, fencing).await;
        let (_a, b) = (w.peer().await, w.peer().await);
        let start = Instant::now();
        let full = w.peer_with(Options::default()).await.err();
        assert!(matches!(full, Some(ClusterError::Full { nodes: 2 })), "{full:?}");
        assert!(start.elapsed() < Duration::from_secs(4));
        b.node.leave().await.unwrap();
        assert_eq!(w.peer().await.id(), NodeId { slot: 1, incarnation: 2 });
    }
}

#[tokio::test(start_paused = true)]
async fn many_join_at_once() {
    let w = World::new(8, 34).await;
    let joins: Vec<_> = (0..8).map(|_| w.peer_with(Options::default())).collect();
    let mut set = Vec::new();
    for join in futures(joins).await {
        set.push(join.unwrap());
    }
    let mut slots: Vec<_> = set.iter().map(|p| p.id().slot).collect();
    slots.sort_unstable();
    assert_eq!(slots, (0..8).collect::<Vec<_>>());
}

/// All futures at once, in one task.
async fn futures<T>(list: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut list: Vec<_> = list.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, out) in &mut list {
            if out.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *out = Some(value),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    list.into_iter().filter_map(|(_, out)| out).collect()
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_created_over_garbage_and_over_its_former_self() {
    let w = World::new(3, 35).await;
    let (a, b) = (w.peer().await, w.peer().await);
    assert!(matches!(a.node.acquire(FRESH, Mode::Shared).await, Err(ClusterError::Damaged { .. })));
    w.disk.write_raw(w.layout.lock_block(FRESH).unwrap(), &[0xa5; 512]);
    let value = LockValue { root: 4711, next_local: 99, version: 0 };
    let grant = a.node.create(FRESH, value).await.unwrap();
    assert_eq!((grant.mode, grant.value), (Mode::Exclusive, LockValue { root: 4711, next_local: 0, version: 0 }));
    assert_eq!(w.lock(FRESH).held_by(a.id()), Some(Mode::Exclusive));
    // The domain is freed; the lock stays cached at a until b makes a new domain of it.
    let freed = Release {
        to: Some(Mode::Shared),
        value: Some(LockValue { root: 0, next_local: 12, version: 0 }),
        open: false,
        cleaned: true,
    };
    a.node.release(FRESH, freed).await.unwrap();
    let again = b.node.create(FRESH, value).await.unwrap();
    assert_eq!(again.value, LockValue { root: 4711, next_local: 12, version: 0 });
    assert!(again.previous_tenure == grant.tenure && again.tenure > grant.tenure, "I8");
    assert_eq!(w.lock(FRESH).value, again.value);
    assert_eq!(a.node.held(FRESH), None);
    let outside = LockId::Domain(DOMAINS);
    assert!(matches!(a.node.create(outside, value).await, Err(ClusterError::NoSuchLock(id)) if id == outside));
}

#[tokio::test(start_paused = true)]
async fn open_files_are_seen_by_the_next_holder() {
    let w = World::new(3, 36).await;
    let (a, b) = (w.peer().await, w.peer().await);
    a.client.open.lock().insert(D);
    a.take(D, Mode::Exclusive).await;
    assert!(b.take(D, Mode::Exclusive).await.open_elsewhere);
    a.node.clear_open(D).await.unwrap();
    b.give(D, None).await;
    assert!(!b.take(D, Mode::Exclusive).await.open_elsewhere);
}

#[tokio::test(start_paused = true)]
async fn slots_are_shown() {
    let w = World::fenced_by(4, 37, FencingKind::None).await;
    let (a, b) = (w.peer_with(Options { name: "mail1", ..Options::default() }).await.unwrap(), w.peer().await);
    b.node.leave().await.unwrap();
    let infos = read_slots(&*a.dev, &w.layout, Duration::from_secs(3)).await.unwrap();
    assert_eq!(infos.iter().map(|i| i.alive).collect::<Vec<_>>(), [Some(true), Some(false), Some(false), Some(false)]);
    assert_eq!(infos[0].block.as_ref().unwrap().host_name, "mail1");
    w.disk.corrupt(w.layout.slot_block(2), 512);
    let dead = a.crash();
    let raw = w.disk.open("status");
    let infos = read_slots(&*raw, &w.layout, Duration::from_secs(3)).await.unwrap();
    assert_eq!(infos[usize::from(dead.slot)].alive, None);
    assert!(infos[2].block.is_err());
}

#[tokio::test(start_paused = true)]
async fn dropping_a_node_ends_its_tasks() {
    let w = World::new(3, 38).await;
    let a = w.peer().await;
    let b = w.peer().await;
    let dev = a.dev.clone();
    drop(a);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = dev.stats().snapshot();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(dev.stats().snapshot(), before);
    assert!(b.node.is_live());
}

/// Puts a slot block that no node wrote.
async fn damage(w: &World, slot: Slot, change: impl FnOnce(&mut SlotBlock)) {
    let mut b = w.slot(slot);
    b.seq += 1;
    change(&mut b);
    put(&*w.disk.open_raw(), w.layout.slot_block(slot), b.encode(512)).await;
}

fn named(e: Option<ClusterError>, part: &str) {
    assert!(matches!(&e, Some(ClusterError::Damaged { what, .. }) if what.contains(part)), "{e:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lock_of_a_life_that_never_was_is_damage_and_nothing_to_wait_for() {
    let w = World::new(3, 41).await;
    let a = w.peer().await;
    let holder = NodeId { slot: 2, incarnation: 7 };
    let beyond = NodeId { slot: 9, incarnation: 1 };
    for (id, node) in [(D, holder), (LockId::Domain(4), beyond)] {
        let mut b = w.lock(id);
        let held = Some(Mode::Exclusive);
        let entry = Entry { incarnation: node.incarnation, held, wanted: None, ticket: 0, open: false };
        b.entries.insert(node.slot, entry);
        put(&*w.disk.open_raw(), w.layout.lock_block(id).unwrap(), b.encode(512)).await;
        let waited = tokio::time::timeout(Duration::from_secs(60), a.node.acquire(id, Mode::Shared)).await;
        named(waited.unwrap().err(), &node.to_string());
    }
    // One that our table does not know yet is looked up.
    let b = w.peer().await;
    b.take(LockId::Domain(5), Mode::Exclusive).await;
    a.take(LockId::Domain(5), Mode::Exclusive).await;
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_nobody_does_is_damage_and_nothing_to_wait_for() {
    let by = |slot, incarnation| SlotState::Recovering { by: NodeId { slot, incarnation } };
    for circle in [false, true] {
        let w = World::new(4, 42).await;
        let (a, b) = (w.peer().await, w.peer().await);
        b.take(D, Mode::Exclusive).await;
        let victim = b.crash();
        match circle {
            false => damage(&w, victim.slot, |s| s.state = by(3, 5)).await,
            true => {
                let c = w.peer().await.crash();
                damage(&w, victim.slot, |s| s.state = by(c.slot, c.incarnation)).await;
                damage(&w, c.slot, |s| s.state = by(victim.slot, victim.incarnation)).await;
            }
        }
        let waited = tokio::time::timeout(Duration::from_secs(60), a.node.acquire(D, Mode::Shared)).await;
        named(waited.unwrap().err(), "slot 1");
        let infos = read_slots(&*a.dev, &w.layout, Duration::from_secs(3)).await.unwrap();
        named(infos[1].block.clone().err(), "slot 1");
    }
}
