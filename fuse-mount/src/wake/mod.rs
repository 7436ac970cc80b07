//! Waking those who watch by inotify what another node changes.
//!
//! The kernel tells a watcher what happens through its own host's mount, and no FUSE notification makes it tell of anything
//! else. So when another node takes a domain away and something in it is watched here, a process of ours goes through the mount a
//! moment later and does what gives events and changes nothing: it opens and closes what is watched, makes a hidden file in a
//! directory and removes it, or allocates a file's first byte; the daemon answers that without doing it ([`mark`]). Whoever waits for changes of a
//! directory or file takes one of these events as a reason to look.
//!
//! 1. [`Taken`]: a revocation that makes the kernel forget a domain notes it here.
//! 2. [`Schedule`]: decides when to look for watches, and whom to wake when. A domain that nobody watches costs nothing
//!    but its part of a search through `/proc` ([`watchers`]), which takes a bounded share of the time. A watched one is taken
//!    back in shared mode once in [`schedule::PAUSE`] at most, and only after it was taken away.
//! 3. [`helper`]: the process. Only a file system's users may wait for it: a thread of the daemon that did would keep a killed
//!    daemon from ending, because the kernel ends the connection when its last descriptor is closed.
//!
//! The open takes the domain back in shared mode by the usual way before the kernel tells the watcher, so who looks then sees the
//! change. It holds no lock of the kernel meanwhile: opening a directory does not take its i_rwsem, and what does take it is answered
//! without waiting.

pub mod helper;
pub mod mark;
mod schedule;
mod watchers;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::convert::to_nodeid;
use crate::kernel_cache::KnownInodes;
use helper::Helper;
use schedule::{Schedule, Step};

#[derive(Default)]
struct News {
    domains: BTreeSet<u32>,
    stop: bool,
}

/// Domains that another node has taken away, until the waker gets to know of them.
#[derive(Default)]
pub struct Taken {
    news: Mutex<News>,
    changed: Condvar,
}

impl Taken {
    pub fn note(&self, domains: impl IntoIterator<Item = u32>) {
        self.news.lock().domains.extend(domains);
        self.changed.notify_one();
    }

    fn stop(&self) {
        self.news.lock().stop = true;
        self.changed.notify_one();
    }

    /// Waits for news until then. `None`: the end.
    fn next(&self, until: Option<Instant>) -> Option<BTreeSet<u32>> {
        let mut news = self.news.lock();
        while news.domains.is_empty() && !news.stop {
            match until {
                None => self.changed.wait(&mut news),
                Some(at) if self.changed.wait_until(&mut news, at).timed_out() => break,
                Some(_) => {}
            }
        }
        (!news.stop).then(|| std::mem::take(&mut news.domains))
    }
}

/// The thread that wakes watchers, while this lives.
pub struct Waker {
    known: Arc<KnownInodes>,
    thread: Option<JoinHandle<()>>,
}

impl Waker {
    /// For the mount at `dir`, which is there.
    pub fn start(known: Arc<KnownInodes>, dir: &Path) -> io::Result<Self> {
        let work = Work { known: known.clone(), dir: dir.to_owned(), device: watchers::device_of(dir)?, helper: None };
        let thread = std::thread::Builder::new().name("waker".into()).spawn(move || work.run())?;
        Ok(Self { known, thread: Some(thread) })
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        self.known.taken.stop();
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread that wakes watchers panicked");
        }
    }
}

struct Work {
    known: Arc<KnownInodes>,
    dir: PathBuf,
    /// The mount's device number, as the kernel writes it.
    device: u64,
    helper: Option<Helper>,
}

impl Work {
    fn run(mut self) {
        let mut schedule = Schedule::default();
        let mut until = None;
        while let Some(taken) = self.known.taken.next(until) {
            let now = Instant::now();
            taken.into_iter().for_each(|d| schedule.taken(d, now));
            until = loop {
                match schedule.step(Instant::now()) {
                    Step::Search => {
                        let started = Instant::now();
                        let found = watchers::search(Path::new("/proc"), self.device);
                        schedule.searched(started, Instant::now(), found);
                    }
                    Step::Wake(inodes) => inodes.into_iter().for_each(|ino| self.wake(ino)),
                    Step::Wait(until) => break until,
                }
            };
        }
    }

    /// An inode that the kernel has forgotten is not watched any more.
    fn wake(&mut self, ino: u64) {
        let Some(generation) = self.known.generation(ino) else { return };
        if self.helper.is_none() {
            match Helper::start(&self.dir, self.device) {
                Ok((helper, threads)) => {
                    self.known.helper.set(threads);
                    self.helper = Some(helper);
                }
                Err(e) => return tracing::warn!("cannot wake those who watch for changes: {e}"),
            }
        }
        if let Some(helper) = &mut self.helper
            && let Err(e) = helper.touch(to_nodeid(ino), generation)
        {
            tracing::warn!(
                "the process that wakes those who watch for changes is gone ({e}); the next one gets another"
            );
            self.helper = None;
        }
    }
}
