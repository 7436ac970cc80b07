//! File locks: the two kinds kept apart, and a waiting request given up when its process gets a signal.

use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::guard::Mounted;
use crate::sys;

fn open(m: &Mounted) -> File {
    File::options().create(true).truncate(false).read(true).write(true).open(m.path("f")).unwrap()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn flock_and_posix_locks_do_not_meet() {
    let m = Mounted::new();
    let (a, b) = (open(&m), open(&m));
    sys::flock(&a, libc::LOCK_EX).unwrap();
    sys::posix_lock(&b, libc::F_SETLK, libc::F_WRLCK).unwrap();
    assert_eq!(m.fs.state.lock().lock_requests, [true, false]);
    assert_eq!(sys::flock(&b, libc::LOCK_EX | libc::LOCK_NB), Err(libc::EWOULDBLOCK));
    // An open file description's lock has another owner than the process.
    assert_eq!(sys::posix_lock(&a, libc::F_OFD_SETLK, libc::F_RDLCK), Err(libc::EAGAIN));
    assert_eq!(sys::posix_lock(&a, libc::F_OFD_GETLK, libc::F_RDLCK), Ok(libc::F_WRLCK.into()));
    drop(a);
    wait_until("release of the flock", || m.fs.state.lock().seen.contains(&"release with flock"));
    sys::flock(&b, libc::LOCK_EX | libc::LOCK_NB).unwrap();
}

#[test]
fn a_waiter_gets_the_lock_when_its_holder_lets_go() {
    let m = Mounted::new();
    let (a, b) = (open(&m), open(&m));
    sys::flock(&a, libc::LOCK_EX).unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| sys::flock(&b, libc::LOCK_EX));
        wait_until("parking", || m.fs.state.lock().parked() == 1);
        sys::flock(&a, libc::LOCK_UN).unwrap();
        waiter.join().unwrap().unwrap();
    });
}

/// Holds the lock, lets another thread wait for it, signals that thread and returns its error and its delay.
fn interrupted_wait(m: &Mounted, holder: &File, wait: impl Fn(&File) -> Result<i64, i32> + Sync) -> (i32, Duration) {
    sys::handle_sigusr1();
    let waiting = File::options().read(true).write(true).open(m.path("f")).unwrap();
    let before = m.fs.state.lock().parked();
    let (tell, told) = channel();
    let outcome = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            tell.send(sys::thread_self()).unwrap();
            let error = wait(&waiting).unwrap_err();
            (error, Instant::now())
        });
        let thread = told.recv().unwrap();
        wait_until("parking", || m.fs.state.lock().parked() > before);
        let sent = Instant::now();
        sys::signal(thread, libc::SIGUSR1);
        let (error, at) = waiter.join().unwrap();
        (error, at - sent)
    });
    let _ = holder;
    outcome
}

#[test]
fn a_signal_ends_the_wait_for_a_posix_lock() {
    let m = Mounted::new();
    let holder = open(&m);
    sys::posix_lock(&holder, libc::F_OFD_SETLK, libc::F_WRLCK).unwrap();
    let (error, delay) = interrupted_wait(&m, &holder, |f| sys::posix_lock(f, libc::F_SETLKW, libc::F_WRLCK));
    assert_eq!(error, libc::EINTR);
    assert!(delay < Duration::from_millis(100), "took {delay:?}");
    assert_eq!(m.fs.state.lock().parked(), 0);
}

#[test]
fn a_signal_ends_the_wait_for_a_flock() {
    let m = Mounted::new();
    let holder = open(&m);
    sys::flock(&holder, libc::LOCK_EX).unwrap();
    let (error, delay) = interrupted_wait(&m, &holder, |f| sys::flock(f, libc::LOCK_EX));
    assert_eq!(error, libc::EINTR);
    assert!(delay < Duration::from_millis(100), "took {delay:?}");
}

#[test]
fn interrupts_that_race_with_their_request_are_never_lost() {
    let m = Mounted::new();
    let holder = open(&m);
    sys::flock(&holder, libc::LOCK_EX).unwrap();
    sys::count_sigusr2();
    let waiting = open(&m);
    std::thread::scope(|scope| {
        let (tell, told) = channel();
        let waiter = scope.spawn(move || {
            for _ in 0..400 {
                tell.send(sys::thread_self()).unwrap();
                assert_eq!(sys::flock(&waiting, libc::LOCK_EX), Err(libc::EINTR));
            }
        });
        let mut round = 0u64;
        let mut next = told.recv().ok();
        while let Some(thread) = next {
            // Aim at all points between "not yet read" and "parked".
            round += 1;
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(round * 7 % 120) {
                std::hint::spin_loop();
            }
            let before = sys::sigusr2_count();
            sys::signal(thread, libc::SIGUSR2);
            // A thread inside a system call runs its signal handler only when the call returns: a handler that does
            // not run means that the call still waits, so the interrupt is lost.
            wait_until("the end of the wait", || sys::sigusr2_count() > before);
            next = match told.recv_timeout(Duration::from_millis(20)) {
                // The signal came before the system call: again.
                Err(RecvTimeoutError::Timeout) => Some(thread),
                Err(RecvTimeoutError::Disconnected) => None,
                Ok(thread) => Some(thread),
            };
        }
        waiter.join().unwrap();
    });
    assert_eq!(m.fs.state.lock().parked(), 0);
}

/// With io_uring a waiting request holds an entry; all on one processor, and at the same time, so that many find no
/// entry at all.
#[test]
fn requests_that_wait_never_keep_out_the_one_that_ends_their_waiting() {
    const WAITERS: usize = 200;
    let m = Mounted::new();
    let holder = open(&m);
    sys::flock(&holder, libc::LOCK_EX).unwrap();
    let files: Vec<File> = (0..WAITERS).map(|_| open(&m)).collect();
    let (start, got) = (std::sync::Barrier::new(WAITERS), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for file in &files {
            let (start, got) = (&start, &got);
            scope.spawn(move || {
                sys::run_on_cpu(0);
                start.wait();
                sys::flock(file, libc::LOCK_EX).unwrap();
                got.fetch_add(1, Ordering::SeqCst);
                sys::flock(file, libc::LOCK_UN).unwrap();
            });
        }
        sys::run_on_cpu(0);
        wait_until("parking of all", || m.fs.state.lock().parked() == WAITERS);
        assert_eq!(got.load(Ordering::SeqCst), 0);
        sys::flock(&holder, libc::LOCK_UN).unwrap();
    });
    assert_eq!(got.load(Ordering::SeqCst), WAITERS);
}
