//! What others send to a mounted node: hints, doorbells and heartbeats, changed at random, with the right checksums and key. They
//! may cost looks at the disk, and change nothing of what the node shows.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster::{HintNet, Layout};
use fs_core::format::superblock::Superblock;
use fs_core::{MountConfig, Volume};
use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use tokio::sync::Mutex;

use super::device::Overlaid;
use super::{fix_checksums, guarded, mutate, rng};
use crate::golden;

/// As in `volume`.
const PATIENCE: Duration = Duration::from_secs(3600);

pub struct Noise {
    base: Arc<Vec<u8>>,
    key: [u8; 32],
    layout: Layout,
    /// What a node shows that nobody disturbs.
    shows: String,
}

/// The network as the node sees it.
struct Net {
    to_node: Mutex<tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>>,
}

#[async_trait]
impl HintNet for Net {
    fn address(&self) -> Vec<u8> {
        b"here".to_vec()
    }

    fn send(&self, _: &[u8], _: Vec<u8>) {}

    async fn recv(&self) -> Vec<u8> {
        match self.to_node.lock().await.recv().await {
            Some(datagram) => datagram,
            None => std::future::pending().await,
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().map_err(|e| e.to_string())
}

impl Noise {
    /// `base` is a volume on which no node lives or died.
    pub fn new(base: Vec<u8>) -> Result<Self, String> {
        let sb = Superblock::decode(&base[..super::BLOCK]).map_err(|e| e.to_string())?;
        let mut noise =
            Self { base: Arc::new(base), key: sb.hint_key, layout: sb.layout().cluster(), shows: String::new() };
        noise.shows = runtime()?.block_on(noise.listing(None))?;
        Ok(noise)
    }

    /// Mounts, reads everything with the noise of `rng` going on, and unmounts.
    async fn listing(&self, rng: Option<StdRng>) -> Result<String, String> {
        let device = Arc::new(Overlaid::new(self.base.clone()));
        let (send, recv) = tokio::sync::mpsc::unbounded_channel();
        let net: Arc<dyn HintNet> = Arc::new(Net { to_node: Mutex::new(recv) });
        let cfg = MountConfig { net: Some(net), ..golden::mount_config(device.clone(), 0) };
        let v = Volume::mount(cfg).await.map_err(|e| format!("mounting: {e}"))?;
        let me = v.node();
        let noise = rng.map(|mut rng| {
            let (key, layout) = (self.key, self.layout);
            tokio::spawn(async move {
                loop {
                    for _ in 0..rng.random_range(1..8) {
                        match rng.random_range(0..4) {
                            0 | 1 => drop(send.send(hint(&mut rng, &key, &layout, me))),
                            2 => doorbell(&mut rng, &layout, me, &device),
                            _ => heartbeat(&mut rng, &layout, me, &device),
                        }
                    }
                    tokio::time::sleep(Duration::from_micros(rng.random_range(1..50_000))).await;
                }
            })
        });
        let mut shows = String::new();
        // Locks are given up and taken again meanwhile.
        for _ in 0..if noise.is_some() { 4 } else { 1 } {
            shows = golden::listing(&v).await.map_err(|e| format!("reading: {e}"))?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let left = v.unmount().await.map_err(|e| format!("unmounting: {e}"));
        if let Some(n) = noise {
            n.abort();
        }
        left.map(|()| shows)
    }

    /// One case. The error says what does not hold.
    pub fn case(&self, seed: u64) -> Result<(), String> {
        let result = guarded(seed, || {
            let rt = runtime()?;
            let shows = rt.block_on(async { tokio::time::timeout(PATIENCE, self.listing(Some(rng(seed)))).await });
            match shows.map_err(|_| "mounting and reading does not end")?? == self.shows {
                true => Ok(()),
                false => Err("it shows something else".into()),
            }
        });
        result.map_err(|e| format!("seed {seed}: {e}"))
    }
}

/// A life of another slot, ended or not.
fn other(rng: &mut StdRng, layout: &Layout, me: cluster::NodeId) -> (u16, u32) {
    let slot = (me.slot + rng.random_range(1..layout.nodes)) % layout.nodes;
    (slot, rng.random_range(0..6))
}

fn lock(rng: &mut StdRng, layout: &Layout) -> (u8, u32) {
    match rng.random() {
        true => (0, rng.random_range(0..layout.domains().min(40))),
        false => (1, rng.random_range(0..layout.groups)),
    }
}

/// The layout is that of `cluster::hints`.
fn hint(rng: &mut StdRng, key: &[u8; 32], layout: &Layout, me: cluster::NodeId) -> Vec<u8> {
    let (slot, incarnation) = other(rng, layout, me);
    let (kind, number) = lock(rng, layout);
    let mut b = b"CHNT\x01".to_vec();
    b.extend([rng.random_range(0..3), kind, 0]);
    b.extend(layout.volume.to_le_bytes());
    b.extend(slot.to_le_bytes());
    b.extend(me.slot.to_le_bytes());
    b.extend(number.to_le_bytes());
    b.extend(incarnation.to_le_bytes());
    b.extend(me.incarnation.to_le_bytes());
    b.extend(rng.random_range(1u64..1 << 20).to_le_bytes());
    if rng.random_range(0..3) == 0 {
        mutate(rng, &mut b);
    }
    let mac = *blake3::keyed_hash(key, &b).as_bytes();
    b.extend(mac);
    match rng.random_range(0..8) {
        0 => b.truncate(rng.random_range(0..b.len())),
        1 => b.resize(rng.random_range(0..1200), 0),
        _ => {}
    }
    b
}

/// The layout is that of `cluster::format::doorbell`.
fn doorbell(rng: &mut StdRng, layout: &Layout, me: cluster::NodeId, device: &Overlaid) {
    let (slot, incarnation) = other(rng, layout, me);
    let mut b = vec![0; 512];
    let requests = rng.random_range(0..=40u8);
    b[..6].copy_from_slice(&[b'C', b'D', b'B', b'L', 1, requests]);
    b[6..8].copy_from_slice(&slot.to_le_bytes());
    b[8..16].copy_from_slice(&layout.volume.to_le_bytes());
    b[16..20].copy_from_slice(&incarnation.to_le_bytes());
    b[20..24].copy_from_slice(&me.incarnation.to_le_bytes());
    b[24..32].copy_from_slice(&rng.random_range(1u64..1 << 20).to_le_bytes());
    b[32..34].copy_from_slice(&me.slot.to_le_bytes());
    for i in 0..usize::from(requests) {
        let (kind, number) = lock(rng, layout);
        b[40 + 8 * i..44 + 8 * i].copy_from_slice(&number.to_le_bytes());
        b[44 + 8 * i] = kind;
        b[45 + 8 * i] = rng.random_range(1..3);
    }
    if rng.random_range(0..3) == 0 {
        mutate(rng, &mut b);
    }
    fix_checksums(&mut b);
    device.put(layout.doorbell_cell(me.slot, slot), &b);
}

/// Of another slot: its own nobody writes but the node.
fn heartbeat(rng: &mut StdRng, layout: &Layout, me: cluster::NodeId, device: &Overlaid) {
    let (slot, incarnation) = other(rng, layout, me);
    let mut b = vec![0; 512];
    b[..5].copy_from_slice(b"CHBT\x01");
    b[6..8].copy_from_slice(&slot.to_le_bytes());
    b[8..16].copy_from_slice(&layout.volume.to_le_bytes());
    b[16..20].copy_from_slice(&incarnation.to_le_bytes());
    b[24..32].copy_from_slice(&rng.next_u64().to_le_bytes());
    mutate(rng, &mut b);
    fix_checksums(&mut b);
    device.put(layout.heartbeat(slot), &b);
}
