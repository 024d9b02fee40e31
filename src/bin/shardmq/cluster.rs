//! `shardmq cluster`: copies of a cluster. `shardmq repair`: what a loss has left.

use clap::Subcommand;
use serde::Serialize;
use shardmq::NodeId;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::Out;

/// A cluster that was copied, as by a dump that was restored: a new one, or the same elsewhere.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a cluster of its own of a copy. The original is not touched.
    Adopt {
        /// A node's number and the address of its copy: once for each node.
        #[arg(long = "node", value_name = "NUMBER=URL", value_parser = node, required = true)]
        nodes: Vec<(NodeId, String)>,
    },
    /// Say that the original is gone and that this is it: after an upgrade of the server, or a
    /// restore.
    Moved,
}

fn node(text: &str) -> Result<(NodeId, String), String> {
    let (number, url) = text.split_once('=').ok_or("it must be NUMBER=URL")?;
    let number = number.parse().map_err(|error: shardmq::Error| error.to_string())?;
    Ok((number, url.to_owned()))
}

/// A line of `--json`.
#[derive(Serialize)]
struct Adopted {
    cluster: String,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let mut out = Out::new();
    match command {
        Command::Adopt { nodes } => {
            let id = shardmq::adopt(context.url()?, &nodes).await?;
            if context.json {
                out.json(&Adopted { cluster: id.to_string() })?;
            } else {
                out.line(&format!("this is cluster {id} now"));
            }
        }
        Command::Moved => {
            let moved = shardmq::moved(context.url()?).await?;
            if context.json {
                out.json(&moved)?;
            } else {
                out.line(if moved.control {
                    "the control database has moved"
                } else {
                    "the control database is where it was"
                });
                moved.nodes.iter().for_each(|node| out.line(&format!("node {node} has moved")));
                moved.away.iter().for_each(|node| {
                    out.line(&format!("node {node} does not answer: repeat this when it does"));
                });
            }
        }
    }
    out.flush().await
}

pub(crate) async fn repair(context: &Context) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let done = cluster.repair().await?;
    cluster.shutdown().await;
    let mut out = Out::new();
    if context.json {
        out.json(&done)?;
        return out.flush().await;
    }
    done.made.iter().for_each(|p| {
        out.line(&format!("partition {p} is there again, without the messages it had"));
    });
    done.put_back
        .iter()
        .for_each(|topic| out.line(&format!("topic {topic} is in the control database again")));
    done.freed.iter().for_each(|p| {
        out.line(&format!("partition {p} was of a topic that nobody has made: its number is free"));
    });
    done.left.iter().for_each(|left| out.line(&format!("not repaired: {left}")));
    if done == shardmq::Repaired::default() {
        out.line("nothing is to be repaired");
    }
    out.flush().await
}
