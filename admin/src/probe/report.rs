//! The findings of a probe, one line each, and the verdict that follows from them.

use std::fmt::Write;

use blockdev::{Abilities, BlockDevice};
use mkfs::Bytes;
use serde::Serialize;

use super::kernel::Queue;
use super::{Kind, fences};

/// How a finding bears on the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// For information.
    Note,
    Ok,
    /// It works, but worse than it could.
    Warn,
    /// Not fit.
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub level: Level,
    pub text: String,
}

impl Finding {
    pub fn new(check: &'static str, level: Level, text: impl Into<String>) -> Self {
        Self { check, level, text: text.into() }
    }
}

/// How fast the device reads.
#[derive(Clone, Debug, Serialize)]
pub struct Reads {
    /// Of 4 KiB, one at a time.
    pub count: usize,
    pub p50_us: u64,
    pub p99_us: u64,
    pub per_second_1: u64,
    /// With 32 in flight.
    pub per_second_32: u64,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub device: String,
    pub kind: &'static str,
    pub product: Option<String>,
    pub size: u64,
    pub sector_size: u32,
    pub write_cache: bool,
    /// null: not known.
    pub fua: Option<bool>,
    /// Blocks that COMPARE AND WRITE is announced for; null: not a SCSI disk of ours.
    pub announced_compare_and_write: Option<u8>,
    pub compare_and_write: Option<bool>,
    pub reservations: Option<bool>,
    pub reservations_persist: Option<bool>,
    pub unmap: Option<bool>,
    /// Bytes; null: no limit is announced.
    pub max_transfer: Option<u64>,
    pub kernel: Option<Queue>,
    pub reads: Option<Reads>,
    pub findings: Vec<Finding>,
    /// Whether writes were checked.
    pub written: bool,
    pub fit: bool,
    pub verdict: String,
    #[serde(skip)]
    of: Kind,
    #[serde(skip)]
    fences: bool,
}

impl Report {
    pub fn new(device: String, of: Kind, dev: &dyn BlockDevice) -> Self {
        let g = dev.geometry();
        let told: Option<Abilities> = dev.abilities();
        let told = told.as_ref();
        Self {
            device,
            kind: match of {
                Kind::Iscsi => "iscsi",
                Kind::BlockDevice => "block device",
                Kind::Image => "image file",
            },
            product: told.map(|a| a.product.clone()),
            size: g.size,
            sector_size: g.sector_size,
            write_cache: g.write_cache,
            fua: told.map(|a| a.fua),
            announced_compare_and_write: told.map(|a| a.announced_compare_and_write),
            compare_and_write: told.map(|a| a.compare_and_write),
            reservations: told.map(|a| a.reservations),
            reservations_persist: told.map(|a| a.persists),
            unmap: told.map(|a| a.unmap),
            max_transfer: told.map(|a| a.max_transfer).filter(|n| *n > 0),
            kernel: None,
            reads: None,
            findings: Vec::new(),
            written: false,
            fit: false,
            verdict: String::new(),
            of,
            fences: fences(dev),
        }
    }

    pub fn of(&self) -> Kind {
        self.of
    }

    pub fn push(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    pub fn add(&mut self, check: &'static str, level: Level, text: impl Into<String>) {
        self.push(Finding::new(check, level, text));
    }

    /// Whether nothing speaks against it so far.
    pub fn fit(&self) -> bool {
        self.findings.iter().all(|f| f.level != Level::Fail)
    }

    /// The verdict. `asked`: writes were to be checked.
    pub fn conclude(&mut self, asked: bool) {
        self.fit = self.fit();
        self.written = asked && self.findings.iter().any(|f| f.check == "compare-and-write race");
        let failed: Vec<&str> = self.findings.iter().filter(|f| f.level == Level::Fail).map(|f| f.check).collect();
        let who = match (self.of, self.compare_and_write.is_some(), self.fences) {
            (_, true, true) => "for several hosts; a dead node is fenced",
            (_, true, false) => "for several hosts; nothing fences a dead node, it is waited out",
            (Kind::BlockDevice, false, _) => {
                "for one host with several mounts; for several hosts with mkfs.clusterfs --locks=plain"
            }
            (Kind::Image | Kind::Iscsi, false, _) => "for one host with several mounts",
        };
        self.verdict = if failed == ["scratch"] {
            format!("not tried, as nothing may be written; by what it says fit {who}")
        } else if !self.fit {
            format!("not fit: {}", failed.join(", "))
        } else if self.written {
            format!("fit {who}")
        } else {
            format!("fit {who} (by what it says: --write tries it)")
        };
    }

    pub fn text(&self) -> String {
        let mut s = String::new();
        // A string takes whatever is written to it.
        let _ = self.lines(&mut s);
        s
    }

    fn lines(&self, s: &mut String) -> std::fmt::Result {
        let product = self.product.as_deref().filter(|p| !p.is_empty()).map(|p| format!(" ({p})")).unwrap_or_default();
        writeln!(s, "{}: {}{product}", self.device, self.kind)?;
        writeln!(s, "size:         {} ({} bytes), sectors of {} bytes", Bytes(self.size), self.size, self.sector_size)?;
        let known = |b: Option<bool>| match b {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not known",
        };
        match &self.kernel {
            Some(q) => writeln!(
                s,
                "cache:        the kernel says {}, FUA {}; physical sectors of {} bytes, transfers up to {}",
                q.write_cache,
                known(q.fua),
                q.physical_sector,
                Bytes(q.max_transfer)
            )?,
            None if self.of == Kind::Image => {
                writeln!(s, "cache:        that of the filesystem that the image is on; flushed with fdatasync")?;
            }
            None => {
                let cache = if self.write_cache { "volatile" } else { "none that is volatile" };
                writeln!(s, "write cache:  {cache}; FUA: {}", known(self.fua))?;
            }
        }
        if let (Some(blocks), Some(works)) = (self.announced_compare_and_write, self.compare_and_write) {
            let works = if works { "" } else { ", but not usable" };
            match blocks {
                0 => writeln!(s, "COMPARE AND WRITE: not announced")?,
                n => writeln!(s, "COMPARE AND WRITE: announced, up to {n} blocks{works}")?,
            }
            let persist = if self.reservations_persist == Some(true) { ", can outlive a power loss" } else { "" };
            writeln!(s, "reservations: {}{persist}; UNMAP: {}", known(self.reservations), known(self.unmap))?;
            match self.max_transfer {
                Some(n) => writeln!(s, "transfers:    up to {}", Bytes(n))?,
                None => writeln!(s, "transfers:    no limit announced")?,
            }
        }
        if let Some(r) = &self.reads {
            writeln!(
                s,
                "reads of 4 KiB: p50 {:.2} ms, p99 {:.2} ms; {} a second, {} with 32 in flight",
                r.p50_us as f64 / 1000.0,
                r.p99_us as f64 / 1000.0,
                r.per_second_1,
                r.per_second_32
            )?;
        }
        for f in &self.findings {
            let mark = match f.level {
                Level::Note => "note",
                Level::Ok => "ok",
                Level::Warn => "WARN",
                Level::Fail => "FAIL",
            };
            writeln!(s, "{mark:<5} {}: {}", f.check, f.text)?;
        }
        writeln!(s, "verdict: {}", self.verdict)
    }
}
