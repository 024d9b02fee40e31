//! An outbox in another database, which is promoted without its tail: what was relayed before is relayed
//! again, under the same identity.

use std::collections::HashSet;
use std::time::Duration;

use shardmq::migrate::{Schema, migrate};
use shardmq::{Message, Uid};

use crate::support::put_back::{put_back, snapshot};
use crate::support::reading::next;
use crate::support::relays::{Relay, publish};
use crate::support::stored::{stored, topic};
use crate::support::{TestCluster, client, eventually, own_server};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_relayed_again_after_a_lost_tail_has_the_same_uid() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let server = own_server().await;
    server.create_database("shop").await.unwrap();
    let url = server.url("shop");
    migrate(&url, Schema::Outbox).await.unwrap();
    let mut shop = client(&url).await;
    for n in 0..20 {
        publish(&shop, "orders", &n.to_string(), (n % 2 == 0).then_some("k")).await;
    }
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let transaction = shop.transaction().await.unwrap();
    let message = Message::new("20").header("h", "v");
    producer.send_in(&transaction, message).await.unwrap();
    transaction.commit().await.unwrap();
    let later =
        "select shardmq.publish('orders', '21', deliver_at => now() + interval '1 millisecond')";
    shop.batch_execute(later).await.unwrap();
    // The standby has what was published, and not that it was taken.
    let before = snapshot(&server).await;
    let _relay = Relay::with(&test, "orders", |builder| builder.outbox(&url)).await;
    let sql = test.sql(0).await;
    let all = async || {
        let (one, two) = (stored(&sql, partitions[0]).await, stored(&sql, partitions[1]).await);
        [one, two].concat()
    };
    eventually("all come", SOON, async || all().await.len() == 22).await;
    put_back(&server, &before).await;
    // In other batches.
    let shop = client(&url).await;
    publish(&shop, "orders", "new", Some("k")).await;
    eventually("all come again", SOON, async || all().await.len() == 45).await;
    let mut uids: HashSet<(String, String)> = HashSet::new();
    for message in all().await {
        uids.insert((message.text().to_owned(), message.uid.clone()));
    }
    assert_eq!(uids.len(), 23, "{uids:?}");
    // As consumers see it.
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let mut seen: HashSet<Uid> = HashSet::new();
    for _ in 0..45 {
        let delivery = next(&mut messages).await;
        seen.insert(delivery.uid());
        let headers = usize::from(delivery.payload() == b"20");
        assert_eq!(delivery.headers().len(), headers, "{:?}", delivery.headers());
        delivery.ack().unwrap();
    }
    assert_eq!(seen.len(), 23);
}

/// Of one that another database gave away under the same id, nothing is taken for the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_back_or_revived_keeps_its_uid() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    publish(&sql, "later", "x", None).await;
    let uid = "select uid::text from shardmq.outbox";
    let uid: String = sql.query_one(uid, &[]).await.unwrap().get(0);
    let _relay = Relay::start(&test, "orders").await;
    let dead = "select count(*) from shardmq.outbox_dead";
    let is_dead = async || sql.query_one(dead, &[]).await.unwrap().get::<_, i64>(0) == 1;
    eventually("it is set aside", SOON, is_dead).await;
    sql.batch_execute("update shardmq.partition set state = 'sealed'").await.unwrap();
    sql.batch_execute("update shardmq.outbox_dead set topic = 'orders'").await.unwrap();
    sql.batch_execute("select shardmq.outbox_revive()").await.unwrap();
    // It is frozen, refused and put back until the partition is open again.
    let fenced = "select count(*) from shardmq.refused";
    let is_fenced = async || sql.query_one(fenced, &[]).await.unwrap().get::<_, i64>(0) > 0;
    eventually("it is put back", SOON, is_fenced).await;
    sql.batch_execute("update shardmq.partition set state = 'open'").await.unwrap();
    let comes = async || stored(&sql, partitions[0]).await.len() == 1;
    eventually("it comes", SOON, comes).await;
    assert_eq!(stored(&sql, partitions[0]).await[0].uid, format!("{uid}:1:0"));
}
