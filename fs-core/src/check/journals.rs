//! Journals: that each can be read, and what the replay of a dead node's one will place.

use std::sync::Arc;

use cluster::NodeId;

use super::Notify;
use super::members::Slots;
use super::reader::Reader;
use super::report::{Progress, Report};
use crate::format::layout::VolumeLayout;
use crate::recovery::JournalRecoverer;

/// No life of a slot: asks whether the journal can be read, without any records.
const NOBODY: u32 = 0;

/// Puts the images that replay would write over what the reader reads. Returns false if a dead node's journal
/// could not be used: then what follows may look damaged without being so.
pub(super) async fn read(
    r: &mut Reader,
    layout: &VolumeLayout,
    slots: &Slots,
    report: &mut Report,
    tell: Notify<'_>,
) -> bool {
    let locks = JournalRecoverer::new(r.dev.clone(), *layout);
    let mut good = true;
    for slot in 0..layout.nodes {
        tell(Progress { phase: "journals", done: slot.into(), total: layout.nodes.into() });
        let region = layout.journal(slot);
        let dead = slots.dead.iter().find(|d| d.slot == slot).copied();
        let node = dead.unwrap_or(NodeId { slot, incarnation: NOBODY });
        let scan = match journal::scan(&r.dev, region, node).await {
            Ok(s) => s,
            Err(e) => {
                report.violation(format!("journal of slot {slot}"), e);
                report.bad_journals.push(slot);
                good &= dead.is_none();
                continue;
            }
        };
        let Some(dead) = dead else { continue };
        match scan.images(&r.dev, region, dead, &locks).await {
            Ok((images, done)) => {
                report.note(format!(
                    "journal of {dead}: {} records to replay, {} blocks differ from the device",
                    done.records, done.blocks_written
                ));
                r.replayed.extend(images.into_iter().map(|(n, b)| (n, Arc::new(b))));
            }
            Err(e) => {
                report.violation(format!("journal of slot {slot}"), e);
                report.bad_journals.push(slot);
                good = false;
            }
        }
    }
    good
}
