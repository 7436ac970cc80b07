//! One login to one target: a safe face for a context of libiscsi. Stays in the thread that made it.
//!
//! Buffers go to the library by address. Each command's are kept in an [`Entry`] until its callback has run or the context is
//! destroyed, after which the library knows nothing of them.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::rc::Rc;

use super::library::{IoVec, Iscsi, Library, RawSense, Task, library, status};
use crate::scsi::cdb::Sense;
use crate::scsi::{Command, Reply, Transfer};

/// Whom to log in to, and as whom.
#[derive(Clone)]
pub(super) struct Login {
    pub portal: CString,
    pub target: CString,
    pub initiator: CString,
    pub lun: u16,
    /// 24 and 16 bits that make the initiator port of this mount its own.
    pub isid: (u32, u16),
    pub chap: Option<(CString, CString)>,
    /// What the target has to answer with.
    pub mutual: Option<(CString, CString)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connecting,
    Connected,
    LoggingIn,
    In,
    /// To another portal.
    Redirected,
    Failed,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Busy,
    In,
    Redirected(CString),
    Failed(String),
}

/// A command that the library knows of.
struct Entry {
    id: u64,
    /// Null for task management and pings.
    task: *mut Task,
    /// What the vectors point into.
    data: Transfer,
    _vectors: Vec<IoVec>,
    status: Cell<Option<c_int>>,
    response: Cell<u32>,
    finished: Rc<RefCell<Vec<u64>>>,
}

pub(super) struct Context {
    lib: &'static Library,
    raw: *mut Iscsi,
    lun: u16,
    /// From a box; callbacks write to it.
    step: *mut Cell<Step>,
    /// From boxes; callbacks look at them.
    entries: HashMap<u64, *mut Entry>,
    finished: Rc<RefCell<Vec<u64>>>,
    next: u64,
}

/// Called by the library within [`Context::service`] and when a context is destroyed.
unsafe extern "C" fn logged(_: *mut Iscsi, status: c_int, _: *mut c_void, step: *mut c_void) {
    // SAFETY: the pointer that `connect` gave, which lives until after the context is destroyed.
    let step = unsafe { &*step.cast::<Cell<Step>>() };
    step.set(match (step.get(), status) {
        (Step::Connecting, status::GOOD) => Step::Connected,
        (Step::LoggingIn, status::GOOD) => Step::In,
        (Step::LoggingIn, status::REDIRECT) => Step::Redirected,
        (Step::In, _) => Step::In,
        _ => Step::Failed,
    });
}

/// As [`logged`].
unsafe extern "C" fn ended(_: *mut Iscsi, status: c_int, data: *mut c_void, entry: *mut c_void) {
    // SAFETY: the pointer that was given with the command; entries live until their callback has run or the context is gone.
    let entry = unsafe { &*entry.cast::<Entry>() };
    if entry.task.is_null() && status == status::GOOD && !data.is_null() {
        // SAFETY: task management answers with a pointer to its response code. Pings answer with more, which starts with
        // something else that nobody looks at.
        entry.response.set(unsafe { *data.cast::<u32>() });
    }
    if entry.status.replace(Some(status)).is_none() {
        entry.finished.borrow_mut().push(entry.id);
    }
}

impl Context {
    /// Begins to connect.
    pub fn connect(login: &Login, portal: &CStr) -> Result<Self, String> {
        let lib = library()?;
        // SAFETY: a valid string, copied.
        let raw = unsafe { (lib.iscsi_create_context)(login.initiator.as_ptr()) };
        if raw.is_null() {
            return Err("no memory for an iSCSI session".into());
        }
        let context = Self {
            lib,
            raw,
            lun: login.lun,
            step: Box::into_raw(Box::new(Cell::new(Step::Connecting))),
            entries: HashMap::new(),
            finished: Rc::default(),
            next: 0,
        };
        const NORMAL: c_int = 2;
        const DIGEST_NONE_OR_CRC32C: c_int = 1;
        // SAFETY: a live context, and strings that are valid through the calls, which copy them.
        let begun = unsafe {
            (lib.iscsi_set_session_type)(raw, NORMAL);
            (lib.iscsi_set_targetname)(raw, login.target.as_ptr());
            (lib.iscsi_set_header_digest)(raw, DIGEST_NONE_OR_CRC32C);
            (lib.iscsi_set_isid_random)(raw, login.isid.0, login.isid.1.into());
            if let Some((user, secret)) = &login.chap {
                (lib.iscsi_set_initiator_username_pwd)(raw, user.as_ptr(), secret.as_ptr());
            }
            if let Some((user, secret)) = &login.mutual {
                (lib.iscsi_set_target_username_pwd)(raw, user.as_ptr(), secret.as_ptr());
            }
            (lib.iscsi_set_noautoreconnect)(raw, 1);
            (lib.iscsi_set_timeout)(raw, 0);
            (lib.iscsi_connect_async)(raw, portal.as_ptr(), logged, context.step.cast())
        };
        if begun == 0 { Ok(context) } else { Err(context.error()) }
    }

