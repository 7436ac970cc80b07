//! The command line, as mount(8) calls its helpers: `mount.clusterfs DEVICE DIR [-sfnvrw] [-o OPTIONS]`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use fs_core::{Atime, MountConfig};

/// Mount a clusterfs volume.
#[derive(Parser, Debug)]
#[command(name = "mount.clusterfs", version, about, disable_version_flag = false)]
pub struct Cli {
    /// Image file, block device or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
    pub device: String,
    /// Mount point
    pub dir: PathBuf,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground and log to standard error
    #[arg(short = 'f')]
    pub foreground: bool,
    /// Mount read-only
    #[arg(short = 'r')]
    pub read_only: bool,
    /// Mount read-write (the default)
    #[arg(short = 'w', conflicts_with = "read_only")]
    pub read_write: bool,
    /// Say what is done
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Tolerate options that are not known
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Do not write /etc/mtab: nobody does any more
    #[arg(short = 'n')]
    pub no_mtab: bool,
}

/// Exit status of mount(8) and umount(8) for a wrong call.
pub const USAGE: u8 = 1;

/// The command line of a program, or the status to end with once what is to be said has been.
pub fn command_line<T: Parser>() -> Result<T, ExitCode> {
    T::try_parse().map_err(|e| {
        let shown = matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        // Standard output or error may be closed; the status still tells.
        let _ = e.print();
        ExitCode::from(if shown { 0 } else { USAGE })
    })
}

/// How nodes tell each other what they want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hints {
    /// Loopback for an image file, this host's address for a device.
    Auto,
    Off,
    At(SocketAddr),
}

#[derive(Clone, Debug)]
pub struct Options {
    pub read_only: bool,
    /// Flags of mount(2).
    pub flags: u64,
    pub atime: Atime,
    pub cache_bytes: usize,
    pub dirty_bytes: usize,
    pub hints: Hints,
    pub io_uring: bool,
    /// The device is told which blocks hold nothing any more.
    pub discard: bool,
    pub host: Option<String>,
    pub iscsi: blockdev::iscsi::Settings,
    pub log: Option<String>,
}

/// Options that mean something to mount(8), fstab or systemd, and nothing to a helper.
const FOR_OTHERS: [&str; 17] = [
    "defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "owner", "group", "async", "rw",
    "suid", "dev", "exec", "loud", "silent",
];

impl Options {
    pub fn parse(cli: &Cli) -> Result<Self, String> {
        let mut o = Options {
            read_only: cli.read_only,
            flags: 0,
            atime: Atime::Relative,
            cache_bytes: MountConfig::DEFAULT_CACHE_BYTES,
            dirty_bytes: MountConfig::DEFAULT_DIRTY_BYTES,
            hints: Hints::Auto,
            io_uring: false,
            discard: false,
            host: None,
            iscsi: Default::default(),
            log: cli.verbose.then(|| "info".to_string()),
        };
        for option in cli.options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
            o.one(option, cli.sloppy)?;
        }
        if o.read_only {
            o.flags |= libc::MS_RDONLY;
        }
        Ok(o)
    }

    fn one(&mut self, option: &str, sloppy: bool) -> Result<(), String> {
        let (name, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(v)));
        match (name, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("noatime", None) => self.atime = Atime::Never,
            ("relatime" | "atime", None) => self.atime = Atime::Relative,
            ("nosuid", None) => self.flags |= libc::MS_NOSUID,
            ("nodev", None) => self.flags |= libc::MS_NODEV,
            ("noexec", None) => self.flags |= libc::MS_NOEXEC,
            ("sync", None) => self.flags |= libc::MS_SYNCHRONOUS,
            ("dirsync", None) => self.flags |= libc::MS_DIRSYNC,
            ("cache", Some(v)) => self.cache_bytes = size(name, v)?,
            ("dirty", Some(v)) => self.dirty_bytes = size(name, v)?,
            ("io_uring", None) => self.io_uring = true,
            ("noio_uring", None) => self.io_uring = false,
            ("discard", None) => self.discard = true,
            ("nodiscard", None) => self.discard = false,
            ("nohints", None) => self.hints = Hints::Off,
            ("hints", Some(v)) => self.hints = Hints::At(address(v)?),
            ("host", Some(v)) if !v.is_empty() && v.len() <= 64 => self.host = Some(v.to_string()),
            ("initiator", Some(v)) if !v.is_empty() => self.iscsi.initiator = Some(v.to_string()),
            ("secrets", Some(v)) if !v.is_empty() => self.iscsi.secrets = Some(v.into()),
            ("log", Some(v)) => self.log = Some(v.to_string()),
            ("strictatime", None) => {
                return Err("option 'strictatime' cannot be kept: each access would be a write (see relatime)".into());
            }
            (n, None) if FOR_OTHERS.contains(&n) => {}
            (n, _) if n.starts_with("x-") || n.starts_with("X-") || n == "comment" => {}
            _ if sloppy => {}
            _ => return Err(format!("option '{option}' is not known or has a wrong value (see mount.clusterfs(8))")),
        }
        Ok(())
    }
}

