//! What a bare Debian 12 with Rust lacks, and the programs. Doing it again does nothing.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::run::works;
use crate::{Result, programs, tools};

/// gcc is cargo's linker; mount has mount(8) and umount(8). FUSE needs no package: the mount program speaks to the kernel
/// itself. The mail servers are for tests, which run instances of their own; the others are what the bench measures beside this
/// filesystem, and with. libiscsi7 is what iSCSI disks are reached by; tgt, istgt and iproute2 are for the tests of it: targets,
/// and networks that can be cut; user-mode-linux,
/// open-iscsi and dmsetup for those of SCSI disks of the kernel: a kernel of their own.
const PACKAGES: &[&str] = &[
    "gcc",
    "libc6-dev",
    "mount",
    "dovecot-core",
    "dovecot-imapd",
    "dovecot-lmtpd",
    "dovecot-pop3d",
    "postfix",
    "procmail",
    "maildrop",
    "e2fsprogs",
    "xfsprogs",
    "postmark",
    "fsmark",
    "libiscsi7",
    "tgt",
    "istgt",
    "iproute2",
    "user-mode-linux",
    "open-iscsi",
    "dmsetup",
];

/// Services that those packages would start, now and at the next boot.
const SERVICES: &[&str] = &[
    "dovecot.service",
    "dovecot.socket",
    "postfix.service",
    "tgt.service",
    "istgt.service",
    "open-iscsi.service",
    "iscsid.service",
    "iscsid.socket",
];

/// Answers to questions of the packages.
const ANSWERS: &str = "postfix postfix/main_mailer_type select No configuration\n";

/// Tells the maintainer scripts of packages not to start anything.
const POLICY: &str = "/usr/sbin/policy-rc.d";

pub fn setup() -> Result<()> {
    packages()?;
    if !Path::new("/dev/fuse").exists() && !works("modprobe", &["fuse"]) {
        println!("warning: there is no /dev/fuse here, nothing can be mounted (modprobe fuse as root)");
    }
    let bin = programs::build()?;
    tools::install()?;
    println!("programs are in {}", bin.display());
    Ok(())
}

fn packages() -> Result<()> {
    if !works("dpkg-query", &["--version"]) {
        println!("not a Debian system: {} are taken for granted", PACKAGES.join(", "));
        return Ok(());
    }
    let installed = |p: &str| {
        let args = ["-W", "-f=${db:Status-Abbrev}", p];
        Command::new("dpkg-query").args(args).output().is_ok_and(|o| o.stdout.starts_with(b"ii"))
    };
    let missing: Vec<&str> = PACKAGES.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(", "));
    let _nothing_starts = Policy::forbid()?;
    let apt = || {
        let mut c = Command::new("apt-get");
        c.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        c
    };
    quietly(apt().args(["update", "-qq"]))?;
    answer()?;
    quietly(apt().args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing))?;
    let new: Vec<&str> = SERVICES.iter().copied().filter(|s| missing.iter().any(|p| belongs(s, p))).collect();
    if !new.is_empty() && works("systemctl", &["--version"]) {
        quietly(Command::new("systemctl").args(["--quiet", "disable"]).args(&new))?;
    }
    Ok(())
}

fn belongs(service: &str, package: &str) -> bool {
    service.split('.').next().is_some_and(|name| {
        package == name || package.strip_suffix("-core") == Some(name) || (package == "open-iscsi" && name == "iscsid")
    })
}

fn answer() -> Result<()> {
    let name = "debconf-set-selections";
    let mut child = Command::new(name).stdin(Stdio::piped()).spawn().map_err(|e| format!("{name}: {e}"))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(ANSWERS.as_bytes()).map_err(|e| format!("{name}: {e}"))?;
    }
    let status = child.wait().map_err(|e| format!("{name}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{name}: {status}")) }
}

/// Runs a command to its end, with a word only if it fails.
fn quietly(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| format!("{name}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    Err(format!("{name}: {}\n{said}", out.status))
}

/// While it lives, installing a package starts no service. A policy that the administrator has stays as it is.
struct Policy {
    ours: bool,
}

impl Policy {
    fn forbid() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        let text = "#!/bin/sh\n# While cargo xtask setup installs packages.\nexit 101\n";
        fs::write(POLICY, text)
            .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
            .map_err(|e| format!("{POLICY}: {e} (packages are installed as root)"))?;
        Ok(Self { ours: true })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.ours
            && let Err(e) = fs::remove_file(POLICY)
        {
            eprintln!("{POLICY}: {e}: it keeps services from being started, remove it");
        }
    }
}
