//! Random operations of several incarnations against a model, with a power loss at any moment: what replay leaves is the
//! state after some installation, none that was acknowledged is missing (I11).
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::sim::{OpKind, SimConfig, SimDisk};
use cluster::LockId;
use common::*;
use journal::*;
use parking_lot::Mutex;
use tokio::time::{Duration, sleep};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Blocks per lock.
const EACH: u64 = 12;
const LOCKS: [LockId; 2] = [A, B];

#[derive(Clone)]
enum Cell {
    /// Whatever is there does not matter.
    Free,
    Meta(Arc<Block>),
    Data(u8),
}

struct Model {
    cells: Vec<Cell>,
    /// The transaction that freed the cell: it is used again only once that is durable.
    freed: Vec<TxNo>,
    /// State after each installation, the first one before any.
    history: Vec<Vec<Cell>>,
    /// The transaction of each installation.
    txs: Vec<TxNo>,
    /// Installations acknowledged.
    acked: usize,
    /// In which each lock is held now.
    tenures: [u64; 2],
}

fn owner(cell: usize) -> LockId {
    LOCKS[cell / EACH as usize]
}

/// One random operation of the lock's owner.
fn operate(j: &Journal, m: &mut Model, lock: usize, rng: &mut Rng) {
    let tenure = m.tenures[lock];
    let mut op = Install::default();
    let mut freed = Vec::new();
    let durable = j.durable();
    for _ in 0..1 + rng.below(3) {
        let i = lock * EACH as usize + rng.below(EACH) as usize;
        let block = FIRST + i as u64;
        if freed.contains(&i) || op.changes.iter().any(|c| c.block == block) {
            continue;
        }
        let at = 64 + rng.below(1000) as usize;
        let text: Vec<u8> = (0..rng.below(3000) / (1 + rng.below(40)) + 1).map(|_| rng.below(256) as u8).collect();
        match (m.cells[i].clone(), rng.below(6)) {
            (Cell::Meta(_) | Cell::Data(_), 0) => {
                if matches!(m.cells[i], Cell::Meta(_)) {
                    op.revokes.push((block, 1));
                }
                m.cells[i] = Cell::Free;
                freed.push(i);
            }
            (Cell::Meta(old), _) => {
                let new = edit(&old, at, &text);
                op.changes.push(change(block, owner(i), tenure, new.clone(), Some(old)));
                m.cells[i] = Cell::Meta(new);
            }
            (Cell::Free, n) if m.freed[i] <= durable => {
                if n < 3 {
                    let byte = rng.below(256) as u8;
                    op.data.push(data(block, byte, true));
                    m.cells[i] = Cell::Data(byte);
                } else {
                    let new = content(owner(i), block, at, &text);
                    op.changes.push(change(block, owner(i), tenure, new.clone(), None));
                    m.cells[i] = Cell::Meta(new);
                }
            }
            _ => {}
        }
    }
    let tx = j.install(op);
    for i in freed {
        m.freed[i] = tx;
    }
    m.txs.push(tx);
    m.history.push(m.cells.clone());
}

fn acknowledge(m: &mut Model, durable: TxNo) {
    m.acked = m.acked.max(m.txs.iter().take_while(|t| **t <= durable).count());
}

async fn live(j: Arc<Journal>, model: Arc<Mutex<Model>>, lock: usize, mut rng: Rng) {
    loop {
        if j.throttle().await.is_err() {
            return;
        }
        operate(&j, &mut model.lock(), lock, &mut rng);
        let ok = match rng.below(12) {
            0..5 => j.commit().await.map(|durable| acknowledge(&mut model.lock(), durable)),
            // Given up and acquired again: from here on nothing of the former tenure is replayed (I5).
            5 => j.settle(LOCKS[lock]).await.map(|()| model.lock().tenures[lock] += 1),
            6 => j.checkpoint().await,
            7 => {
                sleep(Duration::from_millis(rng.below(4))).await;
                Ok(())
            }
            _ => Ok(()),
        };
        if ok.is_err() {
            return;
        }
    }
}

