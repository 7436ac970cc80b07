//! clusterfs-bench: how long things take that a test asserts no figure for. Real mounts on image files.

mod takeover;
mod tools;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use clusterfs_tests::bench::place::{self, Place};
use clusterfs_tests::bench::report::{self, Run};
use clusterfs_tests::bench::{Scale, end_on_signals, measure, scenarios};
use clusterfs_tests::cluster::Result;

#[derive(Parser)]
#[command(about = "Measures clusters of real mounts on image files, and local filesystems beside them")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run scenarios and show the medians of interleaved rounds
    Run(RunArgs),
    /// Put the figures of earlier runs (`run --json`) into a document, and a plot beside it
    Doc {
        document: PathBuf,
        #[arg(required = true)]
        runs: Vec<PathBuf>,
    },
    /// Say what the scenarios do
    List,
    /// How long mkfs, and a check of a volume with 10,000 messages, take
    Tools {
        #[command(flatten)]
        store: Store,
        #[arg(long, default_value_t = 3)]
        rounds: usize,
    },
    /// One node is killed while it makes files as fast as it can; when does the other go on in the same directory?
    Takeover {
        /// Size of each journal, as mkfs takes it; how full it is when its node dies is printed
        #[arg(long, default_value = "64M")]
        journal: String,
        #[arg(long, default_value_t = 11)]
        rounds: usize,
        /// Where the image is made; by default in a temporary directory
        #[arg(long)]
        image: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Store {
    /// Where a directory for the images is made
    #[arg(long, default_value = "/var/tmp")]
    store: PathBuf,
}

#[derive(clap::Args)]
struct RunArgs {
    /// Only scenarios whose names contain one of these
    scenarios: Vec<String>,
    /// What is measured: clusterfs, clusterfs:MOUNT-OPTIONS, ext4, xfs; may be repeated
    #[arg(long = "on", default_values_t = ["clusterfs".to_string(), "ext4".to_string(), "xfs".to_string()])]
    on: Vec<String>,
    #[arg(long, value_enum, default_value_t = Scale::Quick)]
    scale: Scale,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    store: Store,
    /// Also write all figures as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Also put the figures into this document, and a plot beside it, as in docs/PERFORMANCE.md
    #[arg(long)]
    doc: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Task::Run(args) => run(&args),
        Task::Doc { document, runs } => doc(&document, &runs),
        Task::List => {
            scenarios::all().for_each(|s| println!("{:20} {}\n{:20} limited by: {}", s.name, s.about, "", s.limits));
            Ok(())
        }
        Task::Tools { store, rounds } => tools::tools(&store.store, rounds),
        Task::Takeover { journal, rounds, image } => takeover::takeover(&journal, rounds, image.as_deref()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("clusterfs-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> Result<()> {
    end_on_signals();
    place::is_roomy(&args.store.store, 4 << 30)?;
    let store = tempfile::tempdir_in(&args.store.store)?;
    let before = load();
    let places = args.on.iter().map(|spec| Place::new(spec, store.path())).collect::<Result<Vec<_>>>()?;
    let measured = measure(&places, &args.scenarios, args.scale, args.rounds, |name| eprintln!("{name} ..."))?;
    if measured.is_empty() {
        return Err("no scenario has such a name, or none can run there: clusterfs-bench list".into());
    }
    let run = Run {
        host: host(),
        load: (before, load()),
        scale: format!("{:?}", args.scale).to_lowercase(),
        rounds: args.rounds,
        results: measured.iter().map(report::line).collect(),
    };
    print!("{}", report::table(&run));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&run)?)?;
    }
    if let Some(path) = &args.doc {
        report::into_document(&run, path)?;
    }
    Ok(())
}

fn doc(document: &Path, runs: &[PathBuf]) -> Result<()> {
    let mut all: Option<Run> = None;
    for path in runs {
        let run: Run = serde_json::from_slice(&std::fs::read(path)?).map_err(|e| format!("{}: {e}", path.display()))?;
        match &mut all {
            None => all = Some(run),
            Some(all) => all.add(run).map_err(|e| format!("{}: {e}", path.display()))?,
        }
    }
    all.map_or(Ok(()), |run| report::into_document(&run, document))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_string()
}

/// The load average of the last minute.
fn load() -> f64 {
    read("/proc/loadavg").split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(f64::NAN)
}

fn host() -> String {
    let processors = std::thread::available_parallelism().map_or(0, |n| n.get());
    let memory = read("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    format!("{processors} processors, {} GiB, Linux {}", memory >> 20, read("/proc/sys/kernel/osrelease"))
}
