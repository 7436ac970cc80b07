//! clusterfs-exercise: as many random operations on files as asked for, on two real mounts; see docs/TESTING.md.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clusterfs_tests::cluster::{Cluster, Result};
use clusterfs_tests::exercise::{fsx, shared_file};

#[derive(Parser)]
#[command(about = "Random operations on the contents of files, on two nodes, with every read compared")]
struct Args {
    /// Operations of fsx on each node's own file, both at once
    #[arg(long, default_value_t = 1_000_000)]
    fsx: u64,
    /// Operations on one file through both nodes in turn
    #[arg(long, default_value_t = 20_000)]
    shared: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the image is made; by default in a temporary directory (TMPDIR)
    #[arg(long)]
    image: Option<PathBuf>,
}

/// The nodes are killed after this long.
const LIMIT: Duration = Duration::from_secs(12 * 3600);
const VOLUME: u64 = 1 << 30;
const SLOTS: usize = 3;

fn main() -> ExitCode {
    match exercise(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("clusterfs-exercise: {e}");
            ExitCode::FAILURE
        }
    }
}

fn exercise(args: &Args) -> Result<()> {
    let c = match &args.image {
        Some(image) => {
            File::create(image)?.set_len(VOLUME)?;
            Cluster::formatted_on(image, SLOTS, LIMIT, &[])?
        }
        None => Cluster::formatted_for(SLOTS, VOLUME, LIMIT)?,
    };
    for node in [0, 1] {
        c.mount(node)?;
    }
    if args.shared > 0 {
        shared_file(&c, &[0, 1], args.shared, args.seed)?;
    }
    if args.fsx > 0 {
        fsx(&c, &[0, 1], args.fsx, args.seed)?;
    }
    c.finish();
    Ok(())
}