fn matches(disk: &Arc<SimDisk>, state: &[Cell]) -> bool {
    state.iter().enumerate().all(|(i, cell)| {
        let block = FIRST + i as u64;
        match cell {
            Cell::Free => true,
            Cell::Data(byte) => disk.read_raw(block * 4096, 4096) == [*byte; 4096],
            Cell::Meta(b) => placed(disk, block, owner(i)).is_some_and(|got| got == b[64..]),
        }
    })
}

async fn run(seed: u64, sector_size: u32) {
    let disk = SimDisk::new(SimConfig { sector_size, split_writes: true, ..SimConfig::new(8 * MIB, seed) });
    disk.write_raw(REGION.offset, &initial_header(REGION));
    let mut rng = Rng(seed * 7919 + 12345);
    let mut cells = vec![Cell::Free; 2 * EACH as usize];
    for incarnation in 1..=4u32 {
        let tenures = [u64::from(incarnation) * 1_000_000; 2];
        let (_, j) = open(&disk, incarnation).await;
        let (freed, history) = (vec![0; cells.len()], vec![cells.clone()]);
        let model = Arc::new(Mutex::new(Model { cells, freed, history, txs: Vec::new(), acked: 0, tenures }));
        let actors: Vec<_> = (0..2)
            .map(|lock| {
                let rng = Rng(rng.below(u64::MAX) | 1);
                tokio::spawn(live(j.clone(), model.clone(), lock, rng))
            })
            .collect();
        let life = if rng.below(4) == 0 { 3000 } else { 200 };
        sleep(Duration::from_millis(rng.below(life))).await;
        match rng.below(2) {
            // The power stays: what the device has in its cache, the recoverer sees, and loses with the power.
            0 => disk.crash_all(),
            _ => lights_out(&disk),
        }
        actors.iter().for_each(|a| a.abort());
        let tenures = model.lock().tenures;
        let held = Held::of(&[(A, tenures[0]), (B, tenures[1])]);
        for _ in 0..rng.below(3) {
            // A recoverer that dies on its way, and the power with it.
            let dev: Arc<dyn BlockDevice> = disk.open("dying");
            let h = held.clone();
            let dying = tokio::spawn(async move { replay(&dev, REGION, node(incarnation), &h).await });
            sleep(Duration::from_millis(rng.below(12))).await;
            lights_out(&disk);
            dying.abort();
        }
        let report = recover(&disk, incarnation, &held).await;
        assert!(report.is_ok(), "seed {seed} incarnation {incarnation}: {report:?}");
        disk.power_loss();
        let again = recover(&disk, incarnation, &held).await.unwrap();
        assert_eq!(again.blocks_written, 0, "seed {seed}: replay is idempotent and flushed what it wrote");
        let m = model.lock();
        let state = (m.acked..m.history.len()).find(|i| matches(&disk, &m.history[*i]));
        let Some(state) = state else {
            let older = (0..m.acked).rev().find(|i| matches(&disk, &m.history[*i]));
            panic!(
                "I11: seed {seed} incarnation {incarnation}: {} acknowledged of {}, found {older:?}; {report:?}",
                m.acked,
                m.history.len() - 1
            );
        };
        cells = m.history[state].clone();
    }
}

#[tokio::test(start_paused = true)]
async fn a_power_loss_at_any_moment_leaves_the_state_after_some_installation() {
    for seed in 1..=60 {
        run(seed, 512).await;
    }
    for seed in 1000..1010 {
        run(seed, 4096).await;
    }
}