    fn step(&self) -> Step {
        // SAFETY: from a box that is freed when the context is dropped.
        unsafe { (*self.step).get() }
    }

    fn set_step(&self, step: Step) {
        // SAFETY: as above.
        unsafe { (*self.step).set(step) }
    }

    fn error(&self) -> String {
        // SAFETY: a live context; the string lives in it.
        let text = unsafe { CStr::from_ptr((self.lib.iscsi_get_error)(self.raw)) };
        let text = text.to_string_lossy().into_owned();
        if text.is_empty() { "the connection failed".into() } else { text }
    }

    /// How far the login has come; moves it on.
    pub fn stage(&mut self) -> Stage {
        match self.step() {
            Step::Connected => {
                self.set_step(Step::LoggingIn);
                // SAFETY: a live context, and a pointer that outlives it.
                match unsafe { (self.lib.iscsi_login_async)(self.raw, logged, self.step.cast()) } {
                    0 => Stage::Busy,
                    _ => Stage::Failed(self.error()),
                }
            }
            Step::Connecting | Step::LoggingIn => Stage::Busy,
            Step::In => Stage::In,
            Step::Redirected => {
                // SAFETY: a live context; the string lives in it.
                Stage::Redirected(unsafe { CStr::from_ptr((self.lib.iscsi_get_target_address)(self.raw)) }.to_owned())
            }
            Step::Failed => Stage::Failed(self.error()),
        }
    }

    /// The socket, and the events of poll(2) to wait for.
    pub fn poll(&self) -> libc::pollfd {
        // SAFETY: a live context.
        let (fd, events) = unsafe { ((self.lib.iscsi_get_fd)(self.raw), (self.lib.iscsi_which_events)(self.raw)) };
        libc::pollfd { fd, events: events as i16 | libc::POLLRDHUP, revents: 0 }
    }

    /// Sends and receives what is possible now. An error: the connection is lost.
    pub fn service(&mut self, revents: i16) -> Result<(), String> {
        let gone = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
        if revents & libc::POLLIN == 0 && revents & (gone | libc::POLLRDHUP) != 0 && self.step() == Step::In {
            return Err("the target closed the connection".into());
        }
        // SAFETY: a live context. Callbacks touch the step and the entries through the pointers that they were given, and no
        // reference to either exists here.
        let served = unsafe { (self.lib.iscsi_service)(self.raw, revents.into()) };
        if served != 0 {
            return Err(self.error());
        }
        if revents & libc::POLLRDHUP != 0 && self.step() == Step::In {
            return Err("the target closed the connection".into());
        }
        Ok(())
    }

    fn entry(&mut self, task: *mut Task, data: Transfer, vectors: Vec<IoVec>) -> *mut Entry {
        self.next += 1;
        let entry = Box::into_raw(Box::new(Entry {
            id: self.next,
            task,
            data,
            _vectors: vectors,
            status: Cell::new(None),
            response: Cell::new(0),
            finished: self.finished.clone(),
        }));
        self.entries.insert(self.next, entry);
        entry
    }

    /// Queues a command; what it is called from now on. An error: nothing was queued.
    pub fn submit(&mut self, command: Command) -> Result<u64, String> {
        const NONE: c_int = 0;
        const READ: c_int = 1;
        const WRITE: c_int = 2;
        let Command { mut cdb, mut data, .. } = command;
        let len = c_int::try_from(data.len()).map_err(|_| "a transfer of more than 2 GiB".to_string())?;
        let (direction, vectors): (_, Vec<IoVec>) = match &mut data {
            Transfer::None => (NONE, Vec::new()),
            Transfer::In(bufs) => {
                (READ, bufs.iter_mut().map(|b| IoVec { base: b.as_mut_ptr().cast(), len: b.len() }).collect())
            }
            // The library only reads them.
            Transfer::Out(pieces) => {
                let vector = |b: &[u8]| IoVec { base: b.as_ptr().cast_mut().cast(), len: b.len() };
                (WRITE, pieces.iter().map(|p| vector(p.bytes())).collect())
            }
        };
        // SAFETY: copies `cdb.len` of the 16 bytes.
        let task = unsafe { (self.lib.scsi_create_task)(cdb.len.into(), cdb.bytes.as_mut_ptr(), direction, len) };
        if task.is_null() {
            return Err("no memory for a command".into());
        }
        let entry = self.entry(task, data, vectors);
        // SAFETY: the entry was just made. The vectors and what they point to stay where they are until it is dropped, after
        // the callback or the end of the context.
        let queued = unsafe {
            let vectors = &mut (*entry)._vectors;
            if !vectors.is_empty() {
                let set =
                    if direction == READ { self.lib.scsi_task_set_iov_in } else { self.lib.scsi_task_set_iov_out };
                set(task, vectors.as_mut_ptr(), vectors.len() as c_int);
            }
            let null = std::ptr::null_mut();
            (self.lib.iscsi_scsi_command_async)(self.raw, self.lun.into(), task, ended, null, entry.cast())
        };
        self.queued(queued)
    }

