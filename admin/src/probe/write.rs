//! The checks that write, in a stretch of zeros that is put back, on several connections at once.
//!
//! All connections register first, as programs of clusterfs: then nobody else writes, a second probe, `mkfs` and nodes see us,
//! and what was found blank before is looked at once more.

use std::sync::Arc;
use std::time::Duration;

use blockdev::open::TOOL_SLOT;
use blockdev::{AlignedBuf, BlockDevice, Caw, DevError, FenceKey, Fenced, IoClass, Presence, Registrations};
use mkfs::signature;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::fences;
use super::report::{Finding, Level};
use super::scratch::LEN;

/// Increments of each connection.
const EACH: u64 = 200;
/// How long they race at most.
const LIMIT: Duration = Duration::from_secs(10);
const DURABLE_WRITES: usize = 16;

type Dev = Arc<dyn BlockDevice>;
type Outcome<T> = Result<T, String>;

/// What the checks found. `devices`: connections to the same device, `place`: of [`LEN`] zeros on it.
/// `one_path`: to the device they are one.
pub async fn check(devices: &[Dev], place: u64, one_path: bool) -> Vec<Finding> {
    let keys = keys(if one_path { 1 } else { registering(devices) });
    check_with(devices, &keys, place).await
}

/// ... the first of which register with these keys.
pub async fn check_with(devices: &[Dev], keys: &[FenceKey], place: u64) -> Vec<Finding> {
    let first = &devices[0];
    let mut found = Vec::new();
    if let Err(why) = register(devices, keys).await {
        // A device without reservations refuses because of somebody else's, which says nothing about the device.
        let check = if fences(first.as_ref()) { "registering" } else { "scratch" };
        found.push(Finding::new(check, Level::Fail, why));
    } else if let Err(why) = look_again(devices, keys.len(), place).await {
        found.push(Finding::new("scratch", Level::Fail, why));
    } else {
        // Each says by its name what was wrong; later ones are worth knowing all the same.
        found.push(match race(devices, place).await {
            Ok((level, text)) => Finding::new("compare-and-write race", level, text),
            Err(text) => Finding::new("compare-and-write race", Level::Fail, text),
        });
        let sector = u64::from(first.geometry().sector_size);
        found.push(finding("miscompare", miscompare(first, place + sector).await));
        found.push(finding("durable writes", durable(devices, place + LEN / 2).await));
        if fences(first.as_ref()) && keys.len() < devices.len() {
            let why = "not tried: this host has one registration. Two hosts, or two paths that are not one device, would show it";
            found.push(Finding::new("fencing", Level::Note, why));
        } else if fences(first.as_ref()) {
            found.push(finding("fencing", fence(devices, keys, place + LEN / 2).await));
        }
        found.push(finding("put back", put_back(first, place).await));
    }
    if let Err(why) = end(devices).await {
        found.push(Finding::new("registrations put back", Level::Fail, why));
    }
    found
}

fn finding(check: &'static str, outcome: Outcome<String>) -> Finding {
    match outcome {
        Ok(text) => Finding::new(check, Level::Ok, text),
        Err(text) => Finding::new(check, Level::Fail, text),
    }
}

fn text(e: DevError) -> String {
    match e {
        DevError::Fenced => "writes of this host are refused: another program has taken the device".into(),
        // Of no place on the device: the reason alone is the sentence.
        DevError::Io { source, len: 0, .. } => source.to_string(),
        e => e.to_string(),
    }
}

/// One per connection; the number makes two probes at once tell each other apart.
pub fn keys(count: usize) -> Vec<FenceKey> {
    let first: u32 = rand::random();
    (0..count as u32).map(|i| FenceKey { slot: TOOL_SLOT, incarnation: first.wrapping_add(i) }).collect()
}

/// On an image file the registration is one of the host's locks, which only one can have.
fn registering(devices: &[Dev]) -> usize {
    if fences(devices[0].as_ref()) { devices.len() } else { 1 }
}

/// Keeps everybody else off.
async fn register(devices: &[Dev], keys: &[FenceKey]) -> Outcome<()> {
    for (dev, key) in devices.iter().zip(keys) {
        dev.register(*key).await.map_err(text)?;
    }
    Ok(())
}

/// Whether the device is as it was before we registered.
async fn look_again(devices: &[Dev], registered: usize, place: u64) -> Outcome<()> {
    let first = &devices[0];
    if let Some(r) = first.registrations().await.map_err(text)?
        && (!r.nodes.is_empty() || !r.foreign.is_empty() || r.tools != registered)
    {
        return Err("others have registered with the device meanwhile: nothing is written".into());
    }
    if !signature::probe(first.as_ref()).await.map_err(text)?.is_empty() || !blank(first, place).await? {
        return Err("the device has been written to meanwhile: nothing is written".into());
    }
    Ok(())
}

async fn blank(dev: &Dev, place: u64) -> Outcome<bool> {
    let bytes = dev.read(IoClass::Data, place, LEN as usize).await.map_err(text)?;
    Ok(bytes.iter().all(|b| *b == 0))
}

