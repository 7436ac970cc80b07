//! One queue: the thread that takes its requests, and hands in the answers whoever gave them.
//!
//! An entry is held by its request until that is answered, so requests that wait could use up all entries, and the one
//! that would end their waiting would stay in the kernel for ever. The kernel moves a request that found no entry only
//! when an answer is handed in; new entries alone do not move it. Hence: when the last entry is held, more are added,
//! and as many requests of our own ([`Kicker`]) are sent through the queue: the answer to each lets one through. If all
//! those come to wait as well, the last entry is held again.

use std::io::{self, IoSlice};
use std::os::fd::RawFd;
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use tracing::{debug, warn};

use super::entry::{Answers, Entry};
use super::kick::Kicker;
use crate::abi::{URING_COMMIT_AND_FETCH, URING_REGISTER};
use crate::buffer::ReceiveBuffer;
use crate::channel::Channel;
use crate::interrupt::InterruptTable;
use crate::types::Statfs;

type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// Entries at the start, and how many are added when all are in use.
const DEPTH: usize = 16;
const SQ_LEN: u32 = 64;
/// User data of the poll that those who answer end; entries have their index.
const WAKE: u64 = u64::MAX;

/// Made before the kernel is told that there will be queues: afterwards it waits for them.
pub(crate) struct Queue {
    id: u16,
    ring: Ring,
    entries: Vec<Arc<Entry>>,
    payload_len: usize,
    answers: Arc<Answers>,
    /// Entries that are with us, not with the kernel.
    held: usize,
    /// Of those, the ones that the kernel did not want.
    refused: usize,
    answered: Vec<usize>,
    /// The commit id of each entry's last request; 0: none yet.
    commit_ids: Vec<u64>,
    kicker: Kicker,
}

/// Ends a queue from any thread.
pub(crate) struct Stopper(Arc<Answers>);

impl Stopper {
    pub(crate) fn stop(&self) {
        self.0.end();
    }
}

impl Queue {
    /// A queue for the requests from processor `id`, on the connection of `device`. Payloads are of up to `payload_len`.
    /// `dev` is the mount's device number.
    pub(crate) fn new(
        id: u16,
        device: RawFd,
        dev: (u32, u32),
        payload_len: usize,
        interrupts: Arc<InterruptTable>,
    ) -> io::Result<Queue> {
        let ring: Ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(1024)
            .build(SQ_LEN)?;
        ring.submitter().register_files(&[device])?;
        let answers = Arc::new(Answers::new(interrupts)?);
        let entries = Entry::make(0, DEPTH, payload_len, &answers)?;
        let commit_ids = vec![0; DEPTH];
        let (answered, kicker) = (Vec::new(), Kicker::new(id, dev));
        Ok(Queue { id, ring, entries, payload_len, answers, held: 0, refused: 0, answered, commit_ids, kicker })
    }

    pub(crate) fn stopper(&self) -> Stopper {
        Stopper(self.answers.clone())
    }

    /// Serves the queue on this thread until the connection is gone, [`Stopper::stop`] is called or the kernel refuses
    /// the entries: then everything goes through /dev/fuse. `dispatch` gets each message and its length, in a buffer, and
    /// must see to it that its channel is answered.
    pub(crate) fn serve(
        &mut self,
        buffer: &mut ReceiveBuffer,
        mut dispatch: impl FnMut(Arc<dyn Channel>, &mut ReceiveBuffer, usize),
    ) -> io::Result<()> {
        pin_to(self.id);
        self.ring.submitter().register_enable_rings()?;
        self.poll_answers()?;
        self.register(0)?;
        let mut completions: Vec<cqueue::Entry> = Vec::new();
        loop {
            self.commit()?;
            if self.held == self.entries.len() {
                self.grow()?;
            }
            let wait = usize::from(self.answers.may_wait());
            let submitted = self.ring.submit_and_wait(wait);
            self.answers.waited();
            match submitted {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => return Err(e),
                _ => {}
            }
            if self.answers.ended() {
                return Ok(());
            }
            completions.extend(self.ring.completion());
            for completion in completions.drain(..) {
                let (data, result) = (completion.user_data(), completion.result());
                if data == WAKE {
                    if !cqueue::more(completion.flags()) {
                        self.poll_answers()?;
                    }
                } else if result == 0 {
                    self.receive(data as usize, buffer, &mut dispatch);
                } else if self.failed(data as usize, io::Error::from_raw_os_error(-result))? {
                    return Ok(());
                }
            }
        }
    }

