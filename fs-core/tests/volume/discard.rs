//! Blocks that hold nothing any more, told to the device: those, and no others.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{WHO, check_clean, disk, file, mount};
use blockdev::sim::SimDisk;
use fs_core::{ROOT_INO, Volume, WriteOptions};

const SIZE: usize = 64 << 20;
const FILE: usize = 4 << 20;

async fn write_file(v: &Volume, name: &[u8], byte: u8) -> u64 {
    let f = v.mknod(WHO, ROOT_INO, name, file(), false).await.expect("create").value.ino;
    v.write(f, 0, &vec![byte; FILE], WriteOptions::default()).await.expect("write");
    v.fsync(f, false).await.expect("fsync");
    f
}

/// Whole files of nothing but this byte that are on the device. Runs of less than 8 blocks may be left, at the ends of a file's extents.
fn files_of(disk: &Arc<SimDisk>, byte: u8) -> usize {
    const LEFT: usize = 16;
    let blocks = disk.read_raw(0, SIZE).chunks(4096).filter(|b| b.iter().all(|x| *x == byte)).count();
    let (files, rest) = (blocks / (FILE / 4096), blocks % (FILE / 4096));
    assert!(rest <= LEFT, "{blocks} blocks of {byte:#x}");
    files
}

async fn remove(v: &Volume, name: &[u8]) {
    v.unlink(ROOT_INO, name).await.expect("unlink");
    v.sync().await.expect("sync");
}

#[tokio::test(start_paused = true)]
async fn freed_blocks_are_discarded() {
    let disk = disk(SIZE as u64).await;
    let v = mount(&disk, "a").await;
    v.discard_freed_blocks();
    write_file(&v, b"goes", 0xd1).await;
    let kept = write_file(&v, b"stays", 0xd2).await;
    write_file(&v, b"last", 0xd3).await;
    assert_eq!([0xd1, 0xd2, 0xd3].map(|b| files_of(&disk, b)), [1, 1, 1]);
    remove(&v, b"goes").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!([0xd1, 0xd2, 0xd3].map(|b| files_of(&disk, b)), [0, 1, 1]);
    // What was freed is used again: what is there now stays.
    remove(&v, b"last").await;
    let again = write_file(&v, b"again", 0xd4).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    for (ino, byte) in [(kept, 0xd2), (again, 0xd4)] {
        assert!(v.read(ino, 0, FILE as u32).await.expect("read").value.iter().all(|b| *b == byte));
    }
    // The last frees go with the unmount.
    v.unlink(ROOT_INO, b"stays").await.expect("unlink");
    v.unmount().await.expect("unmount");
    assert_eq!([0xd2, 0xd3, 0xd4].map(|b| files_of(&disk, b)), [0, 0, 1]);
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_discarded_unasked() {
    let disk = disk(SIZE as u64).await;
    let v = mount(&disk, "a").await;
    write_file(&v, b"goes", 0xd1).await;
    remove(&v, b"goes").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    v.unmount().await.expect("unmount");
    assert_eq!(files_of(&disk, 0xd1), 1);
}
