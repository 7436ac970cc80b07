//! Disks on iSCSI targets (tgt, istgt), without a volume: transfers, compare-and-write, fencing, lost connections.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use blockdev::iscsi::Settings;
use blockdev::open::{User, open};
use blockdev::{AlignedBuf, BlockDevice, Caw, DevError, FenceKey, Fenced, FencingKind, IoClass, Presence, WritePermit};
use clusterfs_tests::iscsi_target::{CHAP, Kind, Proxy, Shape, TARGET, Target, secrets_file};

const SIZE: u64 = 64 << 20;
const SECTOR: usize = 512;

type Dev = Arc<dyn BlockDevice>;

async fn device(url: &str) -> Dev {
    open(Path::new(url), User::Node, None, &Settings::default()).await.unwrap()
}

async fn through(target: &Target, proxy: &Proxy) -> Dev {
    device(&target.url_at(None, proxy.address())).await
}

fn buf(len: usize, byte: u8) -> Arc<AlignedBuf> {
    Arc::new(AlignedBuf::copy_of(&vec![byte; len]))
}

fn key(slot: u16, incarnation: u32) -> FenceKey {
    FenceKey { slot, incarnation }
}

async fn write(dev: &Dev, offset: u64, byte: u8) -> blockdev::Result<()> {
    dev.write(IoClass::Data, offset, buf(SECTOR, byte), true).await
}

