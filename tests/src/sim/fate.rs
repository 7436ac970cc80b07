//! A run from its beginning to its end: the accidents, and the checks when all is over.

use std::sync::Arc;
use std::time::Duration;

use blockdev::sim::OpKind;
use blockdev::{BlockDevice, FencingKind};
use cluster::{SlotBlock, SlotState};
use fs_core::ROOT_INO;
use fs_core::check::Report;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::bulk::{Bulk, Kind};
use super::client::{Client, DIR, WHO};
use super::device;
use super::emptying;
use super::growing;
use super::lies;
use super::locker::{Locked, Locker};
use super::mail::{Mail, Mailer};
use super::opened::{Opened, Opener};
use super::shared::{Racer, Shared};
use super::world::{Host, Outcome, Stop, World};

/// Longer than a volume's rounds of background work are apart.
const BURIAL: Duration = Duration::from_secs(40);

/// Runs a whole seed.
pub async fn live(world: Arc<World>) -> Result<(), String> {
    let failed = {
        let world = world.clone();
        async move {
            loop {
                let failed = world.failed.notified();
                tokio::pin!(failed);
                failed.as_mut().enable();
                if world.failure().is_some() {
                    return;
                }
                failed.await;
            }
        }
    };
    tokio::select! {
        biased;
        () = failed => {}
        done = whole(&world) => {
            if done == Err(Stop::Down) {
                return Err("a node died that nobody killed".into());
            }
        }
    }
    match world.failure() {
        Some(what) => Err(what),
        None => Ok(()),
    }
}

async fn whole(world: &Arc<World>) -> Outcome<()> {
    let mut rng = StdRng::seed_from_u64(world.setup.seed ^ 0xfa7e);
    let Some(first) = world.start(0, None).await? else { return Err(Stop::Down) };
    let mail = Mail::make(world, &first, ROOT_INO).await?;
    let shared = Shared::make(world, &first, ROOT_INO).await?;
    let locked = Locked::make(world, &first, ROOT_INO).await?;
    let opened = Opened::make(world, &first, ROOT_INO).await?;
    let mut roots = Vec::new();
    for c in 0..world.setup.clients {
        let name = format!("tree{c}");
        let made = world.done(&first, "mkdir", first.volume.mkdir(WHO, ROOT_INO, name.as_bytes(), DIR)).await?;
        roots.push(made.value.ino);
    }
    let mut in_bulk = Vec::new();
    let kind = if world.setup.small() { Kind::Fill } else { Kind::Burst };
    for i in 0..world.setup.bulk {
        let name = format!("bulk{i}");
        let made = world.done(&first, "mkdir", first.volume.mkdir(WHO, ROOT_INO, name.as_bytes(), DIR)).await?;
        in_bulk.push(Bulk::new(world.clone(), kind, i, made.value.ino));
    }
    world.done(&first, "sync", first.volume.sync()).await?;
    for index in 1..world.setup.hosts {
        world.start(index, None).await?;
    }
    let (mut clients, mut mailers, mut bulk) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    for b in in_bulk {
        bulk.spawn(b.live());
    }
    for (i, root) in roots.into_iter().enumerate() {
        clients.spawn(Client::new(world.clone(), i, root).live());
    }
    for i in 0..world.setup.mailers {
        mailers.spawn(Mailer::new(world.clone(), mail.clone(), i).live());
    }
    for i in 0..world.setup.racers {
        mailers.spawn(Racer::new(world.clone(), shared.clone(), i).live());
    }
    for i in 0..world.setup.lockers() {
        mailers.spawn(Locker::new(world.clone(), locked.clone(), i).live());
    }
    for i in 0..world.setup.openers {
        mailers.spawn(Opener::new(world.clone(), opened.clone(), i).live());
    }
    if world.setup.grows {
        mailers.spawn(growing::live(world.clone()));
    }
    accidents(world, &mut rng).await?;
    world.over.store(true, std::sync::atomic::Ordering::Relaxed);
    world.changed.notify_waiters();
    let mut all = Vec::new();
    while let Some(client) = clients.join_next().await {
        all.push(client.map_err(|e| world.fail(format!("a client ended: {e}")))?);
    }
    let mut in_bulk = Vec::new();
    while let Some(b) = bulk.join_next().await {
        in_bulk.push(b.map_err(|e| world.fail(format!("a client ended: {e}")))?);
    }
    while mailers.join_next().await.is_some() {}
    end(world, &mut rng, all, Left { mail, shared, opened, in_bulk }).await
}

