//! Makes the golden volumes anew. Do so only when the format has changed on purpose: see images/README.md.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{AlignedBuf, BlockDevice, IoClass};
use clap::Parser;
use clusterfs_tests::golden;
use flate2::Compression;
use flate2::write::GzEncoder;
use fs_core::Volume;

/// Make the golden volumes
#[derive(Parser)]
struct Args {
    /// Where to put them
    dir: PathBuf,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    for (name, dead) in golden::VOLUMES {
        let bytes = rt.block_on(golden::make(dead))?;
        let mut z = GzEncoder::new(File::create(args.dir.join(format!("{name}.img.gz")))?, Compression::best());
        z.write_all(&bytes)?;
        z.finish()?;
        let listing = rt.block_on(async {
            let disk = SimDisk::new(SimConfig::new(bytes.len() as u64, 12));
            let raw: Arc<dyn BlockDevice> = disk.open_raw();
            raw.write(IoClass::Meta, 0, Arc::new(AlignedBuf::copy_of(&bytes)), false).await?;
            let v = Volume::mount(golden::mount_config(disk.open("reader"), 9)).await?;
            golden::listing(&v).await
        })?;
        std::fs::write(args.dir.join(format!("{name}.tree")), listing)?;
        println!("{name}: {} bytes of volume", bytes.len());
    }
    Ok(())
}
