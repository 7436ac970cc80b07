//! fsck.clusterfs.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fs_core::check::Progress;
use fsck::exit;

fn main() -> ExitCode {
    let args = match fsck::parse(std::env::args_os()) {
        Ok(a) => a,
        Err(code) => return code.into(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(r) => r,
        Err(e) => {
            eprintln!("fsck.clusterfs: cannot start: {e}");
            return exit::OPERATIONAL.into();
        }
    };
    let terminal = std::io::stderr().is_terminal();
    let line = ProgressLine::default();
    let show = |p: Progress| line.show(p);
    let outcome = runtime.block_on(async {
        tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => None,
            r = fsck::run(&args, terminal.then_some(&show as &(dyn Fn(Progress) + Sync))) => Some(r),
        }
    });
    if terminal {
        line.clear();
    }
    // A read that is still under way does not hold up the exit.
    runtime.shutdown_background();
    let Some(outcome) = outcome else {
        eprintln!("fsck.clusterfs: cancelled");
        return exit::CANCELLED.into();
    };
    match &outcome {
        Ok(done) => {
            let mut out = std::io::stdout().lock();
            if let Err(e) = fsck::print(&mut out, &args.device, &args, done).and_then(|()| out.flush()) {
                eprintln!("fsck.clusterfs: cannot print: {e}");
                return exit::OPERATIONAL.into();
            }
        }
        // It names the device itself.
        Err(e @ fsck::FsckError::Open(_)) => eprintln!("fsck.clusterfs: {e}"),
        Err(e) => eprintln!("fsck.clusterfs: {}: {e}", args.device.display()),
    }
    fsck::code(&outcome).into()
}

/// One line on the terminal that overwrites itself; at most one change per percent.
#[derive(Default)]
struct ProgressLine {
    last: AtomicU64,
}

impl ProgressLine {
    fn show(&self, p: Progress) {
        let percent = 100 * p.done / p.total.max(1);
        let id =
            (p.phase.len() as u64) << 32 | u64::from(p.phase.as_bytes().first().copied().unwrap_or(0)) << 8 | percent;
        if self.last.swap(id, Relaxed) != id {
            eprint!("\r\x1b[K{}: {percent} %", p.phase);
        }
    }

    fn clear(&self) {
        eprint!("\r\x1b[K");
    }
}
