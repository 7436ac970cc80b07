//! A mounted session: reader threads that turn messages into requests for a [`Handler`].
//!
//! | state     | leaves it by                                                          |
//! |-----------|-----------------------------------------------------------------------|
//! | mounted   | [`Session::run`]: INIT is answered                                    |
//! | serving   | unmount (the kernel says ENODEV to every reader), or a handler's panic|
//! | ended     | the handler's `destroy` is called, `run` returns                      |
//!
//! Reader threads only read, parse and call the handler. A request that must wait has to be moved elsewhere with its
//! reply, or the readers run out and with them every other request.

use std::any::Any;
use std::io::{self, IoSlice, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use tracing::{debug, error, warn};

use crate::abi::{self, InHeader, Malformed};
use crate::buffer::{Pool, ReceiveBuffer};
use crate::channel::{Channel, Device};
use crate::init::{InitConfig, InitFlags, InitRequest, Negotiated};
use crate::interrupt::InterruptTable;
use crate::mount::{Mount, MountError, MountSpec, UnmountMode};
use crate::notify::Notifier;
use crate::reply::Reply;
use crate::request::{Dialect, Forget, Message, Op, Request, parse};
use crate::uring::{self, Queue, Stopper};

/// What serves the requests of a session. Called from all reader threads at the same time.
pub trait Handler: Send + Sync {
    /// Chooses what to ask for, given what the kernel offers.
    fn init(&self, offer: &InitRequest) -> InitConfig;

    /// Tells what was agreed on, before the first request.
    fn initialized(&self, negotiated: &Negotiated) {
        let _ = negotiated;
    }

    /// Answers a request, now or later.
    fn request(&self, request: Request, reply: Reply);

    /// The kernel gives up references to nodes. There is no answer.
    fn forget(&self, forgets: Vec<Forget>);

    /// The mount is gone and no request comes any more. What is still unanswered has been interrupted.
    fn destroy(&self) {}
}

/// Why [`Session::run`] ended other than by an unmount.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("the kernel speaks FUSE {major}.{minor}; 7.{} or newer is needed", abi::MINOR_MIN)]
    Version { major: u32, minor: u32 },
    #[error("the kernel's first message is no INIT: {0}")]
    Init(Malformed),
    #[error("reading /dev/fuse: {0}")]
    Device(io::Error),
    #[error("serving an io_uring: {0}")]
    Ring(io::Error),
    #[error("the session has already been run")]
    AlreadyRun,
    #[error("the request handler panicked: {0}")]
    Panicked(String),
}

/// A mount and the device that serves it. Dropping it unmounts (detached).
pub struct Session {
    mount: Mount,
    device: Arc<Device>,
    negotiated: Arc<OnceLock<Negotiated>>,
    started: OnceLock<()>,
}

impl Session {
    /// Mounts. Nothing is answered until [`Session::run`]: whoever touches the mount waits until then.
    pub fn mount(spec: &MountSpec) -> Result<Session, MountError> {
        let (mount, file) = Mount::new(spec)?;
        let device = Arc::new(Device::new(file, Arc::new(InterruptTable::default())));
        Ok(Session { mount, device, negotiated: Arc::default(), started: OnceLock::new() })
    }

    /// The way to send notifications. They fail with ENOTCONN or EPERM before INIT.
    pub fn notifier(&self) -> Notifier {
        Notifier::new(self.device.clone(), self.negotiated.clone())
    }

