//! CHAP secrets and the initiator's name. Secrets come from a file or the environment, never from the command line, which
//! everybody on the host can read.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const DEFAULT_SECRETS: &str = "/etc/clusterfs/iscsi-secrets";
/// Where open-iscsi keeps this host's name.
pub const INITIATOR_FILE: &str = "/etc/iscsi/initiatorname.iscsi";

/// Who we are to the target, and who it is to us.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Chap {
    pub own: (String, String),
    pub target: Option<(String, String)>,
}

/// The secrets for a target. An error where some are wanted (a user is named, or a file) and cannot be had.
pub(super) fn find(target: &str, user: Option<&str>, file: Option<&Path>) -> Result<Option<Chap>, String> {
    let var = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
    if let (None, Some(secret)) = (file, var("CLUSTERFS_CHAP_SECRET")) {
        let own = user.map(str::to_string).or_else(|| var("CLUSTERFS_CHAP_USER"));
        let own = own.ok_or("CLUSTERFS_CHAP_SECRET is set, but no user: name it as in iscsi://USER@HOST/...")?;
        let mutual = var("CLUSTERFS_CHAP_TARGET_USER").zip(var("CLUSTERFS_CHAP_TARGET_SECRET"));
        return Ok(Some(Chap { own: (own, secret), target: mutual }));
    }
    let named = file.map(Path::to_path_buf).or_else(|| var("CLUSTERFS_SECRETS").map(Into::into));
    let wanted = named.is_some() || user.is_some();
    let path = named.unwrap_or_else(|| DEFAULT_SECRETS.into());
    let text = match read_private(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound && !wanted => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", path.display())),
        Ok(text) => text,
    };
    let found = pick(&text, target, user).map_err(|e| format!("{}: {e}", path.display()))?;
    match (&found, user) {
        (None, Some(user)) => Err(format!("{}: no secret of user {user} for the target {target}", path.display())),
        _ => Ok(found),
    }
}

/// A file that only its owner can read.
fn read_private(path: &Path) -> std::io::Result<String> {
    let mode = std::fs::metadata(path)?.mode();
    if mode & 0o077 != 0 {
        return Err(std::io::Error::other("others can read the secrets in it: chmod 600 it"));
    }
    std::fs::read_to_string(path)
}

/// Lines of `TARGET USER SECRET [TARGET-USER TARGET-SECRET]`; `*` is any target. The first that fits counts.
fn pick(text: &str, target: &str, user: Option<&str>) -> Result<Option<Chap>, String> {
    for (line, number) in text.lines().zip(1..) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let own = |s: &str| s.to_string();
        let chap = match fields[..] {
            [] => continue,
            [first, ..] if first.starts_with('#') => continue,
            [_, user, secret] => Chap { own: (own(user), own(secret)), target: None },
            [_, user, secret, theirs, answer] => {
                Chap { own: (own(user), own(secret)), target: Some((own(theirs), own(answer))) }
            }
            _ => return Err(format!("line {number}: TARGET USER SECRET [TARGET-USER TARGET-SECRET] is expected")),
        };
        if (fields[0] == "*" || fields[0] == target) && user.is_none_or(|u| u == chap.own.0) {
            return Ok(Some(chap));
        }
    }
    Ok(None)
}

/// This host's iSCSI name: as said, from the environment, from open-iscsi's file, or made from the host's name.
pub(super) fn initiator(said: Option<&str>) -> Result<String, String> {
    let env = std::env::var("CLUSTERFS_INITIATOR").ok().filter(|v| !v.is_empty());
    if let Some(name) = said.map(str::to_string).or(env) {
        let good = ["iqn.", "eui.", "naa."].iter().any(|p| name.starts_with(p)) && name.len() <= 223;
        return if good { Ok(name) } else { Err(format!("'{name}' is not an iSCSI name (iqn.YYYY-MM.DOMAIN:NAME)")) };
    }
    let file = std::fs::read_to_string(INITIATOR_FILE).unwrap_or_default();
    let named = file.lines().find_map(|l| l.trim().strip_prefix("InitiatorName=").map(|n| n.trim().to_string()));
    if let Some(name) = named.filter(|n| !n.is_empty()) {
        return Ok(name);
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_lowercase();
    let host: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')).take(64).collect();
    Ok(format!("iqn.2026-01.clusterfs:{}", if host.is_empty() { "node" } else { &host }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_line_that_fits_counts() {
        let text = "# comment\n\niqn.a me one\niqn.b me two it three\n* you four\n";
        let own = |target, user| pick(text, target, user).unwrap().map(|c| c.own.1);
        assert_eq!(own("iqn.a", None).as_deref(), Some("one"));
        assert_eq!(own("iqn.b", Some("me")).as_deref(), Some("two"));
        assert_eq!(own("iqn.c", None).as_deref(), Some("four"));
        assert_eq!(own("iqn.c", Some("me")), None);
        assert_eq!(pick(text, "iqn.b", None).unwrap().unwrap().target, Some(("it".into(), "three".into())));
        assert!(pick("iqn.a me\n", "iqn.a", None).is_err_and(|e| e.contains("line 1")));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets");
        std::fs::write(&path, "* me secret\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let e = find("iqn.a", None, Some(&path)).err().unwrap();
        assert!(e.contains("chmod 600") && !e.contains("secret\n"), "{e}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(find("iqn.a", None, Some(&path)).unwrap().unwrap().own.1, "secret");
        assert!(find("iqn.a", Some("you"), Some(&path)).is_err());
        assert!(find("iqn.a", None, Some(&dir.path().join("none"))).is_err());
    }

    #[test]
    fn initiator_names() {
        assert_eq!(initiator(Some("iqn.2026-11.org.example:a")).unwrap(), "iqn.2026-11.org.example:a");
        assert!(initiator(Some("host")).is_err());
    }
}
