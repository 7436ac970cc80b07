//! What happened in a run: a hash of all of it, and the last events in words.

use std::collections::VecDeque;

use parking_lot::Mutex;

const TAIL: usize = 60;

pub struct Trace {
    verbose: bool,
    inner: Mutex<Inner>,
}

struct Inner {
    started: Option<tokio::time::Instant>,
    tail: VecDeque<String>,
    hash: blake3::Hasher,
}

impl Trace {
    pub fn new(verbose: bool) -> Self {
        let inner = Inner { started: None, tail: VecDeque::new(), hash: blake3::Hasher::new() };
        Self { verbose, inner: Mutex::new(inner) }
    }

    pub fn note(&self, text: impl std::fmt::Display) {
        let mut inner = self.inner.lock();
        let now = tokio::time::Instant::now();
        let at = now - *inner.started.get_or_insert(now);
        let line = format!("{:9.3} {text}", at.as_secs_f64());
        inner.hash.update(line.as_bytes());
        if self.verbose {
            eprintln!("{line}");
        }
        if inner.tail.len() == TAIL {
            inner.tail.pop_front();
        }
        inner.tail.push_back(line);
    }

    pub fn tail(&self) -> Vec<String> {
        self.inner.lock().tail.iter().cloned().collect()
    }

    pub fn digest(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.inner.lock().hash.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }
}
