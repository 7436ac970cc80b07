//! Accidents of the device: it hangs, is slow, fails commands or reads, or cannot be reached by anybody.

use std::sync::Arc;
use std::time::Duration;

use blockdev::sim::FaultRates;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::time::Instant;

use super::world::{Host, Outcome, World};

/// Shorter than any lease: everybody gets over it.
pub async fn stall(world: &Arc<World>, rng: &mut StdRng) {
    let stall = Duration::from_millis(rng.random_range(100..3000));
    world.note(format_args!("the device stalls for {} ms", stall.as_millis()));
    world.accident();
    world.disk.stall(stall);
    tokio::time::sleep(stall).await;
    world.accident();
    tokio::time::sleep(Duration::from_secs(2)).await;
}

/// Nobody reaches the device for longer than a lease: all stop by themselves. Those who mount it afterwards have seen nothing of that
/// time, and judge nobody by it.
pub async fn outage(world: &Arc<World>, rng: &mut StdRng) -> Outcome<()> {
    let lease = world.setup.timeouts().lease();
    let time = lease + Duration::from_millis(rng.random_range(1_000..15_000));
    let how = rng.random_range(0..3);
    world.note(format_args!("nobody reaches the device for {} ms", time.as_millis()));
    let began = Instant::now();
    let hosts = world.live();
    for host in &hosts {
        // They wake up within the time of each other's heartbeats.
        let dies = Duration::from_millis(rng.random_range(100..5_000));
        match how {
            0 => world.given_up(host, dies + time),
            _ => world.lose(host, how == 1, time, dies),
        }
    }
    if how == 0 {
        world.disk.stall(time);
    }
    tokio::time::sleep_until(began + time).await;
    world.accident();
    Ok(())
}

/// One node, or all, can read nothing, while their writes arrive. Who is deaf for a lease ends his membership, as he cannot hear the others;
/// before that, and after, he may not take a node for dead that he did not hear.
pub async fn deaf(world: &Arc<World>, rng: &mut StdRng) -> Outcome<()> {
    let t = world.setup.timeouts();
    let time = Duration::from_millis(rng.random_range(500..2 * t.lease().as_millis() as u64));
    let mut hosts = world.live();
    if rng.random_bool(0.7) {
        let one = rng.random_range(0..hosts.len());
        hosts.swap(0, one);
        hosts.truncate(1);
    }
    let names: Vec<String> = hosts.iter().map(|h| h.name()).collect();
    world.note(format_args!("{} can read nothing for {} ms", names.join(" "), time.as_millis()));
    world.slow_for(time);
    for host in &hosts {
        host.commands_fail();
        host.dev.fail_all_reads(true);
    }
    tokio::time::sleep(time).await;
    for host in &hosts {
        // A node that is slow to find out has two heartbeats more.
        if time > t.lease() + 3 * t.heartbeat() && !host.dead() {
            return Err(world.fail(format!("{} has not noticed that it cannot read", host.name())));
        }
        host.dev.fail_all_reads(false);
    }
    world.accident();
    Ok(())
}

/// A node hangs for less than its lease: it must get over it, and so must everybody else.
pub async fn hiccup(world: &Arc<World>, rng: &mut StdRng, host: &Host) {
    let time = Duration::from_millis(rng.random_range(100..3000));
    world.note(format_args!("{} hangs for {} ms", host.name(), time.as_millis()));
    world.accident();
    host.dev.hang(true);
    tokio::time::sleep(time).await;
    host.dev.hang(false);
    world.accident();
    // It renews its lease before the next accident: two in a row may be longer than one lease.
    tokio::time::sleep(Duration::from_secs(2)).await;
}

/// The device answers, but takes its time: less than would end a lease.
pub async fn slow(world: &Arc<World>, rng: &mut StdRng) {
    let most = rng.random_range(50_000..400_000);
    world.note(format_args!("the device takes up to {} ms", most / 1000));
    world.disk.set_latency(1000..=most);
    for _ in 0..rng.random_range(1..4) {
        world.slow_for(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let usual = world.setup.latency_us;
    world.disk.set_latency(usual.0..=usual.1);
    // What had to wait for hundreds of slow commands.
    world.accident();
}

/// Commands fail for a while. What fails at compare-and-writes alone everybody gets over (I9); of the rest a node may die, but it
/// must say so and take nobody with it.
pub async fn errors(world: &Arc<World>, rng: &mut StdRng) {
    let time = Duration::from_millis(rng.random_range(50..1500));
    let p = [0.01, 0.05, 0.3][rng.random_range(0..3)];
    let mut rates = FaultRates::default();
    match rng.random_range(0..6) {
        0 => rates.read_error = p,
        1 => rates.write_error = p,
        2 => rates.write_unknown = p,
        3 => rates.flush_error = p,
        4 => (rates.caw_unknown, rates.caw_miscompare) = (p, p / 3.0),
        _ => {
            let at = rng.random_range(0..world.disk.geometry().size >> 16) << 16;
            world.disk.fail_reads(at..at + (1 << 18));
            world.disk.fail_writes(at..at + (1 << 17));
        }
    }
    world.note(format_args!("for {} ms {rates:?}", time.as_millis()));
    let harmless = rates.caw_unknown > 0.0;
    world.errors(!harmless, true);
    world.disk.set_rates(rates);
    world.slow_for(time);
    tokio::time::sleep(time).await;
    world.disk.set_rates(FaultRates::default());
    world.disk.heal();
    world.errors(!harmless, false);
    world.accident();
}
