//! `clusterfs info`: the superblock and the layout that follows from it. The key of the hints is left out: who may
//! read this output need not be allowed to read the device.

use std::fmt::Write;
use std::path::Path;

use fs_core::format::layout::{BLOCK, VolumeLayout};
use fs_core::format::superblock::{Superblock, VERSION};
use mkfs::{Bytes, uuid_text};
use serde::Serialize;

use crate::Error;
use crate::volume::{self, Source};

#[derive(Serialize)]
struct Info<'a> {
    device: String,
    from_copy: bool,
    format_version: u32,
    compat: u64,
    incompat: u64,
    ro_compat: u64,
    uuid: String,
    label: &'a str,
    created: u64,
    size: u64,
    sector_size: u32,
    block_size: u64,
    nodes: u16,
    journal_size: u64,
    groups: u32,
    group_size: u64,
    bitmap_blocks: u16,
    domains: u32,
    /// Bytes to which it can grow, and how often it has grown.
    max_size: u64,
    generation: u64,
    timeouts_ms: Timeouts,
    areas: Vec<Area>,
}

#[derive(Serialize)]
struct Timeouts {
    heartbeat: u32,
    lease: u32,
    queue: u32,
    min_hold: u32,
    doorbell: u32,
}

#[derive(Serialize)]
struct Area {
    name: &'static str,
    offset: u64,
    len: u64,
}

fn areas(l: &VolumeLayout) -> Vec<Area> {
    let [near, last] = l.superblock_copies();
    let starts = [
        ("superblock", 0),
        ("superblock copy", near),
        ("cluster records", l.cluster_start),
        ("lock blocks", l.locks_start),
        ("journals", l.journals_start),
        ("groups", l.groups_start),
        ("superblock copy", last),
    ];
    let ends = starts.iter().skip(1).map(|(_, start)| *start).chain([l.blocks]);
    starts
        .iter()
        .zip(ends)
        .map(|((name, start), end)| Area { name, offset: start * BLOCK, len: end.saturating_sub(*start) * BLOCK })
        .collect()
}

fn info<'a>(device: &Path, sb: &'a Superblock, source: Source) -> Info<'a> {
    let t = &sb.timeouts;
    Info {
        device: device.display().to_string(),
        from_copy: source == Source::Copy,
        format_version: VERSION,
        compat: sb.compat,
        incompat: sb.incompat,
        ro_compat: sb.ro_compat,
        uuid: uuid_text(&sb.uuid),
        label: &sb.label,
        created: sb.created,
        size: sb.blocks * BLOCK,
        sector_size: sb.sector_size,
        block_size: BLOCK,
        nodes: sb.nodes,
        journal_size: sb.journal_blocks * BLOCK,
        groups: sb.groups,
        group_size: u64::from(sb.group_blocks) * BLOCK,
        bitmap_blocks: sb.bitmap_blocks,
        domains: sb.layout().domains(),
        max_size: sb.layout().max_blocks() * BLOCK,
        generation: sb.generation,
        timeouts_ms: Timeouts {
            heartbeat: t.heartbeat_ms,
            lease: t.lease_ms,
            queue: t.queue_ms,
            min_hold: t.min_hold_ms,
            doorbell: t.doorbell_ms,
        },
        areas: areas(&sb.layout()),
    }
}

pub async fn run(device: &Path, json: bool) -> Result<String, Error> {
    let v = volume::open(device).await?;
    let i = info(device, &v.superblock, v.source);
    if json {
        return Ok(serde_json::to_string_pretty(&i)? + "\n");
    }
    Ok(text(&i)?)
}

fn text(i: &Info<'_>) -> Result<String, std::fmt::Error> {
    let mut s = String::new();
    if i.from_copy {
        writeln!(s, "The first superblock cannot be used; this is its copy. Run fsck.clusterfs.")?;
    }
    writeln!(s, "device:         {}", i.device)?;
    writeln!(s, "UUID:           {}", i.uuid)?;
    writeln!(s, "label:          {}", if i.label.is_empty() { "(none)" } else { i.label })?;
    writeln!(s, "format version: {}", i.format_version)?;
    let (c, ic, ro) = (i.compat, i.incompat, i.ro_compat);
    writeln!(s, "features:       compatible {c:#x}, incompatible {ic:#x}, read-only-compatible {ro:#x}")?;
    writeln!(s, "created:        {} (seconds since 1970)", i.created)?;
    writeln!(s, "size:           {} ({} bytes)", Bytes(i.size), i.size)?;
    writeln!(s, "sector size:    {}", i.sector_size)?;
    writeln!(s, "nodes:          {}", i.nodes)?;
    writeln!(s, "journals:       {} of {}", i.nodes, Bytes(i.journal_size))?;
    writeln!(s, "groups:         {} of {}, {} bitmap blocks each", i.groups, Bytes(i.group_size), i.bitmap_blocks)?;
    writeln!(s, "domains:        {}", i.domains)?;
    let grown = match i.generation {
        0 => String::new(),
        1 => ", has grown once".into(),
        n => format!(", has grown {n} times"),
    };
    writeln!(s, "can grow to:    {} ({} bytes){grown}", Bytes(i.max_size), i.max_size)?;
    let t = &i.timeouts_ms;
    writeln!(
        s,
        "timeouts in ms: heartbeat {}, lease {}, queue {}, minimum hold {}, doorbell {}",
        t.heartbeat, t.lease, t.queue, t.min_hold, t.doorbell
    )?;
    writeln!(s, "areas:")?;
    for a in &i.areas {
        writeln!(s, "  {:<16} at {:>16}, {}", a.name, a.offset, Bytes(a.len))?;
    }
    Ok(s)
}
