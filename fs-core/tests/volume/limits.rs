//! As much as there may be of something, on the simulated device.

use crate::common::{WHO, check_clean, dir, disk, file, mount};
use fs_core::{FsError, ROOT_INO, SetAttr, WriteOptions};

#[tokio::test(start_paused = true)]
async fn a_file_has_65_000_names() {
    const MOST: u32 = 65_000;
    let disk = disk(256 << 20).await;
    let v = mount(&disk, "a").await;
    let d = v.mkdir(WHO, ROOT_INO, b"d", dir()).await.expect("mkdir").value.ino;
    let f = v.mknod(WHO, d, b"0", file(), false).await.expect("create").value.ino;
    for i in 1..MOST {
        v.link(f, d, i.to_string().as_bytes()).await.unwrap_or_else(|e| panic!("link {i}: {e}"));
    }
    assert!(matches!(v.link(f, d, b"one more").await, Err(FsError::TooManyLinks)));
    v.unlink(d, b"5").await.expect("unlink");
    v.link(f, d, b"one more").await.expect("there is room for it again");
    assert_eq!(v.getattr(f).await.expect("getattr").value.inode.links, MOST);
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_in_many_pieces_is_cut_short() {
    const PIECES: u64 = 30_000;
    let disk = disk(256 << 20).await;
    let v = mount(&disk, "a").await;
    let before = v.statfs().await.expect("statfs").free;
    let f = v.mknod(WHO, ROOT_INO, b"f", file(), false).await.expect("create").value.ino;
    for i in 0..PIECES {
        v.write(f, i * 8192, &[i as u8; 4096], WriteOptions::default()).await.unwrap_or_else(|e| panic!("{i}: {e}"));
    }
    let cut = |size| SetAttr { size: Some(size), ..SetAttr::default() };
    v.setattr(f, cut(PIECES / 2 * 8192 + 100)).await.expect("half of it");
    assert_eq!(v.getattr(f).await.expect("getattr").value.inode.blocks, PIECES / 2 + 1);
    v.setattr(f, cut(0)).await.expect("all of it");
    let inode = v.getattr(f).await.expect("getattr").value.inode;
    assert_eq!((inode.size, inode.blocks), (0, 0));
    v.unlink(ROOT_INO, b"f").await.expect("unlink");
    v.sync().await.expect("sync");
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    let v = mount(&disk, "a").await;
    // Nodes of the tree that the extents were in are kept.
    let free = v.statfs().await.expect("statfs").free;
    assert!(free + 64 >= before, "{before} blocks were free, now {free}");
    v.unmount().await.expect("unmount");
}
