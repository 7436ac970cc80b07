//! All hosts of a run: nodes that live, die and come back, and how clients call them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed};

use blockdev::FencingKind;
use blockdev::sim::{NodeMode, SimDisk};
use cluster::simnet::{NetRates, SimNet, SimPort};
use cluster::{ClusterError, HintNet, SlotBlock, SlotState};
use fs_core::{Atime, FsError, MountConfig, MountError, NoKernelCache, Volume};
use parking_lot::Mutex;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use super::Totals;
use super::host::SimClock;
pub use super::host::{Ack, Host, Outcome, Promise, Seat, Stop};
use super::setup::Setup;
use super::trace::Trace;
use super::witness::Witness;

pub struct World {
    pub setup: Setup,
    pub disk: Arc<SimDisk>,
    net: Option<Arc<SimNet>>,
    pub trace: Trace,
    pub totals: Mutex<Totals>,
    hosts: Mutex<Vec<Option<Arc<Host>>>>,
    /// Lapsed memberships that linger while their hosts may be nodes again.
    lingering: Mutex<Vec<Arc<Host>>>,
    lives: Mutex<Vec<u32>>,
    /// Hosts came or went.
    pub changed: Notify,
    failure: Mutex<Option<String>>,
    pub failed: Notify,
    /// Clients finish what they do and go.
    pub over: AtomicBool,
    acks: AtomicU64,
    accidents: Mutex<VecDeque<Instant>>,
    /// The device fails commands, and how often it began to.
    failing: AtomicBool,
    /// The device loses metadata: errors may say that something is damaged.
    pub lying: AtomicBool,
    failures: AtomicU64,
    /// What the hosts' wall clocks showed when they mounted.
    clocks: Vec<Arc<AtomicI64>>,
}

impl World {
    pub fn new(setup: Setup, verbose: bool) -> Arc<Self> {
        let net = setup.hints.then(|| {
            let net = SimNet::new(setup.seed);
            net.set_rates(NetRates { loss: setup.loss, ..NetRates::default() });
            net
        });
        let disk = setup.disk();
        disk.set_audit(Arc::new(Witness::new(setup.layout(), setup.places(), setup.timeouts().lease())));
        Arc::new(Self {
            clocks: (0..setup.hosts).map(|_| Arc::new(AtomicI64::new(1_000_000))).collect(),
            disk,
            net,
            trace: Trace::new(verbose),
            totals: Mutex::default(),
            hosts: Mutex::new(vec![None; setup.hosts]),
            lingering: Mutex::default(),
            lives: Mutex::new(vec![0; setup.hosts]),
            changed: Notify::new(),
            failure: Mutex::new(None),
            failed: Notify::new(),
            over: AtomicBool::new(false),
            acks: AtomicU64::new(0),
            accidents: Mutex::default(),
            failing: AtomicBool::new(false),
            lying: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            setup,
        })
    }

    pub fn note(&self, text: impl std::fmt::Display) {
        self.trace.note(text);
    }

    /// The run is over: something happened that must not.
    pub fn fail(&self, what: String) -> Stop {
        self.note(format_args!("FAILED {what}"));
        self.failure.lock().get_or_insert(what);
        self.failed.notify_waiters();
        self.changed.notify_waiters();
        Stop::Failed
    }

    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    pub fn over(&self) -> bool {
        self.over.load(Relaxed) || self.failure.lock().is_some()
    }

    /// The number of a change that has just been acknowledged.
    pub fn ack(&self) -> Ack {
        self.acks.fetch_add(1, Relaxed) + 1
    }

    /// The latest change of all.
    pub fn latest(&self) -> Ack {
        self.acks.load(Relaxed)
    }

    pub fn live(&self) -> Vec<Arc<Host>> {
        self.hosts.lock().iter().flatten().filter(|h| !h.dead()).cloned().collect()
    }

    /// Whether a node that everybody has given up has not been killed yet.
    pub fn lost(&self) -> bool {
        let lingers = self.lingering.lock().iter().any(|h| h.dev.mode() != NodeMode::Crashed);
        lingers || self.hosts.lock().iter().flatten().any(|h| h.dead())
    }

