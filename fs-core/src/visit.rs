//! Programs that are nodes for a time: they join, do what needs a slot, and leave.

use std::sync::Arc;

use blockdev::BlockDevice;
use cluster::{ClusterError, JoinConfig, LockClient, LockId, Mode, Node, NodeId, Recoverer};

use crate::format::superblock::Superblock;

/// Nobody wants anything of it but another such program, who waits.
struct Visitor;

impl LockClient for Visitor {
    fn demand(&self, _: LockId, _: Mode) {}
    fn recovered(&self, _: NodeId) {}
    fn lapsed(&self) {}
}

/// Joins. `name` is shown where a host's would be; `seed` must differ from that of any other node.
pub(crate) async fn join(
    dev: &Arc<dyn BlockDevice>,
    sb: &Superblock,
    name: &str,
    recoverer: Arc<dyn Recoverer>,
    seed: u64,
) -> Result<Arc<Node>, ClusterError> {
    let node = Node::join(JoinConfig {
        device: dev.clone(),
        layout: sb.layout().cluster(),
        timeouts: sb.timeouts,
        hint_key: sb.hint_key,
        net: None,
        host_name: name.into(),
        recoverer,
        seed,
    })
    .await?;
    node.start(Arc::new(Visitor));
    Ok(node)
}