/// What the sector of the race says: how often each connection has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts(Vec<u64>);

impl Counts {
    /// The counts, their sum, and then words that follow from the sum: a sector of which parts are of two writes shows.
    fn encode(&self, sector: usize) -> Vec<u8> {
        let sum: u64 = self.0.iter().sum();
        let words = sector / 8;
        let head = self.0.iter().copied().chain([sum]);
        let fill = (0..words as u64).map(|i| if sum == 0 { 0 } else { sum.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i });
        head.chain(fill).take(words).flat_map(u64::to_le_bytes).collect()
    }

    fn decode(bytes: &[u8], connections: usize) -> Outcome<Self> {
        let words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
        let counts = Self(words.take(connections).collect());
        if counts.encode(bytes.len()) == bytes {
            Ok(counts)
        } else {
            Err("a sector holds parts of two writes: the device does not write sectors whole".into())
        }
    }
}

/// Each connection counts up in one sector. Every count that was acknowledged is there in the end, and no other.
async fn race(devices: &[Dev], offset: u64) -> Outcome<(Level, String)> {
    let started = Instant::now();
    let mut racers = JoinSet::new();
    for (me, dev) in devices.iter().cloned().enumerate() {
        let all = devices.len();
        racers.spawn(async move { (me, count_up(&dev, me, all, offset, started + LIMIT).await) });
    }
    let mut counted = vec![0; devices.len()];
    let mut misses = 0;
    let mut failed = None;
    while let Some(one) = racers.join_next().await {
        match one.map_err(|e| e.to_string())? {
            (me, Ok((count, missed))) => {
                counted[me] = count;
                misses += missed;
            }
            (_, Err(why)) => failed = Some(why),
        }
    }
    if let Some(why) = failed {
        return Err(why);
    }
    let took = started.elapsed();
    let last = &devices[devices.len() - 1];
    let bytes = last.read(IoClass::Lock, offset, sector(last)).await.map_err(text)?;
    let there = Counts::decode(&bytes, devices.len())?;
    if there.0 != counted {
        return Err(format!(
            "{counted:?} were acknowledged to the connections, {:?} are there: it is not atomic",
            there.0
        ));
    }
    let total: u64 = counted.iter().sum();
    if misses == 0 {
        return Ok((Level::Warn, format!("{total} in {took:.1?}, but the connections never met: nothing is shown")));
    }
    let all = devices.len();
    let text = format!("{total} increments by {all} connections, each counted once; {misses} miscompares, {took:.1?}");
    Ok((Level::Ok, text))
}

fn sector(dev: &Dev) -> usize {
    dev.geometry().sector_size as usize
}

/// How often this connection has counted, and how often another one was faster.
async fn count_up(dev: &Dev, me: usize, all: usize, offset: u64, end: Instant) -> Outcome<(u64, u64)> {
    let len = sector(dev);
    let mut old = Counts(vec![0; all]);
    let (mut own, mut misses) = (0, 0);
    while own < EACH && Instant::now() < end {
        let mut new = old.clone();
        new.0[me] += 1;
        let found = match dev.compare_and_write(offset, &old.encode(len), &new.encode(len)).await {
            Ok(Caw::Written) => {
                own += 1;
                old = new;
                continue;
            }
            Ok(Caw::Mismatch(found)) => {
                misses += 1;
                found
            }
            // Done or not: what is there tells.
            Err(DevError::Unknown { .. }) => {
                let found = dev.read(IoClass::Lock, offset, len).await.map_err(text)?.to_vec();
                own += u64::from(Counts::decode(&found, all)?.0[me] > own);
                found
            }
            Err(e) => return Err(text(e)),
        };
        old = Counts::decode(&found, all)?;
        if old.0[me] != own {
            return Err(format!("{own} were acknowledged to a connection, {} are there: it is not atomic", old.0[me]));
        }
    }
    Ok((own, misses))
}

/// One that does not fit in its last byte alone changes nothing and shows what is there; one that fits changes its sector alone.
async fn miscompare(dev: &Dev, offset: u64) -> Outcome<String> {
    let len = sector(dev);
    let write = |byte: u8| Arc::new(AlignedBuf::copy_of(&vec![byte; 3 * len]));
    dev.write(IoClass::Data, offset, write(1), true).await.map_err(text)?;
    let middle = offset + len as u64;
    let mut almost = vec![1; len];
    almost[len - 1] = 2;
    match dev.compare_and_write(middle, &almost, &vec![3; len]).await.map_err(text)? {
        Caw::Written => return Err("a sector that differs in its last byte was taken for equal".into()),
        Caw::Mismatch(found) if found != vec![1; len] => {
            return Err("what it shows after a miscompare is not what is there".into());
        }
        Caw::Mismatch(_) => {}
    }
    let expect = async |bytes: Vec<u8>, wrong: &str| {
        let there = dev.read(IoClass::Data, offset, 3 * len).await.map_err(text)?;
        if there[..] == bytes[..] { Ok(()) } else { Err(wrong.to_string()) }
    };
    expect(vec![1; 3 * len], "a compare-and-write that did not fit has changed something").await?;
    if dev.compare_and_write(middle, &vec![1; len], &vec![3; len]).await.map_err(text)? != Caw::Written {
        return Err("a sector that is equal was taken for another".into());
    }
    let after = [vec![1; len], vec![3; len], vec![1; len]].concat();
    expect(after, "a compare-and-write has changed something else than its sector").await?;
    Ok("answered rightly, nothing beside the sector changed".into())
}

