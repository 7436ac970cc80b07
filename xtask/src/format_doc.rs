//! docs/FORMAT.md must say what the code says: every byte-offset table of the format modules is in it, word for word.

use std::fs;

use crate::run::root;

/// The modules that describe a structure on disk.
const SOURCES: &[&str] = &[
    "fs-core/src/format/superblock.rs",
    "fs-core/src/format/group.rs",
    "fs-core/src/format/domain.rs",
    "fs-core/src/format/item.rs",
    "fs-core/src/format/file_lock.rs",
    "fs-core/src/tree/node.rs",
    "journal/src/block.rs",
    "journal/src/format.rs",
    "cluster/src/format/slot.rs",
    "cluster/src/format/heartbeat.rs",
    "cluster/src/format/doorbell.rs",
    "cluster/src/format/lock.rs",
    "cluster/src/format/cell.rs",
];

/// Rows of tables and lines of ```text blocks in doc comments.
fn rows(source: &str) -> Vec<&str> {
    let mut rows = Vec::new();
    let mut in_text = false;
    for line in source.lines() {
        let line = line.trim_start();
        let Some(doc) = line.strip_prefix("//!").or_else(|| line.strip_prefix("///")) else {
            in_text = false;
            continue;
        };
        let doc = doc.strip_prefix(' ').unwrap_or(doc).trim_end();
        if doc.starts_with("```") {
            in_text = doc == "```text";
        } else if in_text || doc.starts_with('|') {
            rows.push(doc);
        }
    }
    rows
}

#[test]
fn the_document_has_every_table_of_the_code() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let document = read("docs/FORMAT.md");
    let lines: Vec<&str> = document.lines().map(str::trim_end).collect();
    for path in SOURCES {
        let source = read(path);
        let rows = rows(&source);
        assert!(rows.len() > 3, "{path} describes nothing any more");
        for row in rows {
            assert!(lines.contains(&row), "docs/FORMAT.md lacks this row of {path}:\n{row}");
        }
    }
}

#[test]
fn rows_are_found_in_both_kinds_of_tables() {
    let source =
        "//! | a | b |\n//! words\nfn f() {}\n/// ```text\n///   0  4  magic\n/// ```\n/// ```\n/// code\n/// ```\n";
    assert_eq!(rows(source), ["| a | b |", "  0  4  magic"]);
}
