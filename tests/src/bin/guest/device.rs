//! The backend of kernel SCSI disks, without a volume.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use blockdev::iscsi::Settings;
use blockdev::open::{User, open};
use blockdev::{AlignedBuf, BlockDevice, Caw, DevError, FenceKey, Fenced, FencingKind, IoClass, Presence, WritePermit};

use crate::lio::{Lun, Shape};

pub const SIZE: u64 = 64 << 20;
const SECTOR: usize = 512;

pub type Dev = Arc<dyn BlockDevice>;

pub async fn try_open(path: &Path, user: User) -> Result<Dev, String> {
    open(path, user, None, &Settings::default()).await.map_err(|e| e.to_string())
}

pub async fn node(path: &Path) -> Dev {
    try_open(path, User::Node).await.unwrap()
}

pub fn buf(len: usize, byte: u8) -> Arc<AlignedBuf> {
    Arc::new(AlignedBuf::copy_of(&vec![byte; len]))
}

pub fn key(slot: u16, incarnation: u32) -> FenceKey {
    FenceKey { slot, incarnation }
}

pub async fn write(dev: &Dev, offset: u64, byte: u8) -> blockdev::Result<()> {
    dev.write(IoClass::Data, offset, buf(SECTOR, byte), true).await
}

pub async fn first_byte(dev: &Dev, offset: u64) -> u8 {
    dev.read(IoClass::Data, offset, SECTOR).await.unwrap()[0]
}

pub fn block_on<T>(what: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(what)
}

struct Permit(AtomicBool);

impl WritePermit for Permit {
    fn valid(&self) -> bool {
        self.0.load(SeqCst)
    }
}

pub fn run() -> String {
    let lun = Lun::new(SIZE, 2, Shape { write_cache: true });
    println!("opening");
    block_on(async {
        let (a, b) = (node(lun.device(0)).await, node(lun.device(1)).await);
        println!("transfers");
        transfers(&a, &b).await;
        println!("a second node by one path");
        one_node_per_path(lun.device(0)).await;
        println!("compare-and-write");
        compare_and_write(&a, &b).await;
        println!("fencing");
        fencing(&a, &b).await;
        println!("permits");
        permits(&a).await;
        a.unregister().await.unwrap();
        b.unregister().await.unwrap();
        assert_eq!(
            a.registrations().await.unwrap(),
            Some(Default::default()),
            "the last one took the reservation along"
        );
        drop((a, b));
        // The device is free again once nobody has it.
        drop(node(lun.device(0)).await);
    });
    "transfers, compare-and-write, fencing, permits".into()
}

async fn transfers(a: &Dev, b: &Dev) {
    let g = a.geometry();
    assert_eq!((g.sector_size, g.size, g.write_cache, g.fencing), (512, SIZE, true, FencingKind::Reservations));
    let told = a.abilities().unwrap();
    assert!(told.compare_and_write && told.reservations && told.persists && told.unmap && told.fua, "{told:?}");
    // More than the kernel sends at once.
    let parts: Vec<_> = [1_000_448, 512, 700_416, 2 << 20].iter().zip(1..).map(|(n, b)| buf(*n, b)).collect();
    let lens: Vec<usize> = parts.iter().map(|b| b.len()).collect();
    for fua in [false, true] {
        a.writev(IoClass::Data, 4096, parts.clone(), fua).await.unwrap();
        a.flush(IoClass::Data).await.unwrap();
        let read = b.readv(IoClass::Data, 4096, &lens).await.unwrap();
        assert!(read.iter().zip(&parts).all(|(a, b)| a[..] == b[..]), "fua {fua}");
    }
    let beyond = a.read(IoClass::Data, SIZE, SECTOR).await;
    assert!(matches!(beyond, Err(DevError::Range { .. })), "{beyond:?}");
    a.discard(1 << 20, 1 << 20).await.unwrap();
    assert_eq!(first_byte(b, 3 << 19).await, 0, "what was discarded reads as zeros here");
}

async fn one_node_per_path(path: &Path) {
    for user in [User::Node, User::Tool] {
        let refused = try_open(path, user).await.err().unwrap();
        assert!(refused.contains("this host uses the device already"), "{refused}");
    }
    try_open(path, User::Reader).await.unwrap();
}

