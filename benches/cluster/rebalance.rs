//! How long it takes until 99 partitions are divided anew among ten members: nine join one that has all,
//! one leaves, one dies. Each has a cluster of its own, as a process has; the node says who owns what.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use shardmq::{Cluster, Messages, TopicOptions};
use tokio::time::Instant;

use crate::Size;
use crate::spread::Spread;

const PARTITIONS: usize = 99;

struct Member {
    /// It dies with this.
    runtime: Option<tokio::runtime::Runtime>,
    messages: Messages,
}

impl Member {
    async fn join(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let url = url.to_owned();
        let joined = runtime.spawn(async move {
            let cluster = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
            cluster.consumer("rebalance", "g").stream().await.unwrap()
        });
        let messages = joined.await.unwrap();
        Self { runtime: Some(runtime), messages }
    }

    async fn leave(mut self) {
        self.messages.shutdown(Duration::from_secs(5)).await.unwrap();
        self.runtime.take().unwrap().shutdown_background();
    }

    fn die(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// Waits until so many live members have even shares; returns how long that took since then.
async fn even(sql: &tokio_postgres::Client, members: usize, since: Instant) -> f64 {
    let owners =
        "select c.member, count(*) from shardmq.cursor c join shardmq.member m using (member)
                   where c.group_name = 'g' group by 1";
    loop {
        let rows = sql.query(owners, &[]).await.unwrap();
        let shares: BTreeMap<uuid::Uuid, i64> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let least = i64::try_from(PARTITIONS / members).unwrap();
        let fair = |count: i64| count == least || count == least + 1;
        let all = shares.values().sum::<i64>() == i64::try_from(PARTITIONS).unwrap();
        if shares.len() == members && all && shares.values().all(|count| fair(*count)) {
            return since.elapsed().as_secs_f64() * 1e3;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) async fn measure(size: Size) {
    let (rounds, members) = if size == Size::Small { (1, 3) } else { (10, 10) };
    let server = crate::server(500).await;
    let (cluster, url) = crate::cluster(&[&server]).await;
    cluster.create_topic("rebalance", TopicOptions::partitions(PARTITIONS)).await.unwrap();
    let (sql, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    // Else the server is too young to tell who has died.
    tokio::time::sleep(Duration::from_secs(if size == Size::Small { 0 } else { 11 })).await;
    let (mut joined, mut left, mut died) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut all = vec![Member::join(&url).await];
        even(&sql, 1, Instant::now()).await;
        let begun = Instant::now();
        all.extend(join_all((1..members).map(|_| Member::join(&url))).await);
        joined.push(even(&sql, members, begun).await);
        let begun = Instant::now();
        all.remove(0).leave().await;
        left.push(even(&sql, members - 1, begun).await);
        if size == Size::Whole {
            let begun = Instant::now();
            all.remove(0).die();
            // Its lease goes on: what it has is taken all the same.
            died.push(even(&sql, members - 2, begun).await);
        }
        join_all(all.into_iter().map(Member::leave)).await;
        sql.batch_execute("delete from shardmq.member").await.unwrap();
    }
    println!("rebalance: {PARTITIONS} partitions, {members} members, {rounds} rounds, in ms");
    for (what, times) in [("the others join one", joined), ("one leaves", left), ("one dies", died)]
    {
        if !times.is_empty() {
            println!("  {what:>20}: {}", Spread::of(times).text());
        }
    }
    cluster.shutdown().await;
    server.stop().await.unwrap();
}
