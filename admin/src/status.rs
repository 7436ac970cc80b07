//! `clusterfs status`: who uses a volume. Everything comes from the device, so it works on every host that sees it.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use blockdev::{BlockDevice, IoClass, Registrations};
use cluster::{LastEnd, LockBlock, LockId, SlotInfo, SlotState};
use fs_core::format::layout::{BLOCK, VolumeLayout};
use fs_core::format::superblock::VERSION;
use mkfs::{Bytes, uuid_text};
use serde::Serialize;

use crate::Error;
use crate::volume::{self, Source};

#[derive(Serialize)]
struct Status {
    device: String,
    uuid: String,
    label: String,
    format_version: u32,
    size: u64,
    /// Bytes of the device, and to how many the volume can grow.
    device_size: u64,
    max_size: u64,
    /// Free bytes, as the groups' holders noted when they last gave them up.
    free_noted: u64,
    superblock_damaged: bool,
    slots: Vec<SlotStatus>,
    /// Who may write to a device with persistent reservations; null: it has none.
    registrations: Option<RegistrationStatus>,
}

#[derive(Serialize)]
struct RegistrationStatus {
    /// Type of the reservation in force.
    reservation: Option<&'static str>,
    nodes: Vec<RegisteredNode>,
    /// Registrations of mkfs and fsck.
    tools: usize,
    /// Keys of other programs.
    foreign: Vec<String>,
}

#[derive(Serialize)]
struct RegisteredNode {
    slot: u16,
    incarnation: u32,
}

#[derive(Serialize)]
struct SlotStatus {
    slot: u16,
    /// free, live, recovering, adopting, damaged.
    state: &'static str,
    incarnation: Option<u32>,
    host: Option<String>,
    address: Option<String>,
    /// Whether a node is there; null: could not be told.
    alive: Option<bool>,
    /// Counter of the last heartbeat.
    heartbeat: Option<u64>,
    /// How the slot's latest ended life ended: never, clean, crash.
    last_end: Option<&'static str>,
    /// Slot that recovers this one.
    recovered_by: Option<u16>,
    error: Option<String>,
}

pub async fn run(device: &Path, json: bool) -> Result<String, Error> {
    let v = volume::open(device).await?;
    let sb = &v.superblock;
    let l = sb.layout();
    // A node that lives writes its heartbeat at least once in this time.
    let watch = Duration::from_millis(u64::from(sb.timeouts.heartbeat_ms) * 5 / 2);
    let slots = cluster::read_slots(v.dev.as_ref(), &l.cluster(), watch).await?;
    let status = Status {
        device: device.display().to_string(),
        uuid: uuid_text(&sb.uuid),
        label: sb.label.clone(),
        format_version: VERSION,
        size: sb.blocks * BLOCK,
        device_size: v.dev.geometry().size,
        max_size: l.max_blocks() * BLOCK,
        free_noted: free_noted(v.dev.as_ref(), &l).await? * BLOCK,
        superblock_damaged: v.source == Source::Copy,
        slots: slots.iter().map(slot_status).collect(),
        registrations: v.dev.registrations().await?.map(registration_status),
    };
    if json {
        return Ok(serde_json::to_string_pretty(&status)? + "\n");
    }
    Ok(text(&status)?)
}

/// Sums the hints in the groups' lock blocks; a group that is held now may have less or more. Damaged ones count nothing.
async fn free_noted(dev: &dyn BlockDevice, l: &VolumeLayout) -> Result<u64, Error> {
    const PIECE: u64 = 2048;
    let c = l.cluster();
    let stride = usize::try_from(c.stride)?;
    let mut free = 0;
    for first in (0..u64::from(l.groups)).step_by(PIECE as usize) {
        let n = PIECE.min(u64::from(l.groups) - first);
        let piece = dev.read(IoClass::Lock, c.locks + first * c.stride, usize::try_from(n)? * stride).await?;
        for (sector, g) in piece.chunks(stride).zip(first..) {
            let Ok(g) = u32::try_from(g) else { break };
            if let Ok(block) = LockBlock::decode(sector, c.volume, LockId::Group(g)) {
                // With what the group has got since, when the volume grew.
                free += block.value.root + l.group_extent(g).len.saturating_sub(block.value.next_local);
            }
        }
    }
    Ok(free)
}

fn registration_status(r: Registrations) -> RegistrationStatus {
    let mut nodes: Vec<_> =
        r.nodes.iter().map(|k| RegisteredNode { slot: k.slot, incarnation: k.incarnation }).collect();
    nodes.sort_by_key(|n| (n.slot, n.incarnation));
    RegistrationStatus {
        reservation: r.reservation,
        nodes,
        tools: r.tools,
        foreign: r.foreign.iter().map(|key| format!("{key:#x}")).collect(),
    }
}

