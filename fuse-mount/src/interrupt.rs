//! Signals to processes that wait for an answer.
//!
//! The kernel tells of any signal, and lets the process go only when its request is answered. A request that is given up is
//! dropped at a point where it waits, with nothing done, and so answered with EINTR (see [`fuse_session::Reply`]):
//!
//! | request | is given up |
//! |---|---|
//! | file lock, fsync | at once |
//! | any other, the process being killed | at once |
//! | any other, after a signal that the process handles | when it has waited [`PATIENCE`]: on a local filesystem it would not be interrupted, and programs do not expect it |
//! | close of a descriptor | its locks are ended first, which takes a second at most, so that they are gone when the process is; the rest at once |
//! | last close | never: the kernel asks nobody |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_session::{InterruptHandle, Op};
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long an ordinary request goes on after a signal that its process handles, counted from its beginning.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct State {
    came: AtomicBool,
    wake: Notify,
}

/// The signal that may come.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<State>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Never,
    AtOnce,
    Patient,
}

/// How a request is given up.
pub fn manner(op: &Op) -> Manner {
    match op {
        Op::Release { .. } | Op::Releasedir { .. } => Manner::Never,
        // The wait for a lock ends by itself, as a lock that was granted just before must be told.
        Op::Setlkw { .. } => Manner::Never,
        // Nor a close, which looks for itself when it may.
        Op::Flush { .. } => Manner::Never,
        Op::Getlk { .. } | Op::Setlk { .. } => Manner::AtOnce,
        Op::Fsync { .. } | Op::Fsyncdir { .. } | Op::Syncfs => Manner::AtOnce,
        _ => Manner::Patient,
    }
}

impl Interrupt {
    /// Takes note of the signal from now on, and of one that came before.
    pub fn listen(&self, to: &InterruptHandle) {
        let state = self.0.clone();
        to.on_interrupt(move || {
            state.came.store(true, Ordering::Release);
            state.wake.notify_waiters();
        });
    }

    pub async fn came(&self) {
        loop {
            let wake = self.0.wake.notified();
            tokio::pin!(wake);
            wake.as_mut().enable();
            if self.0.came.load(Ordering::Acquire) {
                return;
            }
            wake.await;
        }
    }

    /// Waits until a request of `thread` that began at `since` is to be given up.
    pub async fn gives_up(&self, manner: Manner, thread: u32, since: Instant) {
        if manner == Manner::Never {
            return std::future::pending().await;
        }
        self.came().await;
        if manner == Manner::Patient && !is_killed(thread) {
            tokio::time::sleep_until(since + PATIENCE).await;
        }
    }
}

/// Whether a thread has been killed but cannot die yet. One that cannot be seen (another namespace) counts as alive.
fn is_killed(thread: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")));
    let mut masks = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    masks.any(|mask| mask & 1 << (libc::SIGKILL - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_not_killed() {
        assert!(!is_killed(std::process::id()));
        assert!(!is_killed(0) && !is_killed(u32::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_patient_waits_and_who_is_not_does_not() {
        let (me, since) = (std::process::id(), Instant::now());
        let interrupt = Interrupt::default();
        interrupt.0.came.store(true, Ordering::Release);
        interrupt.gives_up(Manner::AtOnce, me, since).await;
        assert_eq!(since.elapsed(), Duration::ZERO);
        interrupt.gives_up(Manner::Patient, me, since).await;
        assert_eq!(since.elapsed(), PATIENCE);
        let never = interrupt.gives_up(Manner::Never, me, since);
        assert!(tokio::time::timeout(Duration::from_secs(100), never).await.is_err());
    }
}
