//! The end of some runs: a device that acknowledges writes of metadata and loses them, or writes them to the wrong place. Whatever a
//! node shows is right, or an error says that it is damaged; then fsck finds it too, and repairs it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use blockdev::BlockDevice;
use blockdev::sim::FaultRates;
use fs_core::check::Options;
use rand::RngExt;
use rand::rngs::StdRng;

use super::client::Client;
use super::fate::fsck;
use super::world::{Host, Outcome, Stop, World};

/// Times that the clients change nodes.
const ROUNDS: usize = 4;
const OPERATIONS: u32 = 15;

impl Client {
    /// On a device that lies: what is shown is right, or an error says that it is damaged. Works on if all is there.
    pub async fn suffer(&mut self, host: &Arc<Host>, operations: u32) -> Outcome<()> {
        let seen = self.read(host).await?;
        self.note_durable();
        let dead = self.maker.as_ref().filter(|m| m.dead()).cloned();
        let fits = match (&dead, &self.pending) {
            (Some(_), _) => self.tree.check_crashed(&seen, self.pending.clone()).map(drop),
            (None, Some(pending)) => self.tree.check_half_done(&seen, pending),
            (None, None) => self.tree.check_now(&seen),
        };
        fits.map_err(|e| self.world.fail(format!("{} on {}: {e}", self.name, host.name())))?;
        self.struck |= seen.has_damage() || dead.is_some();
        if self.struck {
            return Ok(());
        }
        self.tree.settle_all();
        self.maker = Some(host.clone());
        for _ in 0..operations {
            match self.operation(host).await {
                Err(Stop::Down) => {
                    self.struck = true;
                    return Ok(());
                }
                r => r?,
            }
        }
        Ok(())
    }
}

pub async fn lies(world: &Arc<World>, rng: &mut StdRng, clients: &mut [Client]) -> Outcome<()> {
    let mut hosts = Vec::new();
    for index in 0..2 {
        hosts.extend(world.start(index, None).await?);
    }
    let p = [0.003, 0.02, 0.1][rng.random_range(0..3)];
    let mut rates = FaultRates::default();
    *if rng.random_bool(0.7) { &mut rates.meta_lost } else { &mut rates.meta_misdirected } = p;
    world.note(format_args!("the device lies: {rates:?}"));
    world.lying.store(true, Relaxed);
    world.disk.set_rates(rates);
    // In the last two rounds all only look, so that every change is given to another node.
    for round in 0..ROUNDS + 2 {
        let operations = if round < ROUNDS { OPERATIONS } else { 0 };
        for (i, client) in clients.iter_mut().enumerate() {
            let host = &hosts[(i + round) % hosts.len()];
            if !host.dead() {
                client.suffer(host, operations).await?;
            }
        }
    }
    world.disk.set_rates(FaultRates::default());
    for host in hosts.iter().filter(|h| !h.dead()) {
        leave(world, host).await?;
    }
    let met = world.totals.lock().damaged;
    if let Some(host) = world.start(0, None).await? {
        for client in clients {
            client.suffer(&host, 0).await?;
        }
        leave(world, &host).await?;
    }
    let met = world.totals.lock().damaged - met;
    world.note(format_args!("{} blocks were lost, {met} errors told of them", world.disk.lies()));
    repair(world, met > 0).await
}

/// A node that cannot unmount for damage ends like one that crashes.
async fn leave(world: &Arc<World>, host: &Arc<Host>) -> Outcome<()> {
    match world.leave(host).await {
        Err(Stop::Down) => {
            host.dev.crash();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            Ok(())
        }
        r => r,
    }
}

async fn repair(world: &Arc<World>, damage: bool) -> Outcome<()> {
    let dev: Arc<dyn BlockDevice> = world.disk.open_raw();
    let failed = |e: String| world.fail(format!("after the device lied: {e}"));
    let report = fs_core::check::check(&dev, None).await.map_err(|e| failed(format!("fsck: {e}")))?;
    if damage && report.is_clean() {
        return Err(failed("fsck does not find what a node could not read".into()));
    }
    let done = fs_core::repair::run(&dev, true, Options::default(), 1, None).await;
    let done = done.map_err(|e| failed(format!("repair: {e}")))?;
    if !done.report.is_clean() {
        let left: Vec<String> = done.report.violations.iter().take(5).map(|v| v.to_string()).collect();
        return Err(failed(format!("repair leaves {}", left.join("; "))));
    }
    fsck(world, "after the repair").await.map(drop)
}