fn slot_status(info: &SlotInfo) -> SlotStatus {
    let mut s = SlotStatus {
        slot: info.slot,
        state: "damaged",
        incarnation: None,
        host: None,
        address: None,
        alive: info.alive,
        heartbeat: info.heartbeat,
        last_end: None,
        recovered_by: None,
        error: None,
    };
    let block = match &info.block {
        Ok(b) => b,
        Err(e) => {
            s.error = Some(e.to_string());
            return s;
        }
    };
    s.state = match block.state {
        SlotState::Free => "free",
        SlotState::Live => "live",
        SlotState::Recovering { by } => {
            s.recovered_by = Some(by.slot);
            "recovering"
        }
        SlotState::Adopting { .. } => "adopting",
    };
    s.incarnation = Some(block.incarnation);
    s.last_end = Some(match block.last_end() {
        LastEnd::Never => "never",
        LastEnd::Clean => "clean",
        LastEnd::Crash => "crash",
    });
    if block.state != SlotState::Free {
        s.host = Some(block.host_name.clone());
        s.address = (!block.address.is_empty()).then(|| String::from_utf8_lossy(&block.address).into_owned());
    }
    s
}

fn text(status: &Status) -> Result<String, std::fmt::Error> {
    let mut s = String::new();
    if status.superblock_damaged {
        writeln!(s, "The first superblock cannot be used: run fsck.clusterfs.")?;
    }
    let label = if status.label.is_empty() { "(no label)" } else { &status.label };
    writeln!(s, "{}: {label}, UUID {}, format {}", status.device, status.uuid, status.format_version)?;
    let live = status.slots.iter().filter(|x| x.alive == Some(true)).count();
    let (size, free) = (Bytes(status.size), Bytes(status.free_noted));
    writeln!(s, "{size}, about {free} free; {live} of {} nodes", status.slots.len())?;
    let possible = status.device_size.min(status.max_size);
    if possible > status.size {
        writeln!(s, "the device has {}: `clusterfs grow` lets the volume use it", Bytes(status.device_size))?;
    }
    let (mut free, mut rows) = (0, Vec::new());
    for x in &status.slots {
        if x.state == "free" {
            free += 1;
            continue;
        }
        let alive = match x.alive {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        let life = x.incarnation.map_or_else(|| "-".into(), |n| n.to_string());
        let beat = x.heartbeat.map_or_else(|| "-".into(), |n| n.to_string());
        let text = |t: &Option<String>| t.clone().filter(|t| !t.is_empty()).unwrap_or_else(|| "-".into());
        let state = match (x.state, x.alive, x.recovered_by) {
            ("live", Some(false), _) => "dead, to be recovered".to_owned(),
            (_, _, Some(by)) => format!("recovered by slot {by}"),
            (state, ..) => state.to_owned(),
        };
        rows.push([x.slot.to_string(), state, alive.into(), life, beat, text(&x.host), text(&x.address)]);
    }
    if !rows.is_empty() {
        table(&mut s, &["slot", "state", "alive", "life", "heartbeat", "host", "address"], &rows)?;
    }
    for (slot, e) in status.slots.iter().filter_map(|x| Some((x.slot, x.error.as_ref()?))) {
        writeln!(s, "slot {slot}: {e}")?;
    }
    writeln!(s, "free slots: {free}")?;
    if let Some(r) = &status.registrations {
        writeln!(s, "reservation: {}", r.reservation.unwrap_or("none"))?;
        let mut who: Vec<String> = r.nodes.iter().map(|n| format!("slot {} life {}", n.slot, n.incarnation)).collect();
        if r.tools > 0 {
            who.push(format!("{} of mkfs or fsck", r.tools));
        }
        who.extend(r.foreign.iter().map(|key| format!("{key} of another program")));
        writeln!(s, "registered: {}", if who.is_empty() { "nobody".into() } else { who.join(", ") })?;
    }
    Ok(s)
}

fn table(out: &mut String, head: &[&str; 7], rows: &[[String; 7]]) -> std::fmt::Result {
    let width = |i: usize| rows.iter().map(|r| r[i].len()).chain([head[i].len()]).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    let mut line = |cells: [&str; 7]| {
        let padded: Vec<String> = cells.iter().zip(widths).map(|(c, w)| format!("{c:<w$}")).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())
    };
    line(*head)?;
    rows.iter().try_for_each(|r| line(std::array::from_fn(|i| r[i].as_str())))
}