/// Writes with FUA and writes before a flush are accepted, and other connections see them.
async fn durable(devices: &[Dev], offset: u64) -> Outcome<String> {
    let (writer, reader) = (&devices[0], &devices[devices.len() - 1]);
    let len = 4096;
    let mut times = Vec::new();
    for i in 0..DURABLE_WRITES {
        let byte = i as u8 + 1;
        let fua = i % 2 == 0;
        let started = Instant::now();
        let buf = Arc::new(AlignedBuf::copy_of(&vec![byte; len]));
        writer.write(IoClass::Data, offset, buf, fua).await.map_err(text)?;
        if !fua {
            writer.flush(IoClass::Data).await.map_err(text)?;
        }
        times.push(started.elapsed());
        let there = reader.read(IoClass::Data, offset, len).await.map_err(text)?;
        if there.iter().any(|b| *b != byte) {
            return Err("another connection does not see what was acknowledged as durable".into());
        }
    }
    times.sort();
    Ok(format!(
        "accepted by FUA and by flush, half of them within {:.1?}, seen by other connections",
        times[times.len() / 2]
    ))
}

/// One is fenced: its writes are refused, and nobody else's.
async fn fence(devices: &[Dev], keys: &[FenceKey], offset: u64) -> Outcome<String> {
    let (first, victim, others) = (&devices[0], &devices[1], &devices[2..]);
    let write = async |dev: &Dev, byte: u8| {
        dev.write(IoClass::Data, offset, Arc::new(AlignedBuf::copy_of(&vec![byte; 4096])), true).await
    };
    let there = async || Ok::<_, String>(first.read(IoClass::Data, offset, 4096).await.map_err(text)?[0]);
    write(victim, 1).await.map_err(|e| format!("a registered connection cannot write: {}", text(e)))?;
    if first.fence(keys[1]).await.map_err(text)? != Fenced::Done {
        return Err("the device says that it has reservations, and fences nobody".into());
    }
    match write(victim, 2).await {
        Err(DevError::Fenced) => {}
        Ok(()) => return Err("a connection that was fenced can still write".into()),
        Err(e) => return Err(format!("a connection that was fenced: {e}")),
    }
    if there().await? != 1 {
        return Err("a write that was refused was done".into());
    }
    if first.presence(keys[1]).await.map_err(text)? == Presence::Present {
        return Err("the registration that was preempted is still there".into());
    }
    // What the device cannot tell of a registration, the write does.
    for (dev, key) in others.iter().zip(&keys[2..]) {
        let harmed = "removing one registration harmed another: the wrong node would be fenced";
        if first.presence(*key).await.map_err(text)? == Presence::Gone {
            return Err(harmed.into());
        }
        write(dev, 3).await.map_err(|e| format!("{harmed} ({e})"))?;
    }
    write(first, 4).await.map_err(text)?;
    Ok("a preempted connection cannot write, the others can".into())
}

async fn put_back(dev: &Dev, place: u64) -> Outcome<String> {
    let zeros = Arc::new(AlignedBuf::zeroed(LEN as usize));
    dev.write(IoClass::Data, place, zeros, true).await.map_err(text)?;
    dev.flush(IoClass::Data).await.map_err(text)?;
    if blank(dev, place).await? {
        Ok(format!("{} KiB at offset {place} are zeros again", LEN >> 10))
    } else {
        Err(format!("{} KiB at offset {place} do not read back as the zeros they were", LEN >> 10))
    }
}

/// Takes all registrations back. The first one's goes last, as it can remove what others could not.
async fn end(devices: &[Dev]) -> Outcome<()> {
    let first = &devices[0];
    let mut failed = None;
    for dev in devices.iter().skip(1).rev() {
        if let Err(e) = dev.unregister().await {
            failed = Some(text(e));
        }
    }
    first.unregister().await.map_err(text)?;
    match first.registrations().await.map_err(text)? {
        Some(left) if left != Registrations::default() => {
            let why = failed.map(|e| format!(" ({e})")).unwrap_or_default();
            let kind = left.reservation.unwrap_or("no reservation");
            let keys = left.tools + left.nodes.len() + left.foreign.len();
            Err(format!("{keys} registrations and {kind} are left on the device{why}"))
        }
        _ => Ok(()),
    }
}
