//! The thread that has the connection to the target, and brings it back when it is lost.
//!
//! | link | requests | to |
//! |---|---|---|
//! | connecting | wait in [`Session::connected`] | up; down after [`LOGIN_LIMIT`] |
//! | up | sent, at most [`DEPTH`] at a time | down: closed by the target, or no sign of life |
//! | down | wait; an error after [`GIVE_UP`] | connecting, after a pause |
//!
//! What was sent and not answered when a link goes down has ended as lost. The thread ends when its [`Session`] is dropped.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};

use super::context::{Context, Login, Stage};
use crate::WritePermit;
use crate::scsi::{Command, Reply, Transport};

/// Commands in flight at most.
const DEPTH: usize = 64;
const LOGIN_LIMIT: Duration = Duration::from_secs(5);
/// How long there may be no connection before requests fail instead of waiting.
const GIVE_UP: Duration = Duration::from_secs(30);
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A target that answered nothing for so long, though something is due, is asked for a sign of life ...
const PING_AFTER: Duration = Duration::from_secs(2);
/// ... which must come within this.
const PING_LIMIT: Duration = Duration::from_secs(5);
/// The longest that one command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
const LOGOUT_LIMIT: Duration = Duration::from_secs(1);
/// Redirections in a row.
const REDIRECTIONS: usize = 4;

enum Request {
    Execute { connection: u64, command: Box<Command>, reply: oneshot::Sender<Reply> },
    Reset { connection: u64, reply: oneshot::Sender<Reply> },
}

#[derive(Clone, Debug)]
enum Link {
    Connecting,
    Up(u64),
    /// For too long.
    GivenUp(String),
}

/// The session of one mount.
pub(super) struct Session {
    requests: Mutex<Sender<Request>>,
    wake: Arc<OwnedFd>,
    link: watch::Receiver<Link>,
}

impl Session {
    /// Logs in; an error of the first attempt is returned.
    pub async fn open(login: Login) -> io::Result<Arc<Self>> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, nobody else owns it.
        let wake = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let (requests, received) = channel();
        let (tell, mut link) = watch::channel(Link::Connecting);
        let woken = wake.clone();
        std::thread::Builder::new()
            .name("iscsi".into())
            .spawn(move || Worker::new(login, received, woken, tell).run())?;
        let first = link.wait_for(|l| !matches!(l, Link::Connecting)).await;
        match first.as_deref() {
            Ok(Link::GivenUp(why)) => return Err(io::Error::new(io::ErrorKind::ConnectionRefused, why.clone())),
            Err(_) => return Err(io::Error::other("the thread of the iSCSI session ended")),
            Ok(_) => {}
        }
        drop(first);
        Ok(Arc::new(Self { requests: Mutex::new(requests), wake, link }))
    }

    fn send(&self, request: Request) {
        // A thread that is gone drops the request, and its reply ends as lost.
        let _ = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(request);
        wake(&self.wake);
    }
}

fn wake(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes, as an eventfd wants. It cannot fail but by overflow, which wakes too.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

impl Drop for Session {
    fn drop(&mut self) {
        // The sender must be gone before the thread looks.
        let (gone, _) = channel();
        *self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = gone;
        wake(&self.wake);
    }
}

#[async_trait]
impl Transport for Session {
    async fn connected(&self) -> io::Result<u64> {
        let mut link = self.link.clone();
        let now = link.wait_for(|l| !matches!(l, Link::Connecting)).await;
        match now.as_deref() {
            Ok(Link::Up(connection)) => Ok(*connection),
            Ok(Link::GivenUp(why)) => Err(io::Error::new(io::ErrorKind::NotConnected, why.clone())),
            _ => Err(io::Error::other("the thread of the iSCSI session ended")),
        }
    }

    async fn execute(&self, connection: u64, command: Command) -> Reply {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Execute { connection, command: Box::new(command), reply });
        answer.await.unwrap_or(Reply::Lost { sent: true })
    }

    async fn reset_unit(&self, connection: u64) -> Reply {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Reset { connection, reply });
        answer.await.unwrap_or(Reply::Lost { sent: true })
    }
}

struct Waiting {
    reply: oneshot::Sender<Reply>,
    /// Until when it may be sent; `None`: it changes nothing.
    permit: Option<Arc<dyn WritePermit>>,
    since: Instant,
}

enum State {
    Down { until: Instant },
    LoggingIn { context: Context, until: Instant, redirections: usize },
    Up { context: Context, connection: u64 },
}