    /// What was agreed on at INIT.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.negotiated.get().copied()
    }

    /// The connection's number under /sys/fs/fuse/connections.
    pub fn connection(&self) -> Option<u32> {
        self.mount.connection()
    }

    /// Whether the mount is still in place.
    pub fn is_mounted(&self) -> bool {
        self.mount.is_mounted()
    }

    /// Unmounts; Ok if that has already happened. Ends [`Session::run`] on another thread once nothing is open.
    /// Must not be called on a reader thread: the kernel may wait for an answer meanwhile.
    pub fn unmount(&self, mode: UnmountMode) -> io::Result<()> {
        unmount(&self.mount, &self.device, mode)
    }

    /// Serves the mount with `threads` reader threads, this one included, until it is unmounted. Can be called once.
    pub fn run(&self, handler: Arc<dyn Handler>, threads: usize) -> Result<(), RunError> {
        self.started.set(()).map_err(|()| RunError::AlreadyRun)?;
        let result = match self.initialize(&*handler) {
            Ok(Some((negotiated, queues))) => self.serve(&*handler, &negotiated, queues, threads.max(1)),
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        if result.is_err() {
            // Nobody reads requests any more: let those who wait for an answer go.
            if let Err(e) = self.unmount(UnmountMode::Force) {
                warn!("unmounting after a failure: {e}");
            }
        }
        self.device.interrupts().interrupt_all();
        handler.destroy();
        result
    }

    /// Answers INIT. None: unmounted before it came.
    fn initialize(&self, handler: &dyn Handler) -> Result<Option<(Negotiated, Vec<Queue>)>, RunError> {
        let mut buffer = Pool::new(0, 0).take();
        let Some(len) = receive(&self.device, &mut buffer).map_err(RunError::Device)? else { return Ok(None) };
        let message = buffer.message(len);
        let header = InHeader::decode(message).map_err(RunError::Init)?;
        if header.opcode != abi::INIT {
            return Err(RunError::Init(Malformed("another opcode")));
        }
        let offer = InitRequest::decode(&message[abi::IN_HEADER_LEN..]).map_err(RunError::Init)?;
        let want = handler.init(&offer);
        let Some(mut negotiated) = Negotiated::new(&offer, &want, page_size()) else {
            let _ = self.device.send(header.unique, -libc::EPROTO, &[]);
            return Err(RunError::Version { major: offer.major, minor: offer.minor });
        };
        if want.max_readahead > offer.max_readahead {
            match self.mount.set_read_ahead(want.max_readahead) {
                Ok(()) => negotiated.max_readahead = want.max_readahead,
                Err(e) => debug!("read-ahead stays at {} bytes: {e}", offer.max_readahead),
            }
        }
        let queues = self.queues(&mut negotiated);
        // Before the answer, which lets the first request and so the first notification through.
        let _ = self.negotiated.set(negotiated);
        handler.initialized(&negotiated);
        debug!(?offer, ?negotiated, "initialized");
        match self.device.send(header.unique, 0, &[IoSlice::new(&negotiated.encode())]) {
            Ok(()) => Ok(Some((negotiated, queues))),
            Err(e) if gone(&e) || e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(RunError::Device(e)),
        }
    }

    /// The io_uring queues, if agreed on and possible; without them everything goes through /dev/fuse.
    fn queues(&self, negotiated: &mut Negotiated) -> Vec<Queue> {
        if !negotiated.flags.contains(InitFlags::OVER_IO_URING) {
            return Vec::new();
        }
        let dev = self.mount.dev().ok_or_else(|| io::Error::other("the mount's device number is not known"));
        let queues = dev.and_then(|dev| uring::queues(&self.device, dev, negotiated, page_size()));
        queues.unwrap_or_else(|e| {
            debug!("no io_uring: {e}");
            negotiated.flags = negotiated.flags.without(InitFlags::OVER_IO_URING);
            Vec::new()
        })
    }

    fn serve(
        &self,
        handler: &dyn Handler,
        negotiated: &Negotiated,
        mut queues: Vec<Queue>,
        threads: usize,
    ) -> Result<(), RunError> {
        let devices: Vec<Arc<Device>> = (0..threads).map(|n| self.reader_device(n)).collect();
        let stoppers: Vec<Stopper> = queues.iter().map(Queue::stopper).collect();
        let readers = Readers {
            handler,
            devices: &devices,
            pool: Pool::new(negotiated.max_write, threads * 2 + 4),
            dialect: Dialect { setxattr_ext: negotiated.flags.contains(InitFlags::SETXATTR_EXT) },
            mount: &self.mount,
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .map(|n| {
                    let readers = &readers;
                    std::thread::Builder::new()
                        .name(format!("fuse-{n}"))
                        .spawn_scoped(scope, move || readers.run(&readers.devices[n]))
                })
                .collect();
            let rings: Vec<_> = queues
                .iter_mut()
                .enumerate()
                .map(|(n, queue)| {
                    let readers = &readers;
                    std::thread::Builder::new()
                        .name(format!("fuse-ring-{n}"))
                        .spawn_scoped(scope, move || readers.run_queue(queue))
                })
                .collect();
            let mut result = readers.run(&devices[0]);
            stoppers.iter().for_each(Stopper::stop);
            for other in others.into_iter().chain(rings) {
                let ended = match other {
                    Ok(thread) => thread.join().unwrap_or_else(|panic| Err(RunError::Panicked(panic_text(&*panic)))),
                    Err(e) => {
                        // Fewer readers serve as well, only more slowly.
                        warn!("cannot start a reader thread: {e}");
                        Ok(())
                    }
                };
                result = result.and(ended);
            }
            result
        })
    }

    /// The n-th reader's descriptor: its own queue if the kernel allows, else the first one's.
    fn reader_device(&self, n: usize) -> Arc<Device> {
        if n == 0 {
            return self.device.clone();
        }
        match self.device.try_clone() {
            Ok(device) => Arc::new(device),
            Err(e) => {
                debug!("reader {n} shares the first descriptor: {e}");
                self.device.clone()
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = self.mount.unmount(UnmountMode::Detach) {
            warn!("unmounting: {e}");
        }
    }
}

fn unmount(mount: &Mount, device: &Device, mode: UnmountMode) -> io::Result<()> {
    if mode == UnmountMode::Force && device.is_connected() {
        mount.abort();
    }
    mount.unmount(mode)
}

/// What all reader threads share.
struct Readers<'a> {
    handler: &'a dyn Handler,
    devices: &'a [Arc<Device>],
    pool: Arc<Pool>,
    dialect: Dialect,
    mount: &'a Mount,
}

