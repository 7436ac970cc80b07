//! Makes the golden volumes and the damaged ones anew, with what fsck and a mount say of them. Do so only when the format or those
//! words have changed on purpose, and read the differences: see images/README.md.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{AlignedBuf, BlockDevice, IoClass};
use clap::Parser;
use clusterfs_tests::cluster;
use clusterfs_tests::golden::{self, Error, Image, Patch, damage};
use flate2::Compression;
use flate2::write::GzEncoder;
use fs_core::Volume;

/// Make the golden volumes
#[derive(Parser)]
struct Args {
    /// Where to put them
    dir: PathBuf,
    /// Keep the volumes, and make only the damage and what is said anew
    #[arg(long)]
    keep: bool,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let programs = cluster::programs()?;
    if !args.keep {
        for (name, dead) in golden::VOLUMES {
            volume(&args.dir, name, dead)?;
        }
    }
    let scratch = tempfile::tempdir()?;
    let image = scratch.path().join("image");
    for (name, _) in golden::VOLUMES {
        std::fs::write(&image, golden::unpack(&args.dir, name)?)?;
        let (_, said) = golden::fsck(&programs, "-n", &image)?;
        std::fs::write(args.dir.join(format!("{name}.fsck")), said)?;
    }
    let damaged = args.dir.join("damaged");
    let _ = std::fs::remove_dir_all(&damaged);
    std::fs::create_dir_all(&damaged)?;
    for case in damage::CASES {
        let whole = golden::unpack(&args.dir, case.base)?;
        let mut v = Image::new(whole.clone());
        (case.make)(&mut v);
        let patch = Patch::between(case.title, case.base, &whole, &v.bytes);
        std::fs::write(damaged.join(format!("{}.patch", case.name)), patch.to_text())?;
        std::fs::write(&image, &v.bytes)?;
        let tree = std::fs::read_to_string(args.dir.join(format!("{}.tree", case.base)))?;
        let said = golden::said(&programs, &image, &tree)?;
        std::fs::write(damaged.join(format!("{}.said", case.name)), said)?;
        println!("damaged/{}", case.name);
    }
    Ok(())
}

/// A golden volume, and the listing of a mount of it.
fn volume(dir: &Path, name: &str, dead: usize) -> Result<(), Error> {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    let bytes = rt.block_on(golden::make(dead))?;
    let mut z = GzEncoder::new(File::create(dir.join(format!("{name}.img.gz")))?, Compression::best());
    z.write_all(&bytes)?;
    z.finish()?;
    let listing = rt.block_on(async {
        let disk = SimDisk::new(SimConfig::new(bytes.len() as u64, 12));
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        raw.write(IoClass::Meta, 0, Arc::new(AlignedBuf::copy_of(&bytes)), false).await?;
        let v = Volume::mount(golden::mount_config(disk.open("reader"), 9)).await?;
        golden::listing(&v).await
    })?;
    std::fs::write(dir.join(format!("{name}.tree")), listing)?;
    println!("{name}: {} bytes of volume", bytes.len());
    Ok(())
}
