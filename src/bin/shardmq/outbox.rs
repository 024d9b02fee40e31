//! `shardmq outbox`: databases that have an outbox and are no nodes.

use clap::Subcommand;
use serde::Serialize;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, table};

/// Register, forget and list databases from whose outboxes messages are relayed. Nodes have one anyway. Prints
/// those that there are afterwards.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Have all processes relay from a database that was migrated with `migrate --outbox`.
    Add {
        /// A libpq URL. Its password is used now and not stored.
        #[arg(value_name = "URL")]
        address: String,
    },
    /// Relay from a database no more. What waits in it stays there.
    Remove {
        /// Its address, as `list` shows it.
        #[arg(value_name = "URL")]
        address: String,
    },
    /// List them.
    List,
}

/// A line of `--json`.
#[derive(Serialize)]
struct Listed {
    url: String,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    match &command {
        Command::Add { address } => cluster.add_outbox(address).await?,
        Command::Remove { address } => cluster.remove_outbox(address).await?,
        Command::List => {}
    }
    let urls = cluster.outboxes().await?;
    cluster.shutdown().await;
    let mut out = Out::new();
    if context.json {
        for url in urls {
            out.json(&Listed { url })?;
        }
    } else {
        out.line(&table(&["ADDRESS"], &[], urls.into_iter().map(|url| vec![url]).collect()));
    }
    out.flush().await
}
