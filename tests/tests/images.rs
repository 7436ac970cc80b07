//! Volumes of this format version that were made once, whole and damaged, see images/README.md: fsck and mount must keep saying
//! the same of them.

use std::path::{Path, PathBuf};

use blockdev::image::{ImageFile, OpenMode};
use clusterfs_tests::cluster;
use clusterfs_tests::golden::{self, Image, Patch, damage};
use fs_core::Volume;

fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../images")
}

fn programs() -> PathBuf {
    cluster::programs().unwrap_or_else(|e| panic!("{e}"))
}

fn kept(name: &str) -> String {
    let path = images().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn every_golden_volume_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for (name, dead) in golden::VOLUMES {
        let image = dir.path().join(name);
        std::fs::write(&image, golden::unpack(&images(), name).unwrap()).unwrap();
        let fsck = || golden::fsck(&programs(), "-n", &image).unwrap();
        assert_eq!(fsck(), (0, kept(&format!("{name}.fsck"))), "fsck of {name}");
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let seen = rt.block_on(async {
            let device = ImageFile::open(&image, OpenMode::ReadWrite).unwrap();
            let v = Volume::mount(golden::mount_config(device, 5)).await.unwrap();
            let seen = golden::listing(&v).await.unwrap();
            v.unmount().await.unwrap();
            seen
        });
        let expected = kept(&format!("{name}.tree"));
        assert_eq!(seen, expected, "contents of {name}, with {dead} journals to replay");
        assert_eq!(fsck().0, 0, "{name} after a mount");
    }
}

/// What the kept patches do is what the code that made them does, and both programs say what they said.
#[test]
fn of_every_damage_fsck_and_mount_say_what_they_said() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut differ = Vec::new();
    for case in damage::CASES {
        let name = case.name;
        let patch = Patch::parse(&kept(&format!("damaged/{name}.patch"))).unwrap_or_else(|| panic!("{name}.patch"));
        let whole = golden::unpack(&images(), &patch.base).unwrap();
        let mut bytes = whole.clone();
        patch.apply(&mut bytes);
        let mut made = Image::new(whole);
        (case.make)(&mut made);
        assert!(made.bytes == bytes, "{name}: the patch is not what the damage makes");
        std::fs::write(&image, &bytes).unwrap();
        let said = golden::said(&programs(), &image, &kept(&format!("{}.tree", patch.base))).unwrap();
        let expected = kept(&format!("damaged/{name}.said"));
        if said != expected {
            differ.push(format!("== {name} ({}), expected:\n{expected}== but:\n{said}", case.title));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
    let files = std::fs::read_dir(images().join("damaged")).unwrap().count();
    assert_eq!(files, 2 * damage::CASES.len(), "a file for each case, and no other");
}