    pub fn is_up(&self, index: usize) -> bool {
        self.hosts.lock()[index].is_some()
    }

    /// Someone lost a node, or time: what waits may wait longer.
    pub fn accident(&self) {
        self.accidents.lock().push_back(Instant::now());
    }

    /// Whatever waits may wait this much longer.
    pub fn slow_for(&self, time: Duration) {
        self.accidents.lock().push_back(Instant::now() + time);
    }

    /// Commands begin or cease to fail.
    pub fn errors(&self, matter: bool, begin: bool) {
        if !matter {
            return;
        }
        self.failing.store(begin, Relaxed);
        if begin {
            self.failures.fetch_add(1, Relaxed);
            self.live().iter().for_each(|h| h.faulty.store(true, Relaxed));
        }
    }

    pub fn lying(&self) -> bool {
        self.lying.load(Relaxed)
    }

    /// Whether an error tells of what a lying device has damaged. It fails an operation, and only where it keeps a lock from being given
    /// up the node.
    fn is_damage(&self, host: &Host, what: &str, e: &FsError) -> bool {
        let failed = host.volume.has_failed();
        if !self.lying() || !(failed || damage(e)) {
            return false;
        }
        self.note(format_args!("{} {what}: {e}", host.name()));
        self.totals.lock().damaged += 1;
        if failed {
            host.dev.crash();
        }
        true
    }

    /// Whether an error of a host comes from commands that failed. The host is of no more use, and is killed.
    pub fn excused(&self, host: &Host, what: &str, e: &FsError) -> bool {
        if self.is_damage(host, what, e) {
            return true;
        }
        let fitting = matches!(e, FsError::Device(_) | FsError::Journal(_) | FsError::Cluster(_));
        let excused = fitting && host.faulty.load(Relaxed);
        if excused {
            self.note(format_args!("{} {what}: {e}", host.name()));
            host.dev.crash();
        }
        excused
    }

    pub fn jump_clock(&self, rng: &mut StdRng) {
        let host = rng.random_range(0..self.clocks.len());
        let to = rng.random_range(0..4_000_000_000);
        self.note(format_args!("the clock of h{host} is set to {to}"));
        self.clocks[host].store(to, Relaxed);
    }

    /// Hints are lost, late, doubled and forged from here on.
    pub fn upset_network(&self, rng: &mut StdRng) {
        let Some(net) = &self.net else { return };
        let longest = Duration::from_millis([1, 100, 3000][rng.random_range(0..3)]);
        let rates = NetRates {
            loss: [0.0, 0.3, 1.0][rng.random_range(0..3)],
            duplicate: [0.0, 0.5][rng.random_range(0..2)],
            delay: (Duration::from_micros(100), longest),
            forged: [0.0, 0.5][rng.random_range(0..2)],
        };
        self.note(format_args!("the network: {rates:?}"));
        net.set_rates(rates);
        for host in self.live() {
            if let Some(port) = &host.port {
                port.cut(rng.random_bool(0.3));
            }
        }
    }

    /// The network works again for all that live.
    pub fn calm_network(&self) {
        let Some(net) = &self.net else { return };
        net.set_rates(NetRates { loss: self.setup.loss, ..NetRates::default() });
        for host in self.live() {
            if let Some(port) = &host.port {
                port.cut(false);
            }
        }
    }

    fn last_accident(&self) -> Option<Instant> {
        self.accidents.lock().iter().max().copied()
    }

    fn heartbeats_on_their_way(&self) -> bool {
        let late = self.setup.late_write_delay + Duration::from_secs(2);
        self.setup.fencing != FencingKind::ProcessLock && self.last_accident().is_some_and(|a| a.elapsed() < late)
    }

    // ---- lives -------------------------------------------------------------------------------------------------

