//! What is left of the space when all has been removed: as much as there was at the beginning, but for what trees keep for themselves.

use std::sync::Arc;

use fs_core::{FsError, ROOT_INO, WriteOptions};

use super::client::{FILE, WHO};
use super::reading::list;
use super::world::{Host, Outcome, World};

/// Blocks that the domain of a slot may keep, if it was used: its header, a root, what is set aside for more.
const PER_SLOT: u64 = 20;
/// ... and the root directory's.
const ROOT: u64 = 20;
/// Bytes that are written at once to fill a volume.
const PIECE: usize = 1 << 20;

/// Removes all that there is, on one node. On a full volume too this must work.
pub async fn remove_all(world: &World, host: &Host) -> Outcome<()> {
    world.note("everything is removed");
    remove_below(world, host, ROOT_INO).await
}

fn remove_below<'a>(
    world: &'a World,
    host: &'a Host,
    dir: u64,
) -> std::pin::Pin<Box<dyn Future<Output = Outcome<()>> + Send + 'a>> {
    Box::pin(async move {
        let v = &host.volume;
        for (name, ino) in list(world, host, "list to remove", dir).await? {
            let what = format!("removal of {name}, {ino:#x}");
            let is_dir = world.done(host, &what, v.getattr(ino)).await?.value.inode.is_dir();
            if is_dir {
                remove_below(world, host, ino).await?;
                world.done(host, &what, v.rmdir(dir, name.as_bytes())).await?;
            } else {
                world.done(host, &what, v.unlink(dir, name.as_bytes())).await?;
            }
        }
        Ok(())
    })
}

/// Whether the volume has its space back, as fsck counts it.
pub fn is_back(world: &World, free: u64) -> bool {
    let slack = ROOT + PER_SLOT * u64::from(world.setup.nodes());
    let before = world.setup.free_blocks();
    world.note(format_args!("{free} blocks are free, {before} were at the beginning"));
    free + slack >= before
}

/// Blocks freed into groups of other nodes may wait in the domain of a slot that nobody lives in any more. Who finds the volume full
/// carries out what waits there.
pub async fn fill(world: &Arc<World>) -> Outcome<()> {
    let Some(host) = world.start(0, None).await? else {
        return Err(world.fail("a node died that nobody killed".into()));
    };
    let v = &host.volume;
    let what = "a file that takes all there is";
    let file = world.done(&host, what, v.mknod(WHO, ROOT_INO, b"filler", FILE, true)).await?.value.ino;
    let piece = vec![7; PIECE];
    for at in (0..).step_by(PIECE) {
        match v.write(file, at, &piece, WriteOptions::default()).await {
            Ok(_) => {}
            Err(FsError::NoSpace) => break,
            Err(e) => return Err(world.fail(format!("{what}: {e}"))),
        }
    }
    world.done(&host, what, v.fsync(file, false)).await?;
    v.release(file).await;
    world.done(&host, what, v.unlink(ROOT_INO, b"filler")).await?;
    world.leave(&host).await
}