struct Worker {
    login: Login,
    requests: Receiver<Request>,
    wake: Arc<OwnedFd>,
    tell: watch::Sender<Link>,
    state: State,
    pause: Duration,
    connections: u64,
    /// Since when there is no connection.
    down_since: Instant,
    /// Why the last one failed.
    why: String,
    waiting: HashMap<u64, Waiting>,
    backlog: VecDeque<(Box<Command>, oneshot::Sender<Reply>)>,
    /// When the target last answered.
    heard: Instant,
    ping: Option<(u64, Instant)>,
}

impl Worker {
    fn new(login: Login, requests: Receiver<Request>, wake: Arc<OwnedFd>, tell: watch::Sender<Link>) -> Self {
        let now = Instant::now();
        Self {
            login,
            requests,
            wake,
            tell,
            state: State::Down { until: now },
            pause: PAUSE.0,
            connections: 0,
            down_since: now,
            why: String::new(),
            waiting: HashMap::new(),
            backlog: VecDeque::new(),
            heard: now,
            ping: None,
        }
    }

    fn run(mut self) {
        while self.take_requests() {
            self.move_link();
            self.submit_backlog();
            let (revents, polled) = self.wait();
            if polled {
                self.serve(revents);
            }
            self.look_for_life();
        }
        self.log_out();
    }