/// The newest record may have arrived without having been flushed, and go with the power while its replay is half done (I2).
#[tokio::test(start_paused = true)]
async fn replay_makes_the_records_durable_before_it_places_anything() {
    for (seed, at_flush) in (1..=60).flat_map(|s| [(s, 1), (s, 2)]) {
        let disk = disk(seed);
        let (dev, j) = open(&disk, 1).await;
        let old = content(A, FIRST, 64, &[b'o'; 4000]);
        j.install(changes(vec![change(FIRST, A, 5, old.clone(), None)]));
        j.settle(A).await.unwrap();
        let new = edit(&old, 64, &[b'n'; 4000]);
        j.install(changes(vec![change(FIRST, A, 6, new.clone(), Some(old.clone()))]));
        // The first one is for the lock, the second for the record.
        dev.crash_at_kind(OpKind::Flush, 2);
        let commit = tokio::spawn(async move { j.commit().await.map(drop) });
        sleep(Duration::from_millis(100)).await;
        disk.crash_all();
        commit.abort();
        let held = Held::of(&[(A, 6)]);
        let dying = disk.open("dying");
        dying.crash_at_kind(OpKind::Flush, at_flush);
        let (h, dev) = (held.clone(), dying as Arc<dyn BlockDevice>);
        let dying = tokio::spawn(async move { replay(&dev, REGION, node(1), &h).await });
        sleep(Duration::from_millis(100)).await;
        lights_out(&disk);
        dying.abort();
        let report = recover(&disk, 1, &held).await;
        assert!(report.is_ok(), "seed {seed}: {report:?}");
        let got = placed(&disk, FIRST, A);
        let whole = got.as_deref() == Some(&old[64..]) || got.as_deref() == Some(&new[64..]);
        assert!(whole, "seed {seed}: a block is torn for good; {report:?}");
    }
}

/// Where the 60 records of one sector each end that the test below writes.
const RECORDS_END: u64 = REGION.offset + 8192 + 60 * 512;

/// Random damage to the region: an error, or a log without its newest records where these are damaged; never a panic, and
/// never a block that does not verify.
#[tokio::test(start_paused = true)]
async fn a_damaged_region_is_survived() {
    let disk = disk(5);
    let (_, j) = open(&disk, 1).await;
    let mut last = content(A, FIRST, 64, b"start");
    j.install(changes(vec![change(FIRST, A, 5, last.clone(), None)]));
    for n in 0..60usize {
        let new = edit(&last, 64 + n * 7, b"changed");
        j.install(changes(vec![change(FIRST, A, 5, new.clone(), Some(last))]));
        last = new;
        j.commit().await.unwrap();
    }
    lights_out(&disk);
    let image = disk.snapshot();
    let (newest_record, headers) = (disk.read_raw(RECORDS_END - 512, 512), disk.read_raw(REGION.offset, 8192));
    assert_eq!(newest_record[..4], *b"CLJR");
    let mut rng = Rng(99);
    for round in 0..300 {
        let disk = SimDisk::from_snapshot(SimConfig::new(8 * MIB, round), &image);
        for _ in 0..1 + rng.below(4) {
            let at = REGION.offset + if rng.below(3) == 0 { rng.below(8192) } else { 8192 + rng.below(60 * 512) };
            let bytes: Vec<u8> = (0..1 + rng.below(64)).map(|_| rng.below(256) as u8).collect();
            disk.write_raw(at, &bytes);
        }
        let newest = RECORDS_END - 512;
        let whole = disk.read_raw(newest, 512) == newest_record && disk.read_raw(REGION.offset, 8192) == headers;
        let report = recover(&disk, 1, &Held::of(&[(A, 5)])).await;
        let got = placed(&disk, FIRST, A);
        if whole && report.is_ok() {
            assert!(
                got.as_deref() == Some(&last[64..]),
                "round {round}: the newest record is whole, an earlier one was left out"
            );
        }
        assert!(report.is_err() || report.unwrap().blocks_written == usize::from(got.is_some()), "round {round}");
        let dev: Arc<dyn BlockDevice> = disk.open("next");
        let _ = Journal::open(dev, REGION, node(2)).await;
    }
}
