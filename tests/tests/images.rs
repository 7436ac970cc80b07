//! Volumes of this format version that were made once, see images/README.md: fsck and mount must keep saying the same of them.

use std::fs::File;
use std::io::copy;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockdev::image::{ImageFile, OpenMode};
use clusterfs_tests::{cluster, golden};
use flate2::read::GzDecoder;
use fs_core::Volume;

fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../images")
}

fn unpack(name: &str, to: &Path) {
    let packed = images().join(format!("{name}.img.gz"));
    let packed = File::open(&packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
    let mut image = File::create(to).expect("a file for the volume");
    copy(&mut GzDecoder::new(packed), &mut image).expect("a volume");
}

/// `fsck.clusterfs -n -f`: exit status and what it says of the volume.
fn fsck(image: &Path) -> (i32, String) {
    let bin = cluster::programs().unwrap_or_else(|e| panic!("{e}")).join("fsck.clusterfs");
    let out = Command::new(bin).args(["-n", "-f"]).arg(image).output().expect("fsck runs");
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).replace(&*image.to_string_lossy(), "IMAGE");
    (out.status.code().unwrap_or(-1), said)
}

#[test]
fn every_golden_volume_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for (name, dead) in golden::VOLUMES {
        let image = dir.path().join(name);
        unpack(name, &image);
        let expected = std::fs::read_to_string(images().join(format!("{name}.fsck"))).unwrap();
        assert_eq!(fsck(&image), (0, expected), "fsck of {name}");
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let seen = rt.block_on(async {
            let device = ImageFile::open(&image, OpenMode::ReadWrite).unwrap();
            let v = Volume::mount(golden::mount_config(device, 5)).await.unwrap();
            let seen = golden::listing(&v).await.unwrap();
            v.unmount().await.unwrap();
            seen
        });
        let expected = std::fs::read_to_string(images().join(format!("{name}.tree"))).unwrap();
        assert_eq!(seen, expected, "contents of {name}, with {dead} journals to replay");
        assert_eq!(fsck(&image).0, 0, "{name} after a mount");
    }
}