async fn first_byte(dev: &Dev, offset: u64) -> u8 {
    dev.read(IoClass::Data, offset, SECTOR).await.unwrap()[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read() {
    let target = Target::start(SIZE).unwrap();
    let dev = device(&target.url()).await;
    let g = dev.geometry();
    assert_eq!((g.sector_size, g.size, g.write_cache, g.fencing), (512, SIZE, true, FencingKind::Reservations));
    // More than one transfer, in buffers that do not end where transfers do.
    let parts: Vec<_> = [1_000_448, 512, 700_416, 2 << 20].iter().zip(1..).map(|(n, b)| buf(*n, b)).collect();
    let lens: Vec<usize> = parts.iter().map(|b| b.len()).collect();
    for fua in [false, true] {
        dev.writev(IoClass::Data, 4096, parts.clone(), fua).await.unwrap();
        dev.flush(IoClass::Data).await.unwrap();
        let read = dev.readv(IoClass::Data, 4096, &lens).await.unwrap();
        assert!(read.iter().zip(&parts).all(|(a, b)| a[..] == b[..]));
    }
    let file = std::fs::File::open(target.lun()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4096 + 1_000_448).unwrap();
    assert_eq!(byte, [2]);
    // Many at once.
    let writes: Vec<_> = (0..200u64)
        .map(|i| {
            let dev = dev.clone();
            tokio::spawn(async move { dev.write(IoClass::Data, i * 8192, buf(8192, i as u8), false).await })
        })
        .collect();
    for w in writes {
        w.await.unwrap().unwrap();
    }
    for i in 0..200u64 {
        assert_eq!(dev.read(IoClass::Data, i * 8192, 8192).await.unwrap()[8191], i as u8);
    }
    let beyond = dev.read(IoClass::Data, SIZE, SECTOR).await;
    assert!(matches!(beyond, Err(DevError::Range { .. })), "{beyond:?}");
    dev.discard(0, 1 << 20).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn large_sectors() {
    let target = Target::with(SIZE, Shape { block_size: 4096, ..Shape::local(Kind::Tgt).unwrap() }).unwrap();
    let dev = device(&target.url()).await;
    assert_eq!(dev.geometry().sector_size, 4096);
    dev.write(IoClass::Data, 8192, buf(4096, 9), true).await.unwrap();
    assert_eq!(dev.read(IoClass::Data, 8192, 4096).await.unwrap()[4095], 9);
    let caw = dev.compare_and_write(8192, &[9; 4096], &[8; 4096]).await.unwrap();
    assert_eq!(caw, Caw::Written);
    assert!(dev.read(IoClass::Data, 8192, 512).await.is_err());
}

/// Several hosts count up in one sector: none of their increments is lost.
#[tokio::test(flavor = "multi_thread")]
async fn compare_and_write_races() {
    for kind in [Kind::Tgt, Kind::Istgt("None")] {
        count_up(&Target::with(SIZE, Shape::local(kind).unwrap()).unwrap()).await;
    }
}

async fn count_up(target: &Target) {
    const HOSTS: u64 = 4;
    const EACH: u64 = 100;
    let mut hosts = Vec::new();
    for host in 0..HOSTS {
        let dev = device(&target.url()).await;
        hosts.push(tokio::spawn(async move {
            let mut misses = 0;
            let mut old = vec![0u8; SECTOR];
            for _ in 0..EACH {
                loop {
                    let n = u64::from_le_bytes(old[..8].try_into().unwrap());
                    let mut new = vec![host as u8; SECTOR];
                    new[..8].copy_from_slice(&(n + 1).to_le_bytes());
                    match dev.compare_and_write(512, &old, &new).await.unwrap() {
                        Caw::Written => break old = new,
                        Caw::Mismatch(found) => {
                            misses += 1;
                            old = found;
                        }
                    }
                }
            }
            misses
        }));
    }
    let mut misses = 0;
    for h in hosts {
        misses += h.await.unwrap();
    }
    let dev = device(&target.url()).await;
    let end = dev.read(IoClass::Lock, 512, SECTOR).await.unwrap();
    assert_eq!(u64::from_le_bytes(end[..8].try_into().unwrap()), HOSTS * EACH);
    assert!(misses > 0, "they never met: this test shows nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_node_cannot_write_and_comes_back_only_as_another() {
    let target = Target::start(SIZE).unwrap();
    let (a, b) = (device(&target.url()).await, device(&target.url()).await);
    assert_eq!(a.presence(key(0, 1)).await.unwrap(), Presence::Unknown);
    a.register(key(0, 1)).await.unwrap();
    b.register(key(1, 7)).await.unwrap();
    write(&a, 0, 1).await.unwrap();
    write(&b, 512, 1).await.unwrap();
    assert_eq!(b.presence(key(0, 1)).await.unwrap(), Presence::Present);
    let all = b.registrations().await.unwrap().unwrap();
    assert_eq!((all.nodes.len(), all.foreign.len()), (2, 0));
    assert_eq!(all.reservation, Some("Write Exclusive - All Registrants"));

    assert_eq!(b.fence(key(0, 1)).await.unwrap(), Fenced::Done);
    assert_eq!(b.presence(key(0, 1)).await.unwrap(), Presence::Gone);
    // All of them, each refused by the device itself: the node does not know yet.
    let caw = a.compare_and_write(0, &[1; SECTOR], &[2; SECTOR]).await;
    assert!(matches!(caw, Err(DevError::Fenced)), "{caw:?}");
    assert!(matches!(write(&a, 0, 2).await, Err(DevError::Fenced)));
    assert_eq!(first_byte(&b, 0).await, 1);
    assert_eq!(first_byte(&a, 0).await, 1, "a fenced node still reads");
    // It would go on as nothing had happened, were its key put back for it.
    let other = device(&target.url()).await;
    other.register(key(0, 1)).await.unwrap();
    assert!(matches!(write(&a, 0, 2).await, Err(DevError::Fenced)));
    other.unregister().await.unwrap();
    // As a new incarnation it is welcome.
    a.register(key(0, 2)).await.unwrap();
    write(&a, 0, 3).await.unwrap();
    assert_eq!(first_byte(&b, 0).await, 3);
    // Who is not registered cannot write at all.
    let stranger = device(&target.url()).await;
    let e = write(&stranger, 0, 4).await.unwrap_err();
    assert!(e.to_string().contains("reserved"), "{e}");
    // A second fencing of one that is gone is as good as the first.
    assert_eq!(b.fence(key(0, 1)).await.unwrap(), Fenced::Done);
    b.evict_others().await.unwrap();
    assert!(matches!(write(&a, 0, 5).await, Err(DevError::Fenced)));
    write(&b, 0, 6).await.unwrap();
}

/// A target that knows PREEMPT AND ABORT.
#[tokio::test(flavor = "multi_thread")]
async fn fenced_by_preempt_and_abort() {
    let target = Target::with(SIZE, Shape::local(Kind::Istgt("None")).unwrap()).unwrap();
    let (a, b) = (device(&target.url()).await, device(&target.url()).await);
    b.register(key(1, 1)).await.unwrap();
    a.register(key(0, 1)).await.unwrap();
    write(&a, 0, 1).await.unwrap();
    assert_eq!(b.fence(key(0, 1)).await.unwrap(), Fenced::Done);
    assert!(matches!(write(&a, 0, 2).await, Err(DevError::Fenced)));
    assert_eq!(first_byte(&b, 0).await, 1);
    write(&b, 0, 3).await.unwrap();
}

/// The connections of several nodes break over and over. What was durable stays, compare-and-writes are done or known to be
/// unknown, and a node that had unflushed ones at that moment (the target has a volatile cache) must become another.
#[tokio::test(flavor = "multi_thread")]
async fn connections_break_under_load() {
    let target = Target::start(SIZE).unwrap();
    let proxy = Proxy::start(target.address()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut nodes = Vec::new();
    for w in 0..4u16 {
        let dev = through(&target, &proxy).await;
        dev.register(key(w, 1)).await.unwrap();
        nodes.push(tokio::spawn(work_through_breaks(dev, w, stop.clone())));
    }
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        proxy.drop_all();
    }
    stop.store(true, SeqCst);
    for w in nodes {
        let (done, unknown, lives) = w.await.unwrap();
        println!("{done} rounds, {unknown} compare-and-writes with unknown outcome, {lives} lives");
        assert!(done > 0);
    }
}

async fn work_through_breaks(dev: Dev, w: u16, stop: Arc<AtomicBool>) -> (u64, u64, u32) {
    let (journal, lock) = (u64::from(w + 1) << 20, u64::from(w) * 512);
    let (mut done, mut unknown, mut life, mut old) = (0u64, 0, 1, vec![0u8; SECTOR]);
    while !stop.load(SeqCst) {
        let mut new = vec![w as u8; SECTOR];
        new[..8].copy_from_slice(&(done + 1).to_le_bytes());
        let round = async {
            dev.write(IoClass::Journal, journal, buf(256 << 10, done as u8), true).await?;
            let back = dev.read(IoClass::Journal, journal, 256 << 10).await?;
            assert!(back.iter().all(|b| *b == done as u8));
            match dev.compare_and_write(lock, &old, &new).await? {
                Caw::Written => dev.flush(IoClass::Lock).await,
                Caw::Mismatch(found) => panic!("nobody else writes there: {:?}", &found[..16]),
            }
        };
        match round.await {
            Ok(()) => old = new,
            Err(DevError::Unknown { .. }) => unknown += 1,
            Err(DevError::Fenced) => {
                life += 1;
                dev.register(key(w, life)).await.unwrap();
            }
            Err(e) => panic!("{e}"),
        }
        if old[..8] != (done + 1).to_le_bytes() {
            let found = dev.read(IoClass::Lock, lock, SECTOR).await.unwrap().to_vec();
            assert!(found == old || found[..8] == (done + 1).to_le_bytes());
            old = found;
        }
        done += 1;
    }
    (done, unknown, life)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_an_unknown_outcome() {
    let target = Target::start(SIZE).unwrap();
    let proxy = Proxy::start(target.address()).unwrap();
    let dev = through(&target, &proxy).await;
    proxy.lose_next_answer();
    let caw = dev.compare_and_write(0, &[0; SECTOR], &[1; SECTOR]).await;
    assert!(matches!(caw, Err(DevError::Unknown { .. })), "{caw:?}");
    assert_eq!(first_byte(&dev, 0).await, 1, "it was done");
    // A plain write is simply done again.
    proxy.lose_next_answer();
    write(&dev, 512, 2).await.unwrap();
    assert_eq!(first_byte(&dev, 512).await, 2);
}

/// Fenced while it had no connection: the first write after the reconnect is not sent as if nothing had happened.
#[tokio::test(flavor = "multi_thread")]
async fn fenced_while_away() {
    let target = Target::start(SIZE).unwrap();
    let proxy = Proxy::start(target.address()).unwrap();
    let (a, b) = (through(&target, &proxy).await, device(&target.url()).await);
    a.register(key(0, 1)).await.unwrap();
    b.register(key(1, 1)).await.unwrap();
    write(&a, 0, 1).await.unwrap();
    // Back between looking for its registration and renewing it, it would be let in: with a lease it has no permit by then.
    proxy.cut();
    b.fence(key(0, 1)).await.unwrap();
    proxy.mend();
    let written = write(&a, 0, 2).await;
    assert!(matches!(written, Err(DevError::Fenced)), "{written:?}");
    assert_eq!(first_byte(&b, 0).await, 1);
}

/// A device that restarts may have lost what it had in its cache: a node with unflushed writes must not go on.
#[tokio::test(flavor = "multi_thread")]
async fn unflushed_writes_do_not_outlive_the_connection() {
    let target = Target::start(SIZE).unwrap();
    let proxy = Proxy::start(target.address()).unwrap();
    let dev = through(&target, &proxy).await;
    dev.write(IoClass::Meta, 0, buf(SECTOR, 1), false).await.unwrap();
    dev.flush(IoClass::Meta).await.unwrap();
    proxy.drop_all();
    dev.write(IoClass::Meta, 0, buf(SECTOR, 2), false).await.unwrap();
    proxy.drop_all();
    let flushed = dev.flush(IoClass::Meta).await;
    assert!(matches!(flushed, Err(DevError::Fenced)), "{flushed:?}");
    assert!(matches!(write(&dev, 0, 3).await, Err(DevError::Fenced)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_restarts_forgets_its_nodes() {
    let mut target = Target::start(SIZE).unwrap();
    let dev = device(&target.url()).await;
    dev.register(key(0, 1)).await.unwrap();
    write(&dev, 0, 1).await.unwrap();
    target.kill().unwrap();
    target.run().unwrap();
    assert_eq!(first_byte(&dev, 0).await, 1);
    // Anybody could have written meanwhile.
    assert!(matches!(write(&dev, 0, 2).await, Err(DevError::Fenced)));
    dev.register(key(0, 2)).await.unwrap();
    write(&dev, 0, 3).await.unwrap();
}

struct Permit(AtomicBool);

impl WritePermit for Permit {
    fn valid(&self) -> bool {
        self.0.load(SeqCst)
    }
}

/// The target is silent for a while; then it goes on. What was not sent by the end of the lease is not sent later.
#[tokio::test(flavor = "multi_thread")]
async fn silence() {
    let target = Target::start(SIZE).unwrap();
    let dev = device(&target.url()).await;
    let permit = Arc::new(Permit(AtomicBool::new(true)));
    dev.set_permit(permit.clone());
    write(&dev, 0, 1).await.unwrap();
    target.suspend().unwrap();
    let started = Instant::now();
    let during = {
        let dev = dev.clone();
        tokio::spawn(async move { write(&dev, 0, 2).await })
    };
    tokio::time::sleep(Duration::from_secs(3)).await;
    target.resume().unwrap();
    during.await.unwrap().unwrap();
    println!("a write took {:.1?} through the target's silence", started.elapsed());
    // More than the network takes without being read: part of it stays with us.
    target.suspend().unwrap();
    let writes: Vec<_> = (0..60u64)
        .map(|i| {
            let dev = dev.clone();
            tokio::spawn(async move { dev.write(IoClass::Data, i << 20, buf(1 << 20, 7), true).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    permit.0.store(false, SeqCst);
    target.resume().unwrap();
    let mut refused = 0;
    for w in writes {
        match w.await.unwrap() {
            Ok(()) => {}
            Err(DevError::Fenced | DevError::Unknown { .. }) => refused += 1,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(refused > 0, "everything was sent after the permit had ended");
    let late = write(&dev, 0, 3).await;
    assert!(matches!(late, Err(DevError::Fenced)), "{late:?}");
    assert_ne!(first_byte(&dev, 0).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn chap() {
    let dir = tempfile::tempdir().unwrap();
    let attempt = async |url: &str, secret: &str, answer: Option<&str>| {
        let secrets = Some(secrets_file(dir.path(), secret, answer).unwrap());
        let settings = Settings { secrets, ..Settings::default() };
        open(Path::new(url), User::Node, None, &settings).await.map(drop).map_err(|e| e.to_string())
    };
    let [user, secret, _, answer] = CHAP;
    for auth in ["CHAP", "CHAP Mutual"] {
        let target = Target::with(SIZE, Shape::local(Kind::Istgt(auth)).unwrap()).unwrap();
        let url = target.url_at(Some(user), target.address());
        if auth == "CHAP" {
            attempt(&url, secret, None).await.unwrap();
        }
        attempt(&url, secret, Some(answer)).await.unwrap();
        let e = attempt(&url, "another-secret", Some(answer)).await.unwrap_err();
        assert!(e.starts_with(&url) && e.to_lowercase().contains("authentication"), "{e}");
        assert!(!e.contains("another-secret"), "{e}");
        let e = attempt(&url, secret, Some("not-its-answer")).await.unwrap_err();
        assert!(e.starts_with(&url), "a target that does not know the answer was trusted: {e}");
        let e = open(Path::new(&target.url()), User::Node, None, &Settings::default()).await.map(drop);
        assert!(e.is_err(), "no secret, and let in");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said() {
    let target = Target::start(SIZE).unwrap();
    let at: SocketAddr = target.address();
    let fail = async |url: &str| {
        open(Path::new(url), User::Node, None, &Settings::default()).await.map(drop).unwrap_err().to_string()
    };
    let url = format!("iscsi://{at}/iqn.2026-01.test:other/0");
    let e = fail(&url).await;
    assert!(e.contains(&url) && e.contains("not found"), "{e}");
    let e = fail(&format!("iscsi://{at}/{TARGET}/5")).await;
    assert!(e.contains("LUN") || e.contains("sense"), "{e}");
    let e = fail(&format!("iscsi://127.0.0.1:1/{TARGET}/0")).await;
    assert!(e.contains("127.0.0.1:1"), "{e}");
    let plain = Target::with(SIZE, Shape::local(Kind::PlainTgt).unwrap()).unwrap();
    let e = fail(&plain.url()).await;
    assert!(e.contains("COMPARE AND WRITE"), "{e}");
}
