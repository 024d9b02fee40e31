//! Looks for two primaries of a node at once: at all hosts of its address, from the process that
//! has the upkeep of the node. So it costs the same however many processes there are.
//!
//! ```text
//! each 2 s: all hosts ─> a newer primary ─> known here at once, recorded in the control database, heard by all
//!                   └──> an older one that answers as well ─> told
//! ```
//!
//! A newer one is looked for also while the old one hangs, for as long as the lease may be ours.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::Nodes;
use crate::deadline::jitter;
use crate::id::NodeId;
use crate::store::node::{Found, Node};
use crate::store::timeline::{Newest, Primary};
use crate::trouble::Trouble;

/// Between looks.
const LOOK: Duration = Duration::from_secs(2);
/// How long telling it on old primaries of the control database may take.
const WARN: Duration = Duration::from_secs(8);
/// How often an older primary is told that stays.
const REMIND: Duration = Duration::from_hours(1);

/// The primaries that were told of, so that each is told of once.
#[derive(Default)]
struct Told {
    /// Older primaries, by their hosts.
    older: HashMap<String, Trouble>,
    /// Also on those of the control database.
    on_control: bool,
}

/// Looks for as long as this process may have the lease, of which `until` tells the end. Never
/// ends.
pub(super) async fn watch(nodes: &Nodes, id: NodeId, mut until: watch::Receiver<Instant>) {
    let mut told = Told::default();
    loop {
        if until.wait_for(|until| *until > Instant::now()).await.is_err() {
            return std::future::pending().await;
        }
        if let Ok(node) = nodes.node(id).await
            && node.has_several_hosts()
        {
            // Boxed: every process carries it, and one looks.
            let looking: BoxFuture<'_, ()> = Box::pin(look(nodes, id, &node, &mut told));
            looking.await;
        }
        sleep(jitter(LOOK)).await;
    }
}

async fn look(nodes: &Nodes, id: NodeId, node: &Node, told: &mut Told) {
    let found = node.primaries().await;
    if !told.tell(id, node.newest(), &found) {
        told.on_control = false;
    } else if !told.on_control {
        told.on_control = timeout(WARN, nodes.warn()).await.unwrap_or(false);
    }
}

impl Told {
    /// Takes over the newest primary, and tells of older ones. Whether there is one.
    fn tell(&mut self, id: NodeId, newest: &Newest, found: &[Found]) -> bool {
        // It is not known which server this is before some connection was looked at.
        let Some(known) = newest.known() else { return false };
        for found in found.iter().filter(|found| known.is_older_than(&found.primary)) {
            newest.see(found.primary);
        }
        let known = newest.known().unwrap_or(known);
        let newer = found.iter().find(|found| found.primary == known);
        let newer = newer.map_or("", |found| found.at.as_str());
        let mut any = false;
        for Found { at, primary, .. } in found {
            if primary.is_older_than(&known) {
                any = true;
                let trouble = self.older.entry(at.clone()).or_insert_with(|| Trouble::new(REMIND));
                if trouble.meet(Instant::now()) {
                    tell(id, (at, *primary), (newer, known));
                }
            }
        }
        any
    }
}

fn tell(node: NodeId, (older, old): (&str, Primary), (newer, new): (&str, Primary)) {
    tracing::error!(
        alert = "split_brain", %node, older, newer,
        older_timeline = old.timeline, newer_timeline = new.timeline,
        "a node has two primaries: the older one takes writes, and is not used any more. Stop it; what was written \
         there since the newer one was promoted is lost with it"
    );
}
