//! All scenarios. Each module has a list of its own.

mod bulk;
mod deliver;
mod handover;
mod imap;
mod locks;
mod mbox;
mod programs;
mod tree;

use super::Scenario;

/// In the order of the table.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [deliver::ALL, mbox::ALL, imap::ALL, tree::ALL, bulk::ALL, locks::ALL, handover::ALL, programs::ALL]
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_and_fit_for_files() {
        let mut names: Vec<&str> = super::all().map(|s| s.name).collect();
        let fit = |n: &&str| n.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        assert!(names.iter().all(fit), "{names:?}");
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