/// What happens while the clients work.
async fn accidents(world: &Arc<World>, rng: &mut StdRng) -> Outcome<()> {
    let end = Instant::now() + world.setup.span;
    while Instant::now() < end && world.failure().is_none() {
        let pause = [20, 300, 1500, 5000][rng.random_range(0..4)];
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..=pause))).await;
        let live = world.live();
        match rng.random_range(0..100) {
            0..45 if !live.is_empty() => {
                let host = &live[rng.random_range(0..live.len())];
                let n = [1, 10, 60, 300][rng.random_range(0..4)];
                let n = rng.random_range(1..=n);
                let kinds = [OpKind::Write, OpKind::Flush, OpKind::CompareAndWrite];
                match rng.random_range(0..6) {
                    0 => host.dev.crash(),
                    k @ 1..4 => host.dev.crash_at_kind(kinds[k - 1], n.min(20)),
                    _ => host.dev.crash_at(n),
                }
            }
            45..52 if !live.is_empty() => blackout(world, rng).await?,
            60..63 => device::stall(world, rng).await,
            63..66 if !live.is_empty() && world.setup.losses => device::outage(world, rng).await?,
            66..68 if !live.is_empty() && world.setup.losses => device::deaf(world, rng).await?,
            68..70 if live.len() > 1 && world.setup.losses => {
                let wakes = Duration::from_millis(rng.random_range(0..25_000));
                let dies = Duration::from_millis(rng.random_range(0..5_000));
                world.lose(&live[rng.random_range(0..live.len())], rng.random_bool(0.5), wakes, dies);
            }
            70..73 if !live.is_empty() => {
                let host = &live[rng.random_range(0..live.len())];
                device::hiccup(world, rng, host).await
            }
            73..76 => device::slow(world, rng).await,
            76..79 if world.setup.clock_jumps => world.jump_clock(rng),
            79..83 if world.setup.net_faults => world.upset_network(rng),
            83..88 if world.setup.errors => device::errors(world, rng).await,
            52..60 if live.len() > 1 => {
                let host = live[rng.random_range(0..live.len())].clone();
                match world.leave(&host).await {
                    Err(Stop::Down) => {}
                    r => r?,
                }
            }
            _ => {
                let down: Vec<usize> = (0..world.setup.hosts).filter(|i| !world.is_up(*i)).collect();
                if let Some(i) = down.first() {
                    let dies = rng.random_bool(0.15).then(|| rng.random_range(1..60));
                    world.start(*i, dies).await?;
                }
            }
        }
    }
    Ok(())
}

/// All nodes die at once, with or without the device's cache.
async fn blackout(world: &Arc<World>, rng: &mut StdRng) -> Outcome<()> {
    world.disk.crash_all();
    if rng.random_bool(0.7) {
        world.disk.power_loss();
        world.note("power loss");
    } else {
        world.note("all die");
    }
    world.totals.lock().blackouts += 1;
    world.accident();
    // The watchers take note.
    tokio::time::sleep(Duration::from_millis(1)).await;
    if rng.random_bool(0.5) {
        fsck(world, "after a blackout").await?;
    }
    Ok(())
}

/// What clients of all nodes shared.
struct Left {
    mail: Arc<Mail>,
    shared: Arc<Shared>,
    opened: Arc<Opened>,
    in_bulk: Vec<Bulk>,
}

async fn end(world: &Arc<World>, rng: &mut StdRng, mut clients: Vec<Client>, mut left: Left) -> Outcome<()> {
    world.calm_network();
    while world.lost() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    match rng.random_range(0..3) {
        0 => blackout(world, rng).await?,
        how => {
            let live = world.live();
            for (i, host) in live.iter().enumerate() {
                if how == 1 && i + 1 == live.len() {
                    world.note("the last node crashes");
                    host.dev.crash();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                } else {
                    match world.leave(host).await {
                        Err(Stop::Down) => {}
                        r => r?,
                    }
                }
            }
        }
    }
    fsck(world, "before the last mount").await?;
    let Some(host) = world.start(0, None).await? else { return Err(Stop::Down) };
    for client in &mut clients {
        client.look(&host).await?;
    }
    left.mail.look(world, &host).await?;
    left.shared.check(world, &host).await?;
    left.opened.look(world, &host).await?;
    for b in &mut left.in_bulk {
        b.look(&host).await?;
    }
    if world.setup.emptied {
        emptying::remove_all(world, &host).await?;
    }
    dead_are_buried(world, &host).await?;
    // What the dead left to be freed has been freed.
    world.leave(&host).await?;
    let report = fsck(world, "at the end").await?;
    if report.orphans > 0 {
        let n = report.orphans;
        return Err(world.fail(format!("{n} files without a name stay, with nobody there who has them open")));
    }
    if world.setup.lies {
        return lies::lies(world, rng, &mut clients).await;
    }
    if !world.setup.emptied || emptying::is_back(world, report.blocks_free) {
        return Ok(());
    }
    emptying::fill(world).await?;
    let free = fsck(world, "when it was filled and emptied").await?.blocks_free;
    match emptying::is_back(world, free) {
        true => Ok(()),
        false => {
            Err(world.fail(format!("{free} blocks are free of {}, and there are no files", world.setup.free_blocks())))
        }
    }
}

/// The last node recovers all that died, and in the background frees what only they had open.
async fn dead_are_buried(world: &Arc<World>, last: &Host) -> Outcome<()> {
    let layout = world.setup.layout();
    let me = last.volume.node().slot;
    let waits = |slot: u16| {
        let block = world.disk.read_raw(layout.slots + u64::from(slot) * layout.stride, layout.stride as usize);
        // Never used, or free.
        SlotBlock::decode(&block, layout.volume, slot).is_ok_and(|b| b.state != SlotState::Free)
    };
    let until = Instant::now() + 2 * world.setup.patience();
    while let Some(slot) = (0..layout.nodes).find(|s| *s != me && waits(*s)) {
        if Instant::now() > until {
            return Err(world.fail(format!("{} has not recovered slot {slot}", last.name())));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(BURIAL).await;
    Ok(())
}

/// The check of a volume that nobody has mounted: with the journals of the dead replayed in memory.
pub async fn fsck(world: &Arc<World>, when: &str) -> Outcome<Report> {
    if world.setup.fencing != FencingKind::ProcessLock {
        // A heartbeat on its way from a node that died looks like life.
        tokio::time::sleep(world.setup.late_write_delay).await;
    }
    let raw: Arc<dyn BlockDevice> = world.disk.open_raw();
    let report = fs_core::check::check(&raw, None).await;
    let report = report.map_err(|e| world.fail(format!("fsck {when}: {e}")))?;
    if report.is_clean() {
        return Ok(report);
    }
    let all: Vec<String> = report.violations.iter().take(20).map(|v| v.to_string()).collect();
    Err(world.fail(format!("fsck {when} finds {}: {}", report.violation_count, all.join("; "))))
}
