//! `shardmq migrate`: schemas made, or brought up to date.

use clap::Parser;
use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use shardmq::Cluster;
use shardmq::migrate::{Schema, migrate};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, note};

/// How many nodes are migrated at once.
const AT_ONCE: usize = 8;

/// Make the schemas, or bring them up to date.
///
/// Without arguments: the control and log schemas in the control database, and all registered nodes.
#[derive(Parser)]
pub(crate) struct Args {
    /// A database that is to become a node, instead; may be repeated.
    #[arg(long, value_name = "URL")]
    node: Vec<String>,
    /// A database with effects of messages that are elsewhere, instead: it gets the table that
    /// `shardmq::dedup` needs.
    #[arg(long, value_name = "URL", conflicts_with = "node")]
    dedup: Option<String>,
    /// A database that is to have an outbox, instead: messages can be published in its transactions. It is
    /// registered in the control database where one is given, so that messages are relayed from it.
    #[arg(long, value_name = "URL", conflicts_with_all = ["node", "dedup"])]
    outbox: Option<String>,
}

/// What was done to one schema.
#[derive(Serialize)]
struct Migrated {
    database: String,
    schema: &'static str,
    /// The migrations that were applied, none where all was done already.
    applied: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut out = Out::new();
    if let Some(url) = args.dedup {
        let applied = apply("database".to_owned(), &url, Schema::Dedup).await;
        return print(context, &mut out, applied).await;
    }
    if let Some(url) = args.outbox {
        let applied = apply("database".to_owned(), &url, Schema::Outbox).await;
        print(context, &mut out, applied).await?;
        return register(context, &url).await;
    }
    if args.node.is_empty() {
        let url = context.url()?;
        for schema in [Schema::Control, Schema::Log] {
            let applied = apply("control database".to_owned(), url, schema).await;
            print(context, &mut out, applied).await?;
        }
        let cluster = Cluster::connect(url).await?;
        let nodes = cluster.nodes().await?;
        cluster.shutdown().await;
        let nodes = nodes.into_iter().map(|node| (format!("node {}", node.node), node.url));
        return apply_to_nodes(context, &mut out, nodes).await;
    }
    let nodes = args.node.into_iter().zip(1..);
    let nodes = nodes.map(|(url, number)| (format!("database {number}"), url));
    apply_to_nodes(context, &mut out, nodes).await
}

/// Tells all processes of a database with an outbox.
async fn register(context: &Context, url: &str) -> Result<(), Failure> {
    let Ok(control) = context.url() else {
        note(
            "no control database is given: who relays from it must be told (ClusterBuilder::outbox)",
        );
        return Ok(());
    };
    let cluster = Cluster::builder(control).upkeep(false).connect().await?;
    let registered = cluster.add_outbox(url).await;
    cluster.shutdown().await;
    Ok(registered?)
}

/// Some at a time; what was done is printed in their order.
async fn apply_to_nodes(
    context: &Context,
    out: &mut Out,
    nodes: impl Iterator<Item = (String, String)>,
) -> Result<(), Failure> {
    let applied =
        |(name, url): (String, String)| async move { apply(name, &url, Schema::Node).await };
    let mut applied = stream::iter(nodes).map(applied).buffered(AT_ONCE);
    let mut outcome = Ok(());
    while let Some(applied) = applied.next().await {
        outcome = first_failure(outcome, print(context, out, applied).await);
    }
    outcome
}

/// Keeps the first failure for the end and reports the others: one node does not stop the rest.
fn first_failure(first: Result<(), Failure>, next: Result<(), Failure>) -> Result<(), Failure> {
    if first.is_err()
        && let Err(failure) = &next
    {
        failure.report();
    }
    first.and(next)
}

async fn apply(database: String, url: &str, schema: Schema) -> Result<Migrated, Failure> {
    let applied = migrate(url, schema).await?;
    Ok(Migrated { database, schema: schema.name(), applied })
}

async fn print(
    context: &Context,
    out: &mut Out,
    migrated: Result<Migrated, Failure>,
) -> Result<(), Failure> {
    let migrated = migrated?;
    if context.json {
        out.json(&migrated)?;
    } else {
        out.line(&sentence(&migrated));
    }
    out.flush().await
}

fn sentence(migrated: &Migrated) -> String {
    let Migrated { database, schema, applied } = migrated;
    if applied.is_empty() {
        format!("{database}: schema {schema} is up to date")
    } else {
        format!("{database}: schema {schema}: applied {}", applied.join(", "))
    }
}
