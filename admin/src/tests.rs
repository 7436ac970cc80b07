//! Status and info of image files.

use std::path::PathBuf;
use std::sync::Arc;

use blockdev::image::{ImageFile, OpenMode};
use blockdev::{AlignedBuf, BlockDevice, FenceKey, IoClass};
use cluster::{SlotBlock, SlotState};
use mkfs::{FormatOptions, Made};
use serde_json::Value;

use crate::{info, status};

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
    dev: Arc<dyn BlockDevice>,
    made: Made,
}

async fn image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    ImageFile::create(&path, 64 << 20).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let opts = FormatOptions { label: "post".into(), nodes: Some(4), ..FormatOptions::seeded(1) };
    let made = mkfs::format(&dev, &opts, &mut |_| ()).await.unwrap();
    Image { _dir: dir, path, dev, made }
}

async fn status_json(i: &Image) -> Value {
    serde_json::from_str(&status::run(&i.path, true).await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_new_volume_has_free_slots_only() {
    let i = image().await;
    let s = status_json(&i).await;
    assert_eq!((&s["label"], &s["size"]), (&"post".into(), &(64u64 << 20).into()));
    assert_eq!(s["free_noted"], i.made.free_blocks * 4096);
    let slots = s["slots"].as_array().unwrap();
    assert_eq!(slots.len(), 4);
    assert!(slots.iter().all(|x| x["state"] == "free" && x["alive"] == false && x["last_end"] == "never"));
    let text = status::run(&i.path, false).await.unwrap();
    assert!(text.contains("0 of 4 nodes") && text.ends_with("free slots: 4\n"), "{text}");
}

#[tokio::test]
async fn live_dead_and_damaged_slots_are_told_apart() {
    let i = image().await;
    let c = i.made.superblock.layout().cluster();
    for slot in [1, 2] {
        let block = SlotBlock::decode(&cluster::initial_slot_block(&c, slot), c.volume, slot).unwrap();
        let block = SlotBlock { state: SlotState::Live, incarnation: 5, host_name: format!("mail{slot}"), ..block };
        let sector = AlignedBuf::copy_of(&block.encode(c.stride));
        i.dev.write(IoClass::Lock, c.slot_block(slot), Arc::new(sector), true).await.unwrap();
    }
    i.dev.register(FenceKey { slot: 1, incarnation: 5 }).await.unwrap();
    let ruined = AlignedBuf::copy_of(&vec![7; c.stride as usize]);
    i.dev.write(IoClass::Lock, c.slot_block(3), Arc::new(ruined), true).await.unwrap();
    let s = status_json(&i).await;
    let seen: Vec<_> = (0..4).map(|n| (s["slots"][n]["state"].as_str().unwrap(), &s["slots"][n]["alive"])).collect();
    let (yes, no) = (Value::from(true), Value::from(false));
    assert_eq!(seen, [("free", &no), ("live", &yes), ("live", &no), ("damaged", &no)]);
    assert_eq!((&s["slots"][1]["host"], &s["slots"][1]["incarnation"]), (&"mail1".into(), &5.into()));
    let text = status::run(&i.path, false).await.unwrap();
    assert!(text.contains("1 of 4 nodes") && text.contains("dead, to be recovered"), "{text}");
    assert!(text.contains("slot 3: ") && text.contains("free slots: 1"), "{text}");
}

#[tokio::test]
async fn info_shows_the_layout_and_no_key_and_falls_back_to_the_copy() {
    let i = image().await;
    let json = info::run(&i.path, true).await.unwrap();
    let v: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(v["uuid"], mkfs::uuid_text(&i.made.superblock.uuid));
    let areas = v["areas"].as_array().unwrap();
    let mut end = 0;
    for a in areas {
        assert_eq!(a["offset"], end, "areas follow each other");
        end += a["len"].as_u64().unwrap();
    }
    assert_eq!(end, 64 << 20);
    let key: String = i.made.superblock.hint_key.iter().map(|b| format!("{b:02x}")).collect();
    assert!(!json.contains(&key) && v.get("hint_key").is_none());
    i.dev.write(IoClass::Meta, 0, Arc::new(AlignedBuf::zeroed(4096)), true).await.unwrap();
    let text = info::run(&i.path, false).await.unwrap();
    assert!(text.starts_with("The first superblock cannot be used"), "{text}");
    assert_eq!(status_json(&i).await["superblock_damaged"], true);
}

#[tokio::test]
async fn what_is_no_volume_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros");
    ImageFile::create(&path, 1 << 20).unwrap();
    let e = status::run(&path, false).await.unwrap_err().to_string();
    assert!(e.contains("zeros: no clusterfs volume"), "{e}");
    let e = info::run(&dir.path().join("none"), false).await.unwrap_err().to_string();
    assert!(e.contains("none: no such file"), "{e}");
}
