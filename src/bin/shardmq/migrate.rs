//! `shardmq migrate`: schemas made, or brought up to date.

use clap::Parser;
use serde::Serialize;
use shardmq::Cluster;
use shardmq::migrate::{Schema, migrate};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::Out;

/// Make the schemas, or bring them up to date.
///
/// Without arguments: the control and log schemas in the control database, and all registered nodes.
#[derive(Parser)]
pub(crate) struct Args {
    /// A database that is to become a node, instead; may be repeated.
    #[arg(long, value_name = "URL")]
    node: Vec<String>,
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
    let mut outcome = Ok(());
    if args.node.is_empty() {
        let url = context.url()?;
        for schema in [Schema::Control, Schema::Log] {
            apply(context, &mut out, "control database", url, schema).await?;
        }
        let cluster = Cluster::connect(url).await?;
        for node in cluster.nodes().await? {
            let name = format!("node {}", node.node);
            let applied = apply(context, &mut out, &name, &node.url, Schema::Node).await;
            outcome = first_failure(outcome, applied);
        }
        cluster.shutdown().await;
    }
    for (url, number) in args.node.iter().zip(1..) {
        let name = format!("database {number}");
        let applied = apply(context, &mut out, &name, url, Schema::Node).await;
        outcome = first_failure(outcome, applied);
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

async fn apply(
    context: &Context,
    out: &mut Out,
    database: &str,
    url: &str,
    schema: Schema,
) -> Result<(), Failure> {
    let applied = migrate(url, schema).await?;
    let migrated = Migrated { database: database.to_owned(), schema: schema.name(), applied };
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
