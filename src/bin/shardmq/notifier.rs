//! `shardmq notifier`: how consumers hear of messages.

use clap::Subcommand;
use serde::Serialize;
use shardmq::notifier::{HealthState, NotifierKind};
use shardmq::{NodeHints, NodeId, NotifierSetting};

use crate::context::Context;
use crate::failure::{FAILED, Failure};
use crate::output::{Out, table, time};

/// Say, or set, what tells consumers at once that there is something to pull. Messages come without it too,
/// only later.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show the cluster's setting, and whether hints of each node arrive here.
    Show,
    /// Set what processes have from when they connect next, unless they are told otherwise.
    ///
    /// Producers and consumers must have one in common. To move from one to another set `both`, restart all,
    /// then set the other. The address of the Redis is --redis-url, or the one that was set before; it is
    /// kept without its password, which every process takes from `SHARDMQ_REDIS_PASSWORD`.
    /// `SHARDMQ_REDIS_URL` is not stored.
    Set {
        /// postgres, redis, both or none.
        notifier: NotifierKind,
    },
    /// Say where to listen to a node whose address leads to a pooler in transaction mode: at Postgres itself.
    Listen {
        /// The node's number.
        node: NodeId,
        /// A libpq URL. Its password is used now and not stored. Default: at the node's own address again.
        #[arg(value_name = "URL")]
        address: Option<String>,
    },
}

/// What `--json` prints.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    setting: NotifierSetting,
    nodes: Vec<ShownNode>,
}

#[derive(Serialize)]
struct ShownNode {
    node: NodeId,
    hints: HealthState,
    since: String,
    round_trip_ms: Option<f64>,
    error: Option<String>,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let cluster = context.connect_by(NotifierKind::None).await?;
    // Not that of the environment: it is where this process finds it.
    let redis_url = context.redis_url.as_deref().filter(|_| context.redis_url_is_argument);
    let set = match command {
        Command::Show => Ok(()),
        Command::Set { notifier } => cluster.set_notifier(notifier, redis_url).await,
        Command::Listen { node, address } => cluster.set_listen_url(node, address.as_deref()).await,
    };
    cluster.shutdown().await;
    set?;
    // As any process has it now.
    let cluster = context.connect().await?;
    let shown = show(&cluster).await;
    cluster.shutdown().await;
    let shown = shown?;
    let mut out = Out::new();
    if context.json {
        out.json(&shown)?;
    } else {
        print(&shown, &mut out);
    }
    out.flush().await?;
    if shown.nodes.iter().any(|node| node.hints == HealthState::Ok && node.error.is_some()) {
        return Err(Failure::new(FAILED, "hints arrive by one of two notifiers only"));
    }
    let waits = |node: &&ShownNode| node.hints != HealthState::Ok;
    match shown.nodes.iter().filter(waits).count() {
        0 => Ok(()),
        _ if shown.setting.notifier == NotifierKind::None => Ok(()),
        count => Err(Failure::new(FAILED, format!("hints of {count} nodes do not arrive here"))),
    }
}

async fn show(cluster: &shardmq::Cluster) -> shardmq::Result<Shown> {
    let setting = cluster.notifier_setting().await?;
    let nodes = cluster.notifier_health().await?;
    Ok(Shown { setting, nodes: nodes.into_iter().map(shown).collect() })
}

fn shown(NodeHints { node, health, .. }: NodeHints) -> ShownNode {
    let round_trip_ms = health.round_trip.filter(|_| health.is_ok());
    ShownNode {
        node,
        hints: health.state,
        since: time(health.since),
        round_trip_ms: round_trip_ms.map(|time| time.as_secs_f64() * 1e3),
        error: health.error,
    }
}

fn print(shown: &Shown, out: &mut Out) {
    let NotifierSetting { notifier, redis_url, .. } = &shown.setting;
    let at = redis_url.as_ref().filter(|_| notifier.needs_redis());
    out.line(&format!("{notifier}{}", at.map_or_else(String::new, |url| format!(" at {url}"))));
    let row = |node: &ShownNode| {
        let state = match node.hints {
            HealthState::Ok => "ok",
            HealthState::Reconnecting => "reconnecting",
            HealthState::Polling => "polling",
        };
        let round_trip = node.round_trip_ms.map(|time| format!("{time:.2}")).unwrap_or_default();
        let error = node.error.clone().unwrap_or_default();
        vec![node.node.to_string(), state.to_owned(), round_trip, error]
    };
    let rows = shown.nodes.iter().map(row).collect();
    out.line(&table(&["NODE", "HINTS", "ROUND TRIP MS", ""], &[2], rows));
}
