//! Fuzzing for longer than the tests do: see docs/TESTING.md.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use clusterfs_tests::fuzz::watch::Counting;
use clusterfs_tests::fuzz::{formats::Corpus, golden, noise::Noise, requests::Requests, volume::Target};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Whole volumes: fsck, mount, reading
    Volume,
    /// Whole volumes: fsck -y
    Repair,
    /// Whole volumes: mkfs over them
    Remake,
    /// Single structures
    Formats,
    /// Hints, doorbells and heartbeats
    Noise,
    /// The kernel's requests
    Requests,
}

/// Change what is read from disk, network and kernel at random and look whether anything panics, hangs or contradicts itself
#[derive(Parser)]
struct Args {
    /// How long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// First seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only this many seeds
    #[arg(long, default_value_t = u64::MAX)]
    seeds: u64,
    #[arg(long, value_enum, default_value_t = What::Volume)]
    what: What,
    /// The golden volume to change (noise and requests: always `clean`)
    #[arg(long, default_value = "one-dead")]
    volume: String,
    /// Write the changed volume of the first seed to this file and do nothing else
    #[arg(long)]
    write: Option<PathBuf>,
}

type Case = Box<dyn Fn(u64) -> Result<String, String>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    if let Some(file) = args.write {
        return Ok(std::fs::write(file, Target::new(golden(&args.volume)?).image(args.first))?);
    }
    let case: Case = match args.what {
        What::Volume => {
            let target = Target::new(golden(&args.volume)?);
            Box::new(move |seed| {
                let o = target.case(seed)?;
                let read = if o.read { "read in full" } else { "not read in full" };
                Ok(format!("{}, {read}", if o.found { "fsck finds something" } else { "fsck finds nothing" }))
            })
        }
        What::Repair => {
            let target = Target::new(golden(&args.volume)?);
            Box::new(move |seed| Ok(format!("{:?}", target.repair(seed)?)))
        }
        What::Remake => {
            let target = Target::new(golden(&args.volume)?);
            Box::new(move |seed| target.remake(seed).map(|()| "done".into()))
        }
        What::Formats => {
            let corpus = Corpus::new(&[golden(&args.volume)?]);
            Box::new(move |seed| corpus.case(seed).map(|()| "done".into()))
        }
        What::Noise => {
            let noise = Noise::new(golden("clean")?)?;
            Box::new(move |seed| noise.case(seed).map(|()| "done".into()))
        }
        What::Requests => {
            let requests = Requests::new(golden("clean")?);
            Box::new(move |seed| requests.case(seed).map(|_| "done".into()))
        }
    };
    let started = Instant::now();
    let mut outcomes = std::collections::BTreeMap::<String, u64>::new();
    let mut done = 0;
    for seed in args.first..args.first.saturating_add(args.seeds) {
        if started.elapsed() > Duration::from_secs(args.seconds) {
            break;
        }
        done += 1;
        let outcome = case(seed).unwrap_or_else(|e| {
            println!("{e}");
            "failed".into()
        });
        *outcomes.entry(outcome).or_default() += 1;
    }
    println!("{done} cases, {:.0}/s", done as f64 / started.elapsed().as_secs_f64());
    for (outcome, n) in &outcomes {
        println!("{n:8} {outcome}");
    }
    if outcomes.contains_key("failed") {
        std::process::exit(1);
    }
    Ok(())
}
