//! The device is enlarged while everybody works, and the volume grows, by a program that may die at it.

use std::sync::Arc;
use std::time::Duration;

use blockdev::BlockDevice;
use fs_core::grow::{GrowError, grow};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::world::World;

/// It waits for nodes that died as everybody does.
const PATIENCE: Duration = Duration::from_secs(120);

/// What goes on beside the clients, until they are done.
pub async fn live(world: Arc<World>) {
    let mut rng = StdRng::seed_from_u64(world.setup.seed ^ 0x96077);
    let span = world.setup.span.as_millis() as u64;
    for n in 0..rng.random_range(1..=3u64) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..span / 2))).await;
        if world.over() {
            return;
        }
        let more = rng.random_range(1..=10_000u64) * 4096;
        world.disk.enlarge(world.disk.geometry().size + more);
        let dev = world.disk.open(&format!("g{n}"));
        if rng.random_bool(0.5) {
            dev.crash_at(rng.random_range(1..=150));
        }
        world.note(format_args!("g{n} lets the volume grow by {more} bytes"));
        let handle: Arc<dyn BlockDevice> = dev.clone();
        let seed = world.setup.seed.wrapping_mul(1000).wrapping_add(900 + n);
        tokio::select! {
            biased;
            () = dev.crashed() => world.note(format_args!("g{n} crashed")),
            done = tokio::time::timeout(PATIENCE, grow(&handle, seed)) => match done {
                Ok(Err(e @ (GrowError::Superblock(_) | GrowError::Smaller { .. } | GrowError::Features(_)))) => {
                    world.fail(format!("g{n}: {e}"));
                }
                Ok(done) => world.note(format_args!("g{n}: {done:?}")),
                Err(_) => world.note(format_args!("g{n} gives up")),
            },
        }
        dev.crash();
        // It was a node, too.
        world.accident();
    }
}
