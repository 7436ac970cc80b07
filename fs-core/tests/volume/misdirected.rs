//! A block that the device wrote to another block's place is never believed there: whoever needs what was there gets an error
//! that names the place.

use std::sync::Arc;

use crate::common::{WHO, dir, disk, file, mount};
use blockdev::sim::{SimConfig, SimDisk, SimImage};
use fs_core::{FsError, ROOT_INO, Volume, WriteOptions};

const FILES: u32 = 40;
const DIRS: u32 = 3;

fn body(d: u32, f: u32) -> Vec<u8> {
    format!("file {f} of directory {d} ").into_bytes().repeat(20)
}

async fn volume() -> (Arc<SimDisk>, Vec<u64>) {
    let disk = disk(64 << 20).await;
    let v = mount(&disk, "a").await;
    let mut dirs = Vec::new();
    for d in 0..DIRS {
        let ino = v.mkdir(WHO, ROOT_INO, format!("d{d}").as_bytes(), dir()).await.expect("mkdir").value.ino;
        for f in 0..FILES {
            let made = v.mknod(WHO, ino, format!("f{f}").as_bytes(), file(), false).await.expect("create").value.ino;
            v.write(made, 0, &body(d, f), WriteOptions::default()).await.expect("write");
        }
        dirs.push(ino);
    }
    v.unmount().await.expect("unmount");
    (disk, dirs)
}

/// Reads everything; the blocks that errors name.
async fn read_all(v: &Volume, dirs: &[u64]) -> Vec<u64> {
    let mut named = Vec::new();
    let mut told = |e: FsError| match e {
        FsError::Block { block, .. } => named.push(block),
        e => panic!("an error that names no block: {e}"),
    };
    for (d, dir) in (0..).zip(dirs) {
        for f in 0..FILES {
            let found = match v.lookup(*dir, format!("f{f}").as_bytes()).await {
                Ok(found) => found.value.expect("a file is missing without an error").ino,
                Err(e) => {
                    told(e);
                    continue;
                }
            };
            match v.read(found, 0, 1 << 20).await {
                Ok(got) => assert_eq!(got.value, body(d, f), "wrong contents without an error"),
                Err(e) => told(e),
            }
        }
    }
    named.dedup();
    named
}

/// Domain headers and tree nodes on the device.
fn metadata(disk: &SimDisk) -> Vec<(u64, u8)> {
    let blocks = (0..(64u64 << 20) / 4096).map(|b| (b, disk.read_raw(b * 4096, 8)));
    blocks.filter(|(_, head)| head.starts_with(b"CLFS") && matches!(head[4], 1 | 2)).map(|(b, h)| (b, h[4])).collect()
}

#[tokio::test(start_paused = true)]
async fn a_block_in_the_place_of_another_is_an_error_that_names_the_place() {
    let (disk, dirs) = volume().await;
    let blocks = metadata(&disk);
    let image: SimImage = disk.snapshot();
    let (mut tried, mut noticed) = (0, 0);
    for (i, (place, kind)) in blocks.iter().enumerate() {
        let Some((other, _)) = blocks[i + 1..].iter().chain(&blocks[..i]).find(|(_, k)| k == kind) else { continue };
        let disk = SimDisk::from_snapshot(SimConfig::new(64 << 20, 7), &image);
        let misdirected = disk.read_raw(other * 4096, 4096);
        disk.write_raw(place * 4096, &misdirected);
        tried += 1;
        // What a mount itself needs may be among it; then it is refused.
        let v = tokio::spawn({
            let disk = disk.clone();
            async move { mount(&disk, "a").await }
        });
        let Ok(v) = v.await else {
            noticed += 1;
            continue;
        };
        let named = read_all(&v, &dirs).await;
        assert!(named.iter().all(|b| b == place), "block {place} is damaged, errors name {named:?}");
        noticed += usize::from(!named.is_empty());
    }
    assert!(tried > 8 && noticed > 6, "{noticed} of {tried} noticed");
}
