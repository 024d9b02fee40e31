//! `shardmq node`: the databases that store messages.

use clap::Subcommand;
use shardmq::NodeId;
use shardmq::migrate::{Schema, migrate};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, table};

/// Register, move, remove and list nodes. Prints those that there are afterwards.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Register a migrated database as a node, or change a node's address.
    Add {
        /// The node's number, 1 to 99.
        number: NodeId,
        /// A libpq URL. Its password is used now and not stored.
        #[arg(value_name = "URL")]
        address: String,
        /// Make the schema in it, or bring it up to date, first.
        #[arg(long)]
        migrate: bool,
    },
    /// Give a node another address: that of the same database elsewhere, such as a promoted standby.
    Replace {
        /// The node's number.
        number: NodeId,
        /// A libpq URL. Its password is used now and not stored.
        #[arg(value_name = "URL")]
        address: String,
    },
    /// Forget a node that has no partitions.
    Remove {
        /// The node's number.
        number: NodeId,
    },
    /// List the nodes.
    List,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    match &command {
        Command::Add { number, address, migrate: first } => {
            if *first {
                migrate(address, Schema::Node).await?;
            }
            cluster.add_node(*number, address).await?;
        }
        Command::Replace { number, address } => cluster.replace_node(*number, address).await?,
        Command::Remove { number } => cluster.remove_node(*number).await?,
        Command::List => {}
    }
    let mut nodes = cluster.nodes().await?;
    cluster.shutdown().await;
    if let Command::Add { number, .. } | Command::Replace { number, .. } = command {
        nodes.retain(|node| node.node == number);
    }
    let mut out = Out::new();
    if context.json {
        nodes.iter().try_for_each(|node| out.json(node))?;
    } else {
        let row = |node: shardmq::NodeInfo| vec![node.node.to_string(), node.url];
        out.line(&table(&["node", "url"], &[], nodes.into_iter().map(row).collect()));
    }
    out.flush().await
}
