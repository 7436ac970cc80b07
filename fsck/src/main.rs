//! fsck.clusterfs.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fs_core::check::Progress;
use fsck::exit;
use tokio::signal::unix::{SignalKind, signal};

/// Between two changes of the progress line.
const BETWEEN: Duration = Duration::from_millis(200);

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
    let line = ProgressLine::new();
    let show = |p: Progress| line.show(p);
    let outcome = runtime.block_on(async {
        tokio::select! {
            biased;
            () = cancelled() => None,
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

/// One line on the terminal that overwrites itself, a few times a second.
struct ProgressLine {
    state: Mutex<(&'static str, Instant, Instant)>,
}

impl ProgressLine {
    fn new() -> Self {
        let now = Instant::now();
        Self { state: Mutex::new(("", now, now)) }
    }

    fn show(&self, p: Progress) {
        let now = Instant::now();
        let Ok(mut state) = self.state.lock() else { return };
        let (phase, since, shown) = &mut *state;
        if *phase != p.phase {
            (*phase, *since) = (p.phase, now);
        } else if now - *shown < BETWEEN {
            return;
        }
        *shown = now;
        eprint!("\r\x1b[K{}", fsck::progress_text(&p, now - *since));
    }

    fn clear(&self) {
        eprint!("\r\x1b[K");
    }
}

/// Ends when the process is asked to.
async fn cancelled() {
    let Ok(mut term) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}