    /// What a command's failure means. Ok(true): no request will come any more.
    fn failed(&mut self, index: usize, e: io::Error) -> io::Result<bool> {
        match e.raw_os_error() {
            Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED | libc::ENODEV) => Ok(true),
            _ if self.commit_ids[index] == 0 => {
                debug!(queue = self.id, index, "not registered: {e}");
                self.held += 1;
                self.refused += 1;
                Ok(self.refused == self.entries.len())
            }
            // An answer was not taken: its caller would wait for ever.
            _ => Err(e),
        }
    }

    /// Hands in what has been answered, for the last time.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.commit()?;
        self.ring.submit().map(drop)
    }

    fn receive(
        &mut self,
        index: usize,
        buffer: &mut ReceiveBuffer,
        dispatch: &mut impl FnMut(Arc<dyn Channel>, &mut ReceiveBuffer, usize),
    ) {
        self.held += 1;
        let entry = &self.entries[index];
        let (commit_id, received) = entry.receive(buffer);
        self.commit_ids[index] = commit_id;
        match received {
            Ok(len) if self.kicker.sent(buffer.message(len)) => {
                let _ = entry.send(commit_id, 0, &[IoSlice::new(&Statfs::default().encode())]);
            }
            Ok(len) => dispatch(entry.clone(), buffer, len),
            Err(e) => {
                warn!(queue = self.id, "{e}");
                let _ = entry.send(commit_id, -libc::EIO, &[]);
            }
        }
    }

    /// More entries, and kicks to get moving what found none.
    fn grow(&mut self) -> io::Result<()> {
        let first = self.entries.len();
        match Entry::make(first, DEPTH, self.payload_len, &self.answers) {
            Ok(more) => self.entries.extend(more),
            // It is tried again when something has been answered.
            Err(e) => {
                warn!(queue = self.id, "{first} requests wait, and there is no memory for more: {e}");
                return Ok(());
            }
        }
        self.commit_ids.resize(self.entries.len(), 0);
        debug!(queue = self.id, entries = self.entries.len(), "grown");
        self.register(first)?;
        // The kicks must find the entries registered.
        self.ring.submit()?;
        self.kicker.kick(DEPTH);
        Ok(())
    }

    /// Gives the kernel the entries from `first` on.
    fn register(&mut self, first: usize) -> io::Result<()> {
        for index in first..self.entries.len() {
            self.command(URING_REGISTER, index)?;
        }
        Ok(())
    }

    /// Hands in what has been answered, and takes more entries if all are in use.
    fn commit(&mut self) -> io::Result<()> {
        let mut answered = std::mem::take(&mut self.answered);
        self.answers.take(&mut answered);
        for index in answered.drain(..) {
            self.command(URING_COMMIT_AND_FETCH, index)?;
            self.held -= 1;
        }
        self.answered = answered;
        Ok(())
    }

    fn command(&mut self, op: u32, index: usize) -> io::Result<()> {
        // flags 8, commit id 8, queue 2
        let mut cmd = [0u8; 80];
        cmd[8..16].copy_from_slice(&self.commit_ids[index].to_ne_bytes());
        cmd[16..18].copy_from_slice(&self.id.to_ne_bytes());
        let iov = self.entries[index].iov();
        let sqe = opcode::UringCmd80::new(types::Fixed(0), op).cmd(cmd).addr(Some(iov as u64)).build();
        self.push(with_len(sqe, 2).user_data(index as u64))
    }

    fn poll_answers(&mut self) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(self.answers.wake_fd()), libc::POLLIN as u32).multi(true).build();
        self.push(squeue::Entry128::from(poll).user_data(WAKE))
    }

    fn push(&mut self, sqe: squeue::Entry128) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to (iovecs, headers, payload) lives as long as `entries`, which only grow and
            // outlive the ring.
            if unsafe { self.ring.submission().push(&sqe) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }
}

/// The builder leaves out this field, which here is the number of iovecs.
fn with_len(mut sqe: squeue::Entry128, len: u32) -> squeue::Entry128 {
    const LEN_AT: usize = 24;
    // SAFETY: the type is the kernel's structure of 128 bytes (io_uring_enter(2)), whose `len` is at this offset.
    unsafe { (&raw mut sqe).cast::<u8>().add(LEN_AT).cast::<u32>().write(len) };
    sqe
}

/// The kernel puts a request into the queue of the processor it comes from. Taken there as well, nothing moves between
/// processors. An offline one has no requests.
pub(super) fn pin_to(cpu: u16) {
    // SAFETY: an all-zero cpu_set_t is valid, and the call reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(usize::from(cpu), &mut set);
        if libc::sched_setaffinity(0, size_of_val(&set), &raw const set) != 0 {
            debug!(cpu, "not pinned: {}", io::Error::last_os_error());
        }
    }
}
