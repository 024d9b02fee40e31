//! Hears when something was published while the relay sleeps: on a connection of its own, outside
//! of any pool. Where a pooler stands before the database, or the connection fails, the relay looks
//! by itself.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_postgres::AsyncMessage;

use super::Outlet;
use crate::deadline::jitter;
use crate::error::Result;
use crate::store::connect::refused;
use crate::store::listen::{self, OUTBOX, Session};

/// Between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The same, where a pooler was met.
const POOLED: Duration = Duration::from_mins(1);

/// Listens until it is dropped, again after every failure.
pub(super) async fn run(outlet: Arc<Outlet>, woken: Arc<Notify>) {
    let mut backoff = BACKOFF.0;
    loop {
        match hear(&outlet, &woken, &mut backoff).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::debug!(
                    outbox = outlet.name,
                    "behind a pooler nobody listens: looking each 2 s"
                );
                sleep(jitter(POOLED)).await;
                continue;
            }
            Err(error) => {
                tracing::debug!(outbox = outlet.name, error = %error.chain(), "listening failed");
            }
        }
        sleep(jitter(backoff)).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// One life of the connection; false where a pooler answers.
async fn hear(outlet: &Outlet, woken: &Notify, backoff: &mut Duration) -> Result<bool> {
    let what = "listen to an outbox";
    let (url, trusted, newest) = outlet.listen_at().await?;
    let target = listen::target(&url, "shardmq relay")?;
    let Some(Session { client, mut messages, primary }) =
        listen::open(&target, what, trusted, &newest).await?
    else {
        return Ok(false);
    };
    // The connection is driven while that is answered.
    let mut asking = Box::pin(listen::begin(&client, &[OUTBOX]));
    let mut listens = false;
    loop {
        tokio::select! {
            answer = &mut asking, if !listens => {
                answer.map_err(|error| refused(error, what))?;
                listens = true;
                *backoff = BACKOFF.0;
                // Listen first, look second.
                woken.notify_one();
            }
            message = messages.next() => match message {
                Some(Ok(AsyncMessage::Notification(_))) => woken.notify_one(),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(refused(error, what)),
                None => return Ok(true),
            },
            () = newest.overtakes(primary) => return Ok(true),
        }
    }
}
