//! Installing the programs and their manual pages, and removing them again.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::programs::{self, PROGRAMS, put};
use crate::run::root;

/// Where mount(8), umount(8) and fsck(8) look for their helpers.
const HELPERS: &str = "/sbin";

/// Manual pages of the repository: (file, directory below the prefix).
fn manuals() -> Result<Vec<PathBuf>> {
    let dir = root().join("docs/man");
    let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut pages: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "8")).collect();
    pages.sort();
    Ok(pages)
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))
}

pub fn install(prefix: &Path) -> Result<()> {
    let bin = programs::build()?;
    let (sbin, man) = (prefix.join("sbin"), prefix.join("share/man/man8"));
    make_dir(&sbin)?;
    make_dir(&man)?;
    for p in PROGRAMS {
        put(&bin.join(p.installed), &sbin.join(p.installed), 0o755)?;
    }
    for page in manuals()? {
        if let Some(name) = page.file_name() {
            put(&page, &man.join(name), 0o644)?;
        }
    }
    println!("installed into {}", sbin.display());
    link_helpers(&sbin, Path::new(HELPERS))
}

fn link_helpers(sbin: &Path, helpers: &Path) -> Result<()> {
    for p in PROGRAMS.iter().filter(|p| p.helper) {
        let (file, link) = (sbin.join(p.installed), helpers.join(p.installed));
        match fs::read_link(&link) {
            Ok(to) if to == file => continue,
            Ok(_) => fs::remove_file(&link).map_err(|e| format!("{}: {e}", link.display()))?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            // The prefix may be /usr, and /sbin a link to its sbin.
            Err(_) if same_file(&file, &link) => continue,
            Err(_) => return Err(format!("{} is not a link of ours: left alone", link.display())),
        }
        match symlink(&file, &link) {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                println!("no permission for {}: `mount -t clusterfs` will not find its helper", helpers.display());
                return Ok(());
            }
            other => other.map_err(|e| format!("{}: {e}", link.display()))?,
        }
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

pub fn uninstall(prefix: &Path) -> Result<()> {
    let (sbin, man) = (prefix.join("sbin"), prefix.join("share/man/man8"));
    unlink_helpers(&sbin, Path::new(HELPERS))?;
    let pages = manuals()?;
    let files = PROGRAMS.iter().map(|p| sbin.join(p.installed));
    let files = files.chain(pages.iter().filter_map(|p| Some(man.join(p.file_name()?))));
    for file in files {
        remove(&file)?;
    }
    println!("removed from {}", sbin.display());
    Ok(())
}

/// Only links that lead to the programs of this prefix.
fn unlink_helpers(sbin: &Path, helpers: &Path) -> Result<()> {
    for p in PROGRAMS.iter().filter(|p| p.helper) {
        let link = helpers.join(p.installed);
        if fs::read_link(&link).is_ok_and(|to| to == sbin.join(p.installed)) {
            remove(&link)?;
        }
    }
    Ok(())
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(format!("{}: {e}", file.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_made_replaced_and_removed_but_foreign_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (sbin, helpers) = (dir.path().join("sbin"), dir.path().join("helpers"));
        fs::create_dir_all(&sbin).unwrap();
        fs::create_dir_all(&helpers).unwrap();
        symlink("/elsewhere/mkfs.clusterfs", helpers.join("mkfs.clusterfs")).unwrap();
        for _ in 0..2 {
            link_helpers(&sbin, &helpers).unwrap();
            for name in ["mount.clusterfs", "mkfs.clusterfs", "fsck.clusterfs"] {
                assert_eq!(fs::read_link(helpers.join(name)).unwrap(), sbin.join(name));
            }
        }
        assert!(!helpers.join("clusterfs").exists());
        unlink_helpers(&sbin, &helpers).unwrap();
        assert_eq!(fs::read_dir(&helpers).unwrap().count(), 0);
        fs::write(helpers.join("fsck.clusterfs"), "a package's").unwrap();
        assert!(link_helpers(&sbin, &helpers).unwrap_err().contains("left alone"));
        unlink_helpers(&sbin, &helpers).unwrap();
        assert_eq!(fs::read(helpers.join("fsck.clusterfs")).unwrap(), b"a package's");
    }

    #[test]
    fn there_is_a_manual_page_for_every_program() {
        let pages = manuals().unwrap();
        for p in PROGRAMS {
            let name = format!("{}.8", p.installed);
            assert!(pages.iter().any(|page| page.ends_with(&name)), "{name}");
        }
    }
}
