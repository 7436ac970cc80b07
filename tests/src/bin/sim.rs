//! clusterfs-sim: runs the crash simulator, one seed or many. See docs/TESTING.md.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use clusterfs_tests::sim::kept::Kept;
use clusterfs_tests::sim::soak::{Plan, Report, soak};
use clusterfs_tests::sim::{Failure, run};

#[derive(Parser)]
#[command(about = "Runs whole clusters on a simulated device, with crashes, from seeds")]
struct Args {
    /// Run this seed and print what happens; the layers' own log with it where RUST_LOG says so
    #[arg(long)]
    seed: Option<u64>,
    /// With --seed: print only the outcome
    #[arg(long, short)]
    quiet: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run many seeds on all cores
    Soak {
        /// The first seed; by default from the clock
        #[arg(long)]
        first: Option<u64>,
        /// How many seeds
        #[arg(long)]
        seeds: Option<u64>,
        /// For how long; 60 if neither is given
        #[arg(long)]
        seconds: Option<u64>,
        /// Threads; by default one per core
        #[arg(long)]
        threads: Option<usize>,
        /// Stop after this many failures
        #[arg(long, default_value_t = 10)]
        failures: usize,
        /// Only seeds of volumes that are locked without compare-and-write
        #[arg(long)]
        plain: bool,
        /// Where seeds that fail are kept; those that it has are run first, and leave it when they pass
        #[arg(long, default_value = "target/failing-seeds")]
        kept: PathBuf,
        /// Run no kept seeds, and keep none
        #[arg(long)]
        keep_none: bool,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    match (args.command, args.seed) {
        (Some(Command::Soak { first, seeds, seconds, threads, failures, plain, kept, keep_none }), _) => {
            let first = first.unwrap_or_else(clusterfs_tests::sim::fresh_seed);
            let seconds = seconds.or(if seeds.is_none() { Some(60) } else { None });
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            let time = seconds.map(Duration::from_secs);
            let kept = (!keep_none).then(|| Kept::new(&kept));
            many(Plan { first, seeds, time, threads: threads.unwrap_or(cores), failures, plain, kept })
        }
        (None, Some(seed)) => one(seed, args.quiet),
        (None, None) => {
            eprintln!("clusterfs-sim: give --seed N, or soak");
            ExitCode::from(2)
        }
    }
}

fn one(seed: u64, quiet: bool) -> ExitCode {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    match run(seed, !quiet) {
        Ok(t) => {
            println!(
                "seed {seed}: {} operations, {} crashes, {} of all nodes, digest {:016x}",
                t.operations, t.crashes, t.blackouts, t.digest
            );
            ExitCode::SUCCESS
        }
        Err(mut f) => {
            if !quiet {
                f.tail.clear();
            }
            println!("{f}");
            ExitCode::FAILURE
        }
    }
}

fn many(plan: Plan) -> ExitCode {
    println!("seeds from {} on {} threads", plan.first, plan.threads);
    let kept = plan.kept.clone();
    if let Some(kept) = &kept {
        match kept.seeds() {
            Ok(seeds) if !seeds.is_empty() => {
                println!("first the {} that failed before ({})", seeds.len(), kept.path().display());
            }
            _ => {}
        }
    }
    let report = match soak(plan, &tell) {
        Ok(report) => report,
        Err(e) => {
            let path = kept.map(|k| k.path().display().to_string()).unwrap_or_default();
            eprintln!("clusterfs-sim: {path}: {e}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}", line(&report));
    if report.failures.is_empty() {
        return ExitCode::SUCCESS;
    }
    let seeds: Vec<String> = report.failures.iter().map(|f| f.seed.to_string()).collect();
    println!("failed: {}", seeds.join(" "));
    if let Some(kept) = kept {
        println!("kept in {}, to be run first by the next soak", kept.path().display());
    }
    ExitCode::FAILURE
}

fn tell(report: &Report, failure: Option<&Failure>) {
    match failure {
        Some(f) => println!("seed {} failed: {}", f.seed, f.what),
        None => println!("{}", line(report)),
    }
}

fn line(r: &Report) -> String {
    let t = &r.totals;
    let per_minute = t.seeds as f64 * 60.0 / r.time.as_secs_f64().max(0.001);
    format!(
        "{} seeds in {:.0} s ({per_minute:.0} per minute), {} failed; {} operations, {} crashes, {} losses of all nodes, \
         {} mounts, {} times full, {} errors of damage, {} trees and messages verified after a crash",
        t.seeds,
        r.time.as_secs_f64(),
        r.failures.len(),
        t.operations,
        t.crashes,
        t.blackouts,
        t.mounts,
        t.full,
        t.damaged,
        t.verified
    )
}