    /// Mounts the volume on a host that is down. `None`: it died before it was mounted.
    pub async fn start(self: &Arc<Self>, index: usize, crash_at: Option<u64>) -> Outcome<Option<Arc<Host>>> {
        let life = {
            let mut lives = self.lives.lock();
            lives[index] += 1;
            lives[index]
        };
        let name = format!("h{index}.{life}");
        let dev = self.disk.open(&name);
        let port = self.net.as_ref().map(|n| n.open());
        self.note(format_args!("{name} mounts"));
        let mounting = || {
            Volume::mount(MountConfig {
                device: dev.clone(),
                net: port.clone().map(|p| p as Arc<dyn HintNet>),
                clock: Arc::new(SimClock { started: Instant::now(), offset: self.clocks[index].clone() }),
                kernel: Arc::new(NoKernelCache),
                host_name: name.clone(),
                seed: self.setup.seed.wrapping_mul(1000).wrapping_add(index as u64 * 100 + u64::from(life)),
                read_only: false,
                atime: if self.setup.seed.is_multiple_of(2) { Atime::Never } else { Atime::Relative },
                cache_bytes: self.setup.cache_bytes,
                dirty_bytes: self.setup.dirty_bytes,
            })
        };
        if let Some(n) = crash_at {
            dev.crash_at(n);
        }
        // A mount may have to wait for the death of the node whose slot it takes, and then, as every operation may, for
        // those that hold what it reads.
        let patience = 2 * self.setup.patience();
        let failures = self.failures.load(Relaxed);
        let mounted = loop {
            match self.bounded(dev.crashed(), &format!("{name} mount"), patience, mounting()).await {
                Err(Stop::Down) => {
                    self.note(format_args!("{name} died while it mounted"));
                    self.died(port.as_deref());
                    return Ok(None);
                }
                // A heartbeat on its way from a node that died looks like life: whoever mounts must try again.
                Ok(Err(MountError::Fs(FsError::Cluster(ClusterError::Full { .. }))))
                    if self.heartbeats_on_their_way() =>
                {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                r => break r?,
            }
        };
        if let Err(e) = &mounted
            && (self.failing.load(Relaxed) || self.failures.load(Relaxed) != failures)
        {
            self.note(format_args!("{name} cannot mount: {e}"));
            dev.crash();
            self.died(port.as_deref());
            return Ok(None);
        }
        let volume = match mounted {
            Err(MountError::Fs(e)) if self.lying() && damage(&e) => {
                self.note(format_args!("{name} cannot mount: {e}"));
                self.totals.lock().damaged += 1;
                dev.crash();
                return Ok(None);
            }
            r => r.map_err(|e| self.fail(format!("{name} cannot mount: {e}")))?,
        };
        if self.setup.discard {
            volume.discard_freed_blocks();
        }
        self.totals.lock().mounts += 1;
        self.note(format_args!("{name} is {}", volume.node()));
        let host = Arc::new(Host {
            index,
            life,
            dev,
            volume,
            port,
            lost: AtomicBool::new(false),
            given_up: Notify::new(),
            faulty: AtomicBool::new(self.failing.load(Relaxed)),
            retiring: AtomicBool::new(false),
            users: AtomicUsize::new(0),
            promise: Mutex::new(Promise { durable: 0, synced: 0, found: 0, lost: Ack::MAX }),
        });
        self.hosts.lock()[index] = Some(host.clone());
        self.changed.notify_waiters();
        tokio::spawn(self.clone().watch(host.clone()));
        Ok(Some(host))
    }

    /// Takes note of the host's death when it comes.
    async fn watch(self: Arc<Self>, host: Arc<Host>) {
        host.dev.crashed().await;
        {
            let mut hosts = self.hosts.lock();
            let ours = |h: &Arc<Host>| Arc::ptr_eq(h, &host);
            if !hosts[host.index].as_ref().is_some_and(ours) {
                return;
            }
            hosts[host.index] = None;
        }
        self.note(format_args!("{} crashed", host.name()));
        self.died(host.port.as_deref());
    }

    fn died(&self, port: Option<&SimPort>) {
        if let Some(p) = port {
            p.cut(true);
        }
        self.totals.lock().crashes += 1;
        self.accident();
        self.changed.notify_waiters();
    }

    /// A node hangs, or loses its path to the device, for so long that the others take over; then it wakes up, and nothing it
    /// does may matter any more (I12). Later it is killed; until then its host may have become a node again.
    pub fn lose(self: &Arc<Self>, host: &Arc<Host>, cut: bool, wakes: Duration, dies: Duration) {
        self.note(format_args!("{} {}", host.name(), if cut { "is cut off" } else { "hangs" }));
        if cut {
            host.dev.cut(true);
        } else {
            host.dev.hang(true);
        }
        self.lost_to_all(host);
        let (world, host) = (self.clone(), host.clone());
        tokio::spawn(async move {
            tokio::time::sleep(wakes).await;
            world.note(format_args!("{} wakes up", host.name()));
            if cut {
                host.dev.cut(false);
            } else {
                host.dev.hang(false);
            }
            tokio::time::sleep(dies / 2).await;
            if host.life.is_multiple_of(2) {
                world.rejoins(&host);
            }
            tokio::time::sleep(dies / 2).await;
            host.dev.crash();
        });
    }

    /// The host of a node that has lapsed may become a node again at once, as a mount does by itself, while what was under way in the old
    /// membership still is.
    fn rejoins(&self, host: &Arc<Host>) {
        let mut hosts = self.hosts.lock();
        let mine = &mut hosts[host.index];
        if host.volume.has_failed() && mine.as_ref().is_some_and(|h| Arc::ptr_eq(h, host)) {
            *mine = None;
            drop(hosts);
            self.note(format_args!("{} has lapsed, and lets another life begin", host.name()));
            host.volume.abandon();
            self.lingering.lock().push(host.clone());
            self.changed.notify_waiters();
        }
    }

    /// As [`World::lose`] of a node to which something else happens.
    pub fn given_up(&self, host: &Arc<Host>, dies: Duration) {
        self.lost_to_all(host);
        let host = host.clone();
        tokio::spawn(async move {
            tokio::time::sleep(dies).await;
            host.dev.crash();
        });
    }

    fn lost_to_all(&self, host: &Host) {
        host.lost.store(true, Relaxed);
        host.given_up.notify_waiters();
        self.accident();
        self.changed.notify_waiters();
    }

    /// Unmounts a host; its clients have gone or are going.
    pub async fn leave(&self, host: &Arc<Host>) -> Outcome<()> {
        host.retiring.store(true, Relaxed);
        self.changed.notify_waiters();
        while host.users.load(Relaxed) > 0 && !host.dead() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let latest = self.latest();
        self.note(format_args!("{} unmounts", host.name()));
        let left = self.call(host, "unmount", host.volume.unmount()).await?;
        if let Err(e) = left {
            if self.excused(host, "unmount", &e) {
                return Err(Stop::Down);
            }
            return Err(self.fail(format!("{} cannot unmount: {e}", host.name())));
        }
        host.synced(latest);
        self.hosts.lock()[host.index] = None;
        host.dev.crash();
        self.changed.notify_waiters();
        Ok(())
    }

    /// A place to work; waits until there is one. `None`: the run is over.
    pub async fn seat(&self, rng: &mut StdRng) -> Option<Seat> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.over() {
                return None;
            }
            let hosts: Vec<_> = self.live().into_iter().filter(|h| !h.retiring.load(Relaxed)).collect();
            if !hosts.is_empty() {
                return Some(self.sit(&hosts[rng.random_range(0..hosts.len())]));
            }
            changed.await;
        }
    }

    pub fn sit(&self, host: &Arc<Host>) -> Seat {
        host.users.fetch_add(1, Relaxed);
        Seat { host: host.clone() }
    }

    fn recovery_goes_on(&self) -> bool {
        let layout = self.setup.layout();
        (0..layout.nodes).any(|slot| {
            let at = layout.slots + u64::from(slot) * layout.stride;
            let block = self.disk.read_raw(at, layout.stride as usize);
            SlotBlock::decode(&block, layout.volume, slot)
                .is_ok_and(|b| matches!(b.state, SlotState::Recovering { .. }))
        })
    }

    // ---- calls -------------------------------------------------------------------------------------------------

    /// Runs an operation of a host to its end, unless the host dies; it must end in time.
    pub async fn call<T>(&self, host: &Host, what: &str, op: impl Future<Output = T>) -> Outcome<T> {
        self.bounded(host.ended(), &format!("{} {what}", host.name()), self.setup.patience(), op).await
    }

    /// As [`World::call`], for what may take longer.
    pub async fn call_within<T>(
        &self,
        host: &Host,
        what: &str,
        patience: Duration,
        op: impl Future<Output = T>,
    ) -> Outcome<T> {
        self.bounded(host.ended(), &format!("{} {what}", host.name()), patience, op).await
    }

    async fn bounded<T>(
        &self,
        ended: impl Future<Output = ()>,
        what: &str,
        patience: Duration,
        op: impl Future<Output = T>,
    ) -> Outcome<T> {
        let started = Instant::now();
        let in_time = async {
            let mut links = 0;
            loop {
                let since = self.last_accident().map_or(started, |a| a.max(started));
                let due = since + patience + links * self.setup.timeouts().heartbeat();
                if Instant::now() >= due {
                    // Recoverers that died in turn are recovered one after the other, each a heartbeat later.
                    if links + 2 < u32::from(self.setup.nodes()) && self.recovery_goes_on() {
                        links += 1;
                        continue;
                    }
                    return;
                }
                tokio::time::sleep_until(due).await;
            }
        };
        tokio::select! {
            biased;
            () = ended => Err(Stop::Down),
            done = op => {
                self.totals.lock().operations += 1;
                Ok(done)
            }
            () = in_time => {
                let waited = started.elapsed().as_secs_f64();
                Err(self.fail(format!("{what} has not ended after {waited:.1} s")))
            }
        }
    }

    /// An operation that must succeed.
    pub async fn done<T>(&self, host: &Host, what: &str, op: impl Future<Output = fs_core::Result<T>>) -> Outcome<T> {
        self.call(host, what, op).await?.map_err(|e| self.unexpected(host, what, &e))
    }

    /// An operation that may be refused, with an errno that the caller expects or not.
    pub async fn tried<T>(
        &self,
        host: &Host,
        what: &str,
        op: impl Future<Output = fs_core::Result<T>>,
    ) -> Outcome<Result<T, &'static str>> {
        match self.call(host, what, op).await? {
            Ok(v) => Ok(Ok(v)),
            Err(e) => match errno(&e) {
                Some(errno) => Ok(Err(errno)),
                None => Err(self.unexpected(host, what, &e)),
            },
        }
    }

    /// An error that only a failing device explains.
    pub fn unexpected(&self, host: &Host, what: &str, e: &FsError) -> Stop {
        match self.excused(host, what, e) {
            true => Stop::Down,
            false => self.fail(format!("{} {what}: {e}", host.name())),
        }
    }
}

fn damage(e: &FsError) -> bool {
    matches!(e, FsError::Block { .. } | FsError::Damaged { .. })
}

fn errno(e: &FsError) -> Option<&'static str> {
    Some(match e {
        FsError::NotFound => "ENOENT",
        FsError::Exists => "EEXIST",
        FsError::NotEmpty => "ENOTEMPTY",
        FsError::IsDir => "EISDIR",
        FsError::NotDir => "ENOTDIR",
        FsError::Invalid => "EINVAL",
        FsError::NotPermitted => "EPERM",
        FsError::NoSpace => "ENOSPC",
        _ => return None,
    })
}

impl World {
    /// After a crash: of the dead node's changes all up to `from` were found, those from `to` on were not. One journal
    /// keeps them in order, so what different clients find must fit together.
    pub fn cut(&self, dead: &Host, from: Ack, to: Ack) -> Outcome<()> {
        let mut p = dead.promise.lock();
        p.found = p.found.max(from);
        p.lost = p.lost.min(to);
        if p.found < p.lost {
            return Ok(());
        }
        let (found, lost) = (p.found, p.lost);
        drop(p);
        Err(self.fail(format!("{}: change {lost} was lost, the later one {found} was not", dead.name())))
    }
}