/// A number of bytes with K, M or G.
fn size(name: &str, v: &str) -> Result<usize, String> {
    let bad = || format!("option '{name}={v}': give a size of at least 1M, as in {name}=256M");
    let (digits, unit) = match v.char_indices().last() {
        Some((at, 'k' | 'K')) => (&v[..at], 10),
        Some((at, 'm' | 'M')) => (&v[..at], 20),
        Some((at, 'g' | 'G')) => (&v[..at], 30),
        _ => (v, 0),
    };
    let n: usize = digits.parse().map_err(|_| bad())?;
    n.checked_mul(1 << unit).filter(|n| *n >= 1 << 20).ok_or_else(bad)
}

/// ADDRESS or ADDRESS:PORT.
fn address(v: &str) -> Result<SocketAddr, String> {
    let with_port = v.parse::<SocketAddr>().ok();
    let alone = v.parse::<std::net::IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0));
    with_port.or(alone).ok_or_else(|| {
        format!("option 'hints={v}': give an address of this host, as in hints=192.0.2.7 or hints=192.0.2.7:7777")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        let cli = Cli::try_parse_from(["mount.clusterfs", "/dev/x", "/mnt"].iter().chain(args)).expect("command line");
        Options::parse(&cli)
    }

    #[test]
    fn what_mount_passes_is_taken() {
        let o =
            parse(&["-o", "rw,_netdev,nofail,x-systemd.automount,noatime,nosuid", "-o", "cache=32M"]).expect("options");
        assert_eq!((o.read_only, o.atime, o.cache_bytes, o.flags), (false, Atime::Never, 32 << 20, libc::MS_NOSUID));
        assert!(!o.io_uring && parse(&["-o", "io_uring"]).expect("options").io_uring);
        assert!(parse(&["-r"]).expect("options").read_only);
        assert!(parse(&["-o", "ro"]).expect("options").flags & libc::MS_RDONLY != 0);
    }

    /// Lines of fstab, and `Options=` of units, as the documents recommend them.
    #[test]
    fn what_the_documents_say_is_taken() {
        let mut seen = (0, 0);
        for text in [include_str!("../../docs/SAN.md"), include_str!("../../docs/man/mount.clusterfs.8")] {
            for line in text.lines() {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let options = match fields[..] {
                    [device, dir, "clusterfs", options, "0", "0"] => {
                        assert!(device.starts_with("iscsi://") || device.starts_with("/dev/disk/"), "{line}");
                        assert!(dir.starts_with('/'), "{line}");
                        seen.0 += 1;
                        options
                    }
                    [unit] if unit.starts_with("Options=") => {
                        seen.1 += 1;
                        &unit["Options=".len()..]
                    }
                    _ => continue,
                };
                let o = parse(&["-o", options]).expect(line);
                assert_eq!((o.read_only, o.atime), (false, Atime::Never), "{line}");
            }
        }
        assert_eq!(seen, (4, 2), "lines of fstab and units in the documents");
    }

    #[test]
    fn what_is_wrong_is_refused_and_named() {
        for bad in ["frobnicate", "strictatime", "cache=1", "cache=many", "hints=nowhere", "ro=1", "host="] {
            let e = parse(&["-o", bad]).expect_err("refused");
            assert!(e.contains(bad), "{e}");
        }
        assert!(parse(&["-s", "-o", "frobnicate"]).is_ok());
    }

    #[test]
    fn addresses_with_and_without_port() {
        assert_eq!(
            parse(&["-o", "hints=127.0.0.1:99"]).expect("options").hints,
            Hints::At("127.0.0.1:99".parse().expect("address"))
        );
        assert_eq!(parse(&["-o", "nohints"]).expect("options").hints, Hints::Off);
    }
}