    /// The latest entry, if it was queued.
    fn queued(&mut self, result: c_int) -> Result<u64, String> {
        if result == 0 {
            return Ok(self.next);
        }
        let error = self.error();
        self.free(self.next);
        Err(error)
    }

    /// LOGICAL UNIT RESET.
    pub fn reset_unit(&mut self) -> Result<u64, String> {
        let entry = self.entry(std::ptr::null_mut(), Transfer::None, Vec::new());
        let lun = self.lun.into();
        // SAFETY: a live context, and an entry that stays until its callback has run.
        let queued = unsafe { (self.lib.iscsi_task_mgmt_lun_reset_async)(self.raw, lun, ended, entry.cast()) };
        self.queued(queued)
    }

    /// NOP-Out: answered by every target that is there.
    pub fn ping(&mut self) -> Result<u64, String> {
        let entry = self.entry(std::ptr::null_mut(), Transfer::None, Vec::new());
        // SAFETY: as above; no data goes along.
        let queued =
            unsafe { (self.lib.iscsi_nop_out_async)(self.raw, Some(ended), std::ptr::null_mut(), 0, entry.cast()) };
        self.queued(queued)
    }

    /// Whether something queued has not been given to the kernel yet.
    pub fn unsent(&self) -> bool {
        // SAFETY: a live context.
        unsafe { (self.lib.iscsi_out_queue_length)(self.raw) > 0 }
    }

    /// Commands that ended since the last call, and how.
    pub fn take_finished(&mut self) -> Vec<(u64, Reply)> {
        let ids = std::mem::take(&mut *self.finished.borrow_mut());
        ids.into_iter().filter_map(|id| Some((id, self.free(id)?))).collect()
    }

    /// Frees an entry that the library is through with.
    fn free(&mut self, id: u64) -> Option<Reply> {
        let entry = self.entries.remove(&id)?;
        // SAFETY: from a box, and out of the table just now.
        let entry = unsafe { Box::from_raw(entry) };
        let reply = match (entry.status.get(), entry.task.is_null()) {
            (Some(status::GOOD), true) if entry.response.get() == 0 => Reply::Good { bufs: Vec::new(), received: 0 },
            (Some(status::GOOD), true) => Reply::Check(Sense { key: 5, code: 0x2000 }),
            (Some(ended), false) => self.reply(ended, entry.task, entry.data),
            _ => Reply::Lost { sent: true },
        };
        if !entry.task.is_null() {
            // SAFETY: its callback has run, or it was never queued, or the context is gone: nobody else has it.
            unsafe { (self.lib.scsi_free_scsi_task)(entry.task) };
        }
        Some(reply)
    }

    fn reply(&self, ended: c_int, task: *mut Task, data: Transfer) -> Reply {
        match ended {
            status::GOOD => {
                // SAFETY: the task is alive until the caller frees it.
                let (expected, kind, residual) =
                    unsafe { ((*task).expected, (*task).residual_status, (*task).residual) };
                let expected = usize::try_from(expected).unwrap_or(0);
                let received = if kind == 1 { expected.saturating_sub(residual) } else { expected };
                Reply::Good { bufs: if let Transfer::In(bufs) = data { bufs } else { Vec::new() }, received }
            }
            status::CHECK_CONDITION => {
                let mut sense = RawSense::default();
                // SAFETY: as above; the structure is at least as large as the library's.
                unsafe { (self.lib.scsi_task_get_status)(task, &mut sense) };
                Reply::Check(Sense { key: (sense.key & 0xf) as u8, code: (sense.ascq & 0xffff) as u16 })
            }
            status::RESERVATION_CONFLICT => Reply::Conflict,
            status::BUSY | status::TASK_SET_FULL => Reply::Busy,
            _ => Reply::Lost { sent: true },
        }
    }

    /// Asks the target to end the session.
    pub fn logout(&mut self) -> Result<u64, String> {
        let entry = self.entry(std::ptr::null_mut(), Transfer::None, Vec::new());
        // SAFETY: a live context, and an entry that stays until its callback has run.
        let queued = unsafe { (self.lib.iscsi_logout_async)(self.raw, ended, entry.cast()) };
        self.queued(queued)
    }

    /// Makes closing throw away what the kernel has not sent yet: it would arrive later, when nobody answers for it.
    pub fn abort(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let len = size_of::<libc::linger>() as libc::socklen_t;
        // SAFETY: the option is as long as said; a socket that is gone makes it fail, which is as good.
        unsafe {
            let fd = (self.lib.iscsi_get_fd)(self.raw);
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
        };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: alive until now. This runs the callbacks of everything queued.
        unsafe { (self.lib.iscsi_destroy_context)(self.raw) };
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            self.free(id);
        }
        // SAFETY: from a box; nobody has the pointer any more.
        drop(unsafe { Box::from_raw(self.step) });
    }
}