impl Readers<'_> {
    /// Reads and dispatches until the kernel says that the mount is gone.
    fn run(&self, device: &Arc<Device>) -> Result<(), RunError> {
        let channel: Arc<dyn Channel> = device.clone();
        let mut buffer = self.pool.take();
        let result = loop {
            let len = match receive(device, &mut buffer) {
                Ok(Some(len)) => len,
                Ok(None) => break Ok(()),
                Err(e) => break Err(RunError::Device(e)),
            };
            // A panic is a broken promise inside the filesystem: going on could damage data. The reply has answered EIO
            // by being dropped; the session ends, and its owner learns why.
            let dispatched = catch_unwind(AssertUnwindSafe(|| self.dispatch(&channel, &mut buffer, len)));
            if let Err(panic) = dispatched {
                break Err(RunError::Panicked(panic_text(&*panic)));
            }
        };
        self.end(result)
    }

    fn run_queue(&self, queue: &mut Queue) -> Result<(), RunError> {
        let mut buffer = self.pool.take();
        let served = catch_unwind(AssertUnwindSafe(|| {
            queue.serve(&mut buffer, |channel, buffer, len| self.dispatch(&channel, buffer, len))
        }));
        self.end(match served {
            Ok(served) => served.map_err(RunError::Ring),
            Err(panic) => {
                // The reply has answered EIO by being dropped, and its caller is to learn that.
                if let Err(e) = queue.finish() {
                    debug!("handing in the last answers: {e}");
                }
                Err(RunError::Panicked(panic_text(&*panic)))
            }
        })
    }

    /// If it failed, the connection ends: the other threads wait for requests until it is gone.
    fn end(&self, result: Result<(), RunError>) -> Result<(), RunError> {
        if let Err(e) = &result {
            error!("session ends: {e}");
            if let Err(e) = unmount(self.mount, &self.devices[0], UnmountMode::Force) {
                warn!("unmounting after a failure: {e}");
            }
        }
        result
    }

    fn dispatch(&self, channel: &Arc<dyn Channel>, buffer: &mut ReceiveBuffer, len: usize) {
        let header = match InHeader::decode(buffer.message(len)) {
            Ok(header) => header,
            Err(e) => return warn!(len, "{e}"),
        };
        let refuse = |errno: i32| {
            if let Err(e) = channel.send(header.unique, -errno, &[]) {
                debug!(opcode = header.opcode, "cannot refuse a request: {e}");
            }
        };
        match parse(&header, buffer.message(len), self.dialect) {
            Ok(Message::Request(mut request, payload)) => {
                if let (Op::Write { data, .. }, Some(range)) = (&mut request.op, payload) {
                    *data = buffer.take_payload(range);
                }
                channel.interrupts().register(header.unique, channel.may_miss_signals().then_some(header.pid));
                let reply = Reply::new(header.unique, header.opcode, channel.clone());
                self.handler.request(request, reply);
            }
            Ok(Message::Forget(forgets)) => self.handler.forget(forgets),
            Ok(Message::Interrupt { target }) => {
                let interrupts = channel.interrupts();
                if !interrupts.interrupt(target) && !self.retry_interrupt(header.unique) {
                    interrupts.interrupt_now_or_later(target);
                }
            }
            Ok(Message::Destroy) => {
                let _ = channel.send(header.unique, 0, &[]);
            }
            Ok(Message::Ignored) => debug!(opcode = header.opcode, "message ignored"),
            Ok(Message::Unknown) => refuse(libc::ENOSYS),
            Err(e) => {
                warn!(opcode = header.opcode, unique = header.unique, "{e}");
                refuse(libc::EIO);
            }
        }
    }

    /// Asks the kernel to send the interrupt again. It looks for the interrupted request only among those read from
    /// the descriptor that we write to, and any reader may have got the interrupt, so try them in turn. If none knows
    /// it (ENOENT), the request has been answered, or comes through io_uring: false.
    fn retry_interrupt(&self, unique: u64) -> bool {
        self.devices.iter().any(|device| device.send(unique, -libc::EAGAIN, &[]).is_ok())
    }
}

/// Reads one message. None: the mount is gone.
fn receive(device: &Device, buffer: &mut ReceiveBuffer) -> io::Result<Option<usize>> {
    loop {
        match device.file().read(buffer.space()) {
            Ok(len) => return Ok(Some(len)),
            Err(e) if gone(&e) => return Ok(None),
            // A signal; a request that was withdrawn before we got it; nothing there after all.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Unmounted (ENODEV) or aborted (ECONNABORTED).
fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

fn page_size() -> u32 {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(size).ok().filter(|s| s.is_power_of_two()).unwrap_or(4096)
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
