//! Reading what a node shows of a directory and all below it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fs_core::FsError;

use super::client::ATTRIBUTE;
use super::tree::Seen;
use super::world::{Host, Outcome, Stop, World};

/// Reads a directory and all below it.
fn read<'a>(
    world: &'a World,
    host: &'a Host,
    what: &'a str,
    ino: u64,
) -> std::pin::Pin<Box<dyn Future<Output = Outcome<Seen>> + Send + 'a>> {
    Box::pin(async move {
        let v = &host.volume;
        let attr = world.done(host, what, v.getattr(ino)).await?.value.inode;
        if attr.is_file() {
            let contents = Arc::new(world.done(host, what, v.read(ino, 0, 1 << 20)).await?.value);
            if contents.len() as u64 != attr.size {
                let e = format!("{} {what}: {ino:#x} has {} bytes of {}", host.name(), contents.len(), attr.size);
                return Err(world.fail(e));
            }
            let xattr = match world.call(host, what, v.getxattr(ino, ATTRIBUTE)).await? {
                Ok(v) => Some(Arc::new(v.value)),
                Err(FsError::NoAttr) => None,
                Err(e) => return Err(world.unexpected(host, what, &e)),
            };
            return Ok(Seen::File { ino, contents, mode: attr.mode, links: attr.links, xattr });
        }
        if attr.is_symlink() {
            let target = world.done(host, what, v.readlink(ino)).await?.value;
            return Ok(Seen::Link { ino, target: String::from_utf8_lossy(&target).into_owned() });
        }
        let mut names = BTreeMap::new();
        for (name, child) in list(world, host, what, ino).await? {
            names.insert(name, read_or_damaged(world, host, what, child).await?);
        }
        Ok(Seen::Dir { ino, names })
    })
}

/// On a device that lies an error may say that it is damaged.
pub async fn read_or_damaged(world: &World, host: &Host, what: &str, ino: u64) -> Outcome<Seen> {
    match read(world, host, what, ino).await {
        Err(Stop::Down) if world.lying() => Ok(Seen::Damaged),
        r => r,
    }
}

/// A directory's names with their inodes.
pub async fn list(world: &World, host: &Host, what: &str, dir: u64) -> Outcome<BTreeMap<String, u64>> {
    let (mut names, mut after) = (BTreeMap::new(), 0);
    loop {
        let part = world.done(host, what, host.volume.readdir(dir, after, 50, true)).await?.value;
        let Some(last) = part.last() else { return Ok(names) };
        after = last.cookie;
        for e in part {
            let name = String::from_utf8_lossy(&e.name).into_owned();
            if names.insert(name, e.ino).is_some() {
                let name = String::from_utf8_lossy(&e.name);
                return Err(world.fail(format!("{} {what}: {name} is listed twice", host.name())));
            }
        }
    }
}
