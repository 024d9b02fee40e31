//! A lease that runs out unheard: where the node does not answer, only the own clock tells.
//!
//! ```text
//! renewed ──> lasts ── nothing heard until its end ──> over: nothing is handed out
//!    ^          │                                        │
//!    └──────────┴────────── a renewal is answered ───────┘
//! ```
//!
//! It counts from when a renewal was sent, so it is over here before it is over on the node: by the
//! time that another member takes a partition, this one has stopped. Whether one has is not known
//! here; so nothing is given up, and what is still this member's goes on with the next renewal.

use std::convert::Infallible;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::consumer::Shared;
use crate::id::NodeId;

/// Until when a member's lease lasts, by its own clock. None: it has had none yet.
#[derive(Debug, Default)]
pub(super) struct Expiry(watch::Sender<Option<Instant>>);

impl Expiry {
    /// The lease was renewed.
    pub(super) fn put_off(&self, until: Instant) {
        self.0.send_replace(Some(until));
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.borrow().is_some_and(|until| until <= Instant::now())
    }

    /// Stops what the member holds when the lease runs out. To be polled beside all that the member
    /// waits for: it may wait longer for an answer than the lease lasts.
    pub(super) async fn watch(&self, shared: &Shared, node: NodeId) -> Infallible {
        let mut renewals = self.0.subscribe();
        loop {
            let until = *renewals.borrow_and_update();
            if let Some(until) = until
                && timeout_at(until, renewals.changed()).await.is_ok()
            {
                continue;
            }
            if until.is_some() {
                let holdings = shared.holdings();
                let here = holdings.values().filter(|holding| holding.partition.node() == node);
                here.for_each(|holding| holding.lapse());
            }
            // It can't be an error: the sender is this one's.
            let _ = renewals.changed().await;
        }
    }
}
