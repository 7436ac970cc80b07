//! What bounds a case: a watchdog for loops that never wait, and an allocator that counts.
//!
//! Both end the whole process, naming the case: nothing else ends a loop, or takes back what was allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

/// Longest that a case may run: they take milliseconds.
const SECONDS: u64 = 60;
/// Most that all cases under way may have allocated, in bytes, beyond what was there before the first: the volume in memory is
/// 16 MiB, a mount's caches 24 MiB.
const MEMORY: usize = 512 << 20;

/// Of the case that began last; there may be others on other threads.
static SEED: AtomicU64 = AtomicU64::new(0);
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// Cases begun.
static BEGUN: AtomicU64 = AtomicU64::new(0);
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static BASE: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The global allocator of programs that fuzz.
pub struct Counting;

// SAFETY: all is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

fn grow(by: usize) {
    let now = ALLOCATED.fetch_add(by, SeqCst).wrapping_add(by);
    if RUNNING.load(SeqCst) > 0 && now > BASE.load(SeqCst).saturating_add(MEMORY) {
        RUNNING.store(0, SeqCst);
        give_up("allocates without bound");
    }
}

/// Without allocating, as this may be called by the allocator.
fn give_up(why: &str) -> ! {
    let mut digits = [0; 20];
    let mut left = SEED.load(SeqCst);
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    let mut err = std::io::stderr();
    for part in [&b"seed "[..], &digits[at..], b": ", why.as_bytes(), b"\n"] {
        let _ = err.write_all(part);
    }
    std::process::abort()
}

/// One case under way.
pub(crate) struct Case;

impl Case {
    pub fn begin(seed: u64) -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            BASE.store(ALLOCATED.load(SeqCst), SeqCst);
            std::thread::spawn(bark);
        });
        SEED.store(seed, SeqCst);
        BEGUN.fetch_add(1, SeqCst);
        RUNNING.fetch_add(1, SeqCst);
        Self
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, SeqCst);
    }
}

/// Ends the process when a case is under way and none has begun for too long.
fn bark() {
    let (mut before, mut since) = (0, 0);
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = BEGUN.load(SeqCst);
        since = if now == before && RUNNING.load(SeqCst) > 0 { since + 1 } else { 0 };
        before = now;
        if since >= SECONDS {
            give_up("does not end, and waits for nothing");
        }
    }
}
