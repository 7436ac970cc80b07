//! Commands that a device got: as a mount counts them itself, or as the kernel counts them for a loop device.

use std::path::Path;

use fuse_mount::report::{REPORT_XATTR, Report};

use crate::cluster::Result;

/// Commands and bytes; per operation once divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Io {
    pub reads: f64,
    pub writes: f64,
    pub flushes: f64,
    pub compare_and_writes: f64,
    pub bytes_read: f64,
    pub bytes_written: f64,
}

impl Io {
    fn with(self, other: &Io, f: impl Fn(f64, f64) -> f64) -> Io {
        Io {
            reads: f(self.reads, other.reads),
            writes: f(self.writes, other.writes),
            flushes: f(self.flushes, other.flushes),
            compare_and_writes: f(self.compare_and_writes, other.compare_and_writes),
            bytes_read: f(self.bytes_read, other.bytes_read),
            bytes_written: f(self.bytes_written, other.bytes_written),
        }
    }

    pub fn plus(self, other: &Io) -> Io {
        self.with(other, |a, b| a + b)
    }

    pub fn since(self, before: &Io) -> Io {
        self.with(before, |a, b| a - b)
    }

    pub fn per(self, count: f64) -> Io {
        self.with(&self, |a, _| a / count)
    }
}

/// Of the mount at `dir`, without what membership costs at rest.
pub fn of_mount(dir: &Path) -> Result<Io> {
    let report = crate::sys::xattr(dir, REPORT_XATTR)?;
    let io = serde_json::from_slice::<Report>(&report)?.device_io;
    Ok(Io {
        reads: io.reads as f64,
        writes: io.writes as f64,
        flushes: io.flushes as f64,
        compare_and_writes: io.compare_and_writes as f64,
        bytes_read: io.bytes_read as f64,
        bytes_written: io.bytes_written as f64,
    })
}

/// Of a block device, by its name under /sys/block.
pub fn of_block_device(name: &str) -> Result<Io> {
    let text = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
    parse(&text).ok_or_else(|| format!("/sys/block/{name}/stat is not understood: {text}").into())
}

/// Reads at 0, sectors read at 2, writes at 4, sectors written at 6, flushes at 15.
fn parse(stat: &str) -> Option<Io> {
    let fields: Vec<f64> = stat.split_whitespace().map(|f| f.parse().ok()).collect::<Option<_>>()?;
    let at = |n: usize| fields.get(n).copied();
    Some(Io {
        reads: at(0)?,
        writes: at(4)?,
        flushes: at(15)?,
        compare_and_writes: 0.0,
        bytes_read: at(2)? * 512.0,
        bytes_written: at(6)? * 512.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_counts_are_understood() {
        let io = parse("  10  0  80 5  20 3 160 9 0 12 14 0 0 0 0  7 2\n").unwrap();
        assert_eq!((io.reads, io.writes, io.flushes), (10.0, 20.0, 7.0));
        assert_eq!((io.bytes_read, io.bytes_written), (40960.0, 81920.0));
        assert_eq!(parse("1 2 3"), None);
        let twice = io.plus(&io);
        assert_eq!(twice.since(&io).per(10.0).writes, 2.0);
    }
}