/// Two nodes count up in one sector: none of their increments is lost.
async fn compare_and_write(a: &Dev, b: &Dev) {
    const EACH: u64 = 60;
    let zeros = buf(SECTOR, 0);
    a.write(IoClass::Lock, 512, zeros, true).await.unwrap();
    let counting = [a.clone(), b.clone()].map(|dev| {
        tokio::spawn(async move {
            let (mut old, mut misses) = (vec![0u8; SECTOR], 0);
            for _ in 0..EACH {
                loop {
                    let n = u64::from_le_bytes(old[..8].try_into().unwrap());
                    let mut new = vec![n as u8; SECTOR];
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
        })
    });
    let mut misses = 0;
    for one in counting {
        misses += one.await.unwrap();
    }
    let read = a.read(IoClass::Lock, 512, SECTOR).await.unwrap();
    assert_eq!(u64::from_le_bytes(read[..8].try_into().unwrap()), 2 * EACH);
    assert!(misses > 0, "they never met");
    assert_eq!((first_byte(b, 0).await, first_byte(b, 1024).await), (0, 0), "the sectors beside it");
}

async fn fencing(a: &Dev, b: &Dev) {
    a.register(key(0, 7)).await.unwrap();
    b.register(key(1, 9)).await.unwrap();
    let told = a.registrations().await.unwrap().unwrap();
    assert_eq!(told.nodes, [key(0, 7), key(1, 9)]);
    assert_eq!(told.reservation, Some("Write Exclusive - All Registrants"));
    assert_eq!(a.presence(key(1, 9)).await.unwrap(), Presence::Present);
    write(b, 8192, 1).await.unwrap();
    assert_eq!(a.fence(key(1, 9)).await.unwrap(), Fenced::Done);
    for fua in [false, true] {
        let refused = b.write(IoClass::Data, 8192, buf(SECTOR, 2), fua).await;
        assert!(matches!(refused, Err(DevError::Fenced)), "{refused:?}");
    }
    let refused = b.compare_and_write(8192, &[1; SECTOR], &[2; SECTOR]).await;
    assert!(matches!(refused, Err(DevError::Fenced)), "{refused:?}");
    assert!(matches!(b.flush(IoClass::Data).await, Err(DevError::Fenced)));
    assert!(matches!(b.discard(1 << 20, 1 << 20).await, Err(DevError::Fenced)));
    assert!(matches!(b.fence(key(0, 7)).await, Err(DevError::Fenced)), "who is fenced fences nobody");
    assert_eq!((first_byte(a, 8192).await, first_byte(b, 8192).await), (1, 1), "everybody may read");
    assert_eq!(a.presence(key(1, 9)).await.unwrap(), Presence::Gone);
    write(a, 8192, 3).await.unwrap();
    // It comes back as its next incarnation, and the old one stays gone.
    b.register(key(1, 10)).await.unwrap();
    write(b, 8192, 4).await.unwrap();
    assert_eq!(a.presence(key(1, 9)).await.unwrap(), Presence::Gone);
    assert_eq!(first_byte(a, 8192).await, 4);
    // A heartbeat finds out that it is fenced without any other write.
    assert_eq!(a.fence(key(1, 10)).await.unwrap(), Fenced::Done);
    let beat = b.write(IoClass::Liveness, 16384, buf(SECTOR, 1), false).await;
    assert!(matches!(beat, Err(DevError::Fenced)), "{beat:?}");
    b.register(key(1, 11)).await.unwrap();
}

/// Without a permit nothing is sent.
async fn permits(a: &Dev) {
    let permit = Arc::new(Permit(AtomicBool::new(true)));
    a.set_permit(permit.clone());
    write(a, 4096, 5).await.unwrap();
    permit.0.store(false, SeqCst);
    assert!(matches!(write(a, 4096, 6).await, Err(DevError::Fenced)));
    let refused = a.compare_and_write(4096, &[5; SECTOR], &[6; SECTOR]).await;
    assert!(matches!(refused, Err(DevError::Fenced)), "{refused:?}");
    assert!(matches!(a.discard(4096, 4096).await, Err(DevError::Fenced)));
    assert_eq!(first_byte(a, 4096).await, 5);
    permit.0.store(true, SeqCst);
    write(a, 4096, 7).await.unwrap();
}