    /// False once the session was dropped.
    fn take_requests(&mut self) -> bool {
        loop {
            match self.requests.try_recv() {
                Ok(Request::Execute { connection, command, reply }) => {
                    if self.is_up(connection) {
                        self.backlog.push_back((command, reply));
                    } else {
                        let _ = reply.send(Reply::Lost { sent: false });
                    }
                }
                Ok(Request::Reset { connection, reply }) => {
                    if let State::Up { context, connection: now } = &mut self.state
                        && *now == connection
                        && let Ok(id) = context.reset_unit()
                    {
                        self.waiting.insert(id, Waiting { reply, permit: None, since: Instant::now() });
                    } else {
                        let _ = reply.send(Reply::Lost { sent: false });
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn is_up(&self, wanted: u64) -> bool {
        matches!(&self.state, State::Up { connection, .. } if *connection == wanted)
    }

    fn submit_backlog(&mut self) {
        let State::Up { context, .. } = &mut self.state else { return };
        while self.waiting.len() < DEPTH {
            let Some((command, reply)) = self.backlog.pop_front() else { return };
            if command.permit.as_ref().is_some_and(|p| !p.valid()) {
                let _ = reply.send(Reply::Refused);
                continue;
            }
            let permit = command.permit.clone();
            if self.waiting.is_empty() {
                self.heard = Instant::now();
            }
            match context.submit(*command) {
                Ok(id) => {
                    self.waiting.insert(id, Waiting { reply, permit, since: Instant::now() });
                }
                Err(why) => {
                    let _ = reply.send(Reply::Lost { sent: false });
                    return self.lose(&why);
                }
            }
        }
    }

    /// Ends the link. Whatever is on the way is lost.
    fn lose(&mut self, why: &str) {
        let now = Instant::now();
        match &self.state {
            State::Up { context, .. } => {
                tracing::warn!("iSCSI connection lost: {why}");
                context.abort();
                self.down_since = now;
                self.tell.send_replace(Link::Connecting);
            }
            State::LoggingIn { context, .. } => context.abort(),
            State::Down { .. } => {}
        }
        self.why = why.to_string();
        // The context goes first: only then the library is through with the buffers.
        self.state = State::Down { until: now + self.pause };
        self.pause = (self.pause * 2).min(PAUSE.1);
        for (_, waiting) in self.waiting.drain() {
            let _ = waiting.reply.send(Reply::Lost { sent: true });
        }
        for (_, reply) in self.backlog.drain(..) {
            let _ = reply.send(Reply::Lost { sent: false });
        }
        self.ping = None;
        // The first attempt is its caller's to judge.
        if self.connections == 0 || self.down_since.elapsed() >= GIVE_UP {
            self.tell.send_replace(Link::GivenUp(self.why.clone()));
        }
    }

    fn connect(&mut self, portal: CString, redirections: usize) {
        match Context::connect(&self.login, &portal) {
            Ok(context) => {
                self.state = State::LoggingIn { context, until: Instant::now() + LOGIN_LIMIT, redirections };
            }
            Err(why) => self.lose(&why),
        }
    }

    fn move_link(&mut self) {
        let now = Instant::now();
        match &mut self.state {
            State::Down { until } if now >= *until => self.connect(self.login.portal.clone(), 0),
            State::LoggingIn { context, until, redirections } => match context.stage() {
                Stage::Busy if now >= *until => self.lose("the target does not answer the login"),
                Stage::Busy => {}
                Stage::Failed(why) => self.lose(&why),
                Stage::Redirected(_) if *redirections >= REDIRECTIONS => self.lose("redirected again and again"),
                Stage::Redirected(portal) => {
                    let redirections = *redirections + 1;
                    self.connect(portal, redirections);
                }
                Stage::In => self.up(),
            },
            State::Down { .. } | State::Up { .. } => {}
        }
    }

    fn up(&mut self) {
        let now = Instant::now();
        let old = std::mem::replace(&mut self.state, State::Down { until: now });
        let State::LoggingIn { context, .. } = old else { return };
        self.connections += 1;
        if self.connections > 1 {
            tracing::warn!("iSCSI connection is back after {:.1} s", self.down_since.elapsed().as_secs_f32());
        }
        self.state = State::Up { context, connection: self.connections };
        self.heard = now;
        self.pause = PAUSE.0;
        self.tell.send_replace(Link::Up(self.connections));
    }

    /// Sleeps until something is to be done; the socket's events, if there are any.
    fn wait(&mut self) -> (i16, bool) {
        let now = Instant::now();
        let (socket, limit) = match &self.state {
            State::Down { until } => (None, until.saturating_duration_since(now)),
            State::LoggingIn { context, until, .. } => (Some(context.poll()), until.saturating_duration_since(now)),
            // Ends of permits and signs of life are looked for this often.
            State::Up { context, .. } => (Some(context.poll()), Duration::from_millis(250)),
        };
        let wake = libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [wake, socket.unwrap_or(libc::pollfd { fd: -1, events: 0, revents: 0 })];
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
        // SAFETY: two entries, as said. An interrupted call reports nothing, as if its time were over.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, limit) };
        if ready <= 0 {
            return (0, socket.is_some());
        }
        if fds[0].revents != 0 {
            let mut count = 0u64;
            // SAFETY: room for the eight bytes. It does not block.
            unsafe { libc::read(fds[0].fd, (&raw mut count).cast(), 8) };
        }
        (fds[1].revents, socket.is_some())
    }

    fn serve(&mut self, revents: i16) {
        let served = match &mut self.state {
            State::Up { context, .. } => {
                // What this process decided to write before it was stopped must not be sent when it wakes up (I12).
                let ended = |w: &Waiting| w.permit.as_ref().is_some_and(|p| !p.valid());
                if context.unsent() && self.waiting.values().any(ended) {
                    return self.lose("the right to write ended before everything was sent");
                }
                context.service(revents)
            }
            // A connection that fails says so by its callback.
            State::LoggingIn { context, .. } if revents != 0 => context.service(revents),
            State::LoggingIn { .. } | State::Down { .. } => Ok(()),
        };
        self.take_finished();
        if let Err(why) = served {
            self.lose(&why);
        }
    }

    fn take_finished(&mut self) {
        let State::Up { context, .. } = &mut self.state else { return };
        let finished = context.take_finished();
        let mut broken = false;
        for (id, reply) in finished {
            self.heard = Instant::now();
            broken |= matches!(reply, Reply::Lost { .. });
            if self.ping.is_some_and(|(ping, _)| ping == id) {
                self.ping = None;
            } else if let Some(waiting) = self.waiting.remove(&id) {
                let _ = waiting.reply.send(reply);
            }
        }
        if broken {
            self.lose("the session broke off");
        }
    }

    /// Finds out that the target is gone without a word.
    fn look_for_life(&mut self) {
        let State::Up { context, .. } = &mut self.state else { return };
        let Some(oldest) = self.waiting.values().map(|w| w.since).min() else { return };
        match self.ping {
            Some((_, since)) if since.elapsed() >= PING_LIMIT => self.lose("the target does not answer"),
            Some(_) => {}
            None if oldest.elapsed() >= COMMAND_LIMIT => self.lose("a command takes too long"),
            None if self.heard.elapsed() >= PING_AFTER => match context.ping() {
                Ok(id) => self.ping = Some((id, Instant::now())),
                Err(why) => self.lose(&why),
            },
            None => {}
        }
    }

    /// With nothing on its way; else, or if the target does not answer, the connection is cut.
    fn log_out(mut self) {
        let idle = self.waiting.is_empty() && self.backlog.is_empty();
        let State::Up { context, .. } = &mut self.state else { return };
        if !idle || context.logout().is_err() {
            return context.abort();
        }
        let end = Instant::now() + LOGOUT_LIMIT;
        while Instant::now() < end {
            let mut socket = context.poll();
            // SAFETY: one entry, as said.
            unsafe { libc::poll(&mut socket, 1, 50) };
            if context.service(socket.revents).is_err() || !context.take_finished().is_empty() {
                return;
            }
        }
        context.abort();
    }
}
