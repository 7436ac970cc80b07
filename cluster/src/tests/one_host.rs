//! Devices that keep no hosts apart: who joins makes sure to be alone. Each node of these worlds is on a host of its own, whose
//! kernel sees none of the others' processes.

use blockdev::sim::SimConfig;
use tokio::time::Duration;

use super::harness::*;
use crate::*;

const D: LockId = LockId::Domain(3);

fn unseen(cfg: &mut SimConfig) {
    cfg.others_unseen = true;
}

fn named(name: &'static str) -> Options {
    Options { name, ..Options::default() }
}

fn is_other(e: Option<ClusterError>, name: &str) -> bool {
    matches!(&e, Some(ClusterError::OtherHost { host }) if host == name)
}

#[tokio::test(start_paused = true)]
async fn a_second_host_is_refused_and_the_first_works_on() {
    let w = World::with(4, 301, unseen).await;
    let a = w.peer_with(named("first")).await.unwrap();
    for _ in 0..3 {
        assert!(is_other(w.peer_with(named("second")).await.err(), "first"));
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    a.take(D, Mode::Exclusive).await;
    assert!(a.node.is_live());
    a.node.leave().await.unwrap();
    w.peer_with(named("second")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn of_hosts_that_join_at_once_no_two_stay() {
    for seed in 310..340 {
        let w = World::with(4, seed, unseen).await;
        let late = |ms| async move { tokio::time::sleep(Duration::from_millis(ms)).await };
        let (a, b, c) = tokio::join!(
            w.peer_with(named("a")),
            async {
                late(seed % 7 * 300).await;
                w.peer_with(named("b")).await
            },
            async {
                late(seed % 5 * 700).await;
                w.peer_with(named("c")).await
            }
        );
        // What one of them sees later than the others, its monitor does.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let joined = [a, b, c].map(|peer| peer.ok().filter(|p| p.node.is_live()));
        let live = joined.iter().flatten().count();
        assert!(live <= 1, "seed {seed}: {live} hosts at once");
        // Those who were refused have given their slots back: nobody has to be waited out.
        let slots = (0..4).filter(|s| w.slot(*s).state != SlotState::Free).count();
        assert!(slots <= live + 1, "seed {seed}: {slots} slots are taken by {live} nodes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_host_is_not_taken_for_a_living_one() {
    let w = World::with(2, 302, unseen).await;
    let a = w.peer_with(named("a")).await.unwrap();
    a.take(D, Mode::Exclusive).await;
    let dead = a.crash();
    let b = w.peer_with(named("b")).await.unwrap();
    b.take(D, Mode::Exclusive).await;
    assert_eq!(w.replays.log.lock().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [dead]);
    assert!(b.node.is_live());
}

/// A host that stands still is dead to one that comes meanwhile. Once it wakes up it works no more.
#[tokio::test(start_paused = true)]
async fn a_host_that_stood_still_gives_way() {
    let w = World::with(4, 303, unseen).await;
    let a = w.peer_with(named("a")).await.unwrap();
    a.take(D, Mode::Exclusive).await;
    a.dev.hang(true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let b = w.peer_with(named("b")).await.unwrap();
    b.take(D, Mode::Exclusive).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    a.dev.hang(false);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!a.node.is_live() && b.node.is_live());
}
