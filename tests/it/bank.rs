//! A bank: each transfer is published in the transaction that takes the money, and paid in with `commit_in`,
//! while backends, consumers, relays and the server are killed. No money is lost or made, and each transfer
//! that was committed is paid in once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{Cluster, Delivery, Message, Order, Producer, RetryPolicy};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, own_server, within};

const SECOND: Duration = Duration::from_secs(1);
/// How long it is broken, and how long it may take to come through afterwards.
const BROKEN: Duration = Duration::from_secs(8);
const LONG: Duration = Duration::from_secs(40);
const ACCOUNTS: i64 = 20;
const AT_FIRST: i64 = 1_000;
const PAYERS: u64 = 4;
const MEMBERS: u64 = 3;

const SCHEMA: &str = "
    create table public.account (id bigint primary key, balance bigint not null);
    create table public.taken (transfer uuid not null, amount bigint not null);
    create table public.paid (transfer uuid not null, amount bigint not null);";

/// A generator of what is as good as chance, the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Takes money from one account and publishes what is to be paid into another. Whether it was committed
/// is not known where the answer is lost: the table tells.
async fn transfer(
    sql: &mut Client,
    producer: &Producer,
    chance: &mut Chance,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let accounts = ACCOUNTS.unsigned_abs();
    let (from, to) = (chance.below(accounts), chance.below(accounts));
    let amount = i64::try_from(chance.below(10)).unwrap() + 1;
    let (from, id) = (i64::try_from(from).unwrap(), uuid::Uuid::new_v4());
    let transaction = sql.transaction().await?;
    let take = "update account set balance = balance - $2 where id = $1";
    transaction.execute(take, &[&from, &amount]).await?;
    transaction.execute("insert into taken values ($1, $2)", &[&id, &amount]).await?;
    let message = Message::new(format!("{id} {amount} {to}")).key(to.to_string());
    producer.send_in(&transaction, message).await?;
    // Some think better of it.
    if chance.below(10) == 0 {
        transaction.rollback().await?;
    } else {
        transaction.commit().await?;
    }
    Ok(())
}

/// Pays in until the bank closes, through everything.
async fn pay(url: String, producer: Producer, seed: u64, open: Arc<AtomicBool>) {
    let mut chance = Chance(seed);
    while open.load(Ordering::SeqCst) {
        let Ok(mut sql) = connect(&url).await else {
            sleep(SECOND / 20).await;
            continue;
        };
        while open.load(Ordering::SeqCst)
            && transfer(&mut sql, &producer, &mut chance).await.is_ok()
        {}
    }
}

/// Pays one transfer in, exactly once.
async fn pay_in(
    sql: &mut Client,
    delivery: &mut Delivery,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let text = String::from_utf8(delivery.payload().to_vec())?;
    let mut parts = text.split(' ');
    let mut part = || parts.next().unwrap_or_default();
    let (id, amount, to): (uuid::Uuid, i64, i64) =
        (part().parse()?, part().parse()?, part().parse()?);
    let transaction = sql.transaction().await?;
    let pay = "update account set balance = balance + $2 where id = $1";
    transaction.execute(pay, &[&to, &amount]).await?;
    transaction.execute("insert into paid values ($1, $2)", &[&id, &amount]).await?;
    let acknowledged = delivery.commit_in(&transaction).await?;
    transaction.commit().await?;
    acknowledged.committed();
    Ok(())
}

/// A member of the group that lives until it is aborted, in a client of its own: with that its relay goes too.
async fn member(control: String, url: String, order: Order) {
    loop {
        let Ok(cluster) = Cluster::connect(&control).await else {
            sleep(SECOND / 10).await;
            continue;
        };
        let consumer = cluster.consumer("transfers", "bank").order(order).lease(SECOND);
        let policy = RetryPolicy::fixed(SECOND / 50).for_ever();
        let Ok(messages) = consumer.retry_policy(policy).stream().await else { continue };
        let url = url.clone();
        messages
            .run(4, move |mut delivery: Delivery| {
                let url = url.clone();
                async move {
                    let mut sql = connect(&url).await?;
                    pay_in(&mut sql, &mut delivery).await
                }
            })
            .await;
    }
}

/// Kills some of what works for the bank.
struct Killer {
    sql_url: String,
    chance: Chance,
}

impl Killer {
    /// Ends the connections of some, never its own.
    async fn backends(&mut self) -> u64 {
        let Ok(sql) = connect(&self.sql_url).await else { return 0 };
        let share = i64::try_from(self.chance.below(40)).unwrap();
        let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                     where pid <> pg_backend_pid() and backend_type = 'client backend'
                       and pid % 100 < $1::bigint";
        let row = sql.query_one(kill, &[&share]).await;
        row.map_or(0, |row| row.get::<_, i64>(0).unsigned_abs())
    }
}

async fn number(sql: &Client, text: &str) -> i64 {
    sql.query_one(text, &[]).await.unwrap().get(0)
}

/// Balances, and transfers that are not paid in once.
async fn audit(sql: &Client) -> (i64, i64, i64) {
    let wrong = "select count(*) from (
                     select t.transfer from taken t full join paid p on p.transfer = t.transfer
                      group by t.transfer, p.transfer
                     having count(t.transfer) <> 1 or count(p.transfer) <> 1) wrong";
    let sum = number(sql, "select sum(balance)::bigint from account").await;
    (sum, number(sql, wrong).await, number(sql, "select count(*) from taken").await)
}

async fn bank(order: Order) {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "transfers", 4).await;
    let url = test.node_urls[0].clone();
    let sql = test.sql(0).await;
    sql.batch_execute(SCHEMA).await.unwrap();
    let open = "insert into account select n, $2::bigint from generate_series(0::bigint, $1::bigint - 1) n";
    sql.execute(open, &[&ACCOUNTS, &AT_FIRST]).await.unwrap();
    drop(sql);

    let producer = test.cluster.producer("transfers").build().await.unwrap();
    let is_open = Arc::new(AtomicBool::new(true));
    let payers: Vec<JoinHandle<()>> = (1..=PAYERS)
        .map(|seed| tokio::spawn(pay(url.clone(), producer.clone(), seed, Arc::clone(&is_open))))
        .collect();
    let start = || tokio::spawn(member(test.control_url.clone(), url.clone(), order));
    let mut members: Vec<JoinHandle<()>> = (0..MEMBERS).map(|_| start()).collect();

    let mut killer = Killer { sql_url: server.url("postgres"), chance: Chance(7) };
    let (until, killed) = (Instant::now() + BROKEN, AtomicU64::new(0));
    let half = Instant::now() + BROKEN / 2;
    let mut restarted = false;
    // Until enough has happened for this to mean something.
    while Instant::now() < until || killed.load(Ordering::SeqCst) < 50 {
        sleep(SECOND / 5).await;
        killed.fetch_add(killer.backends().await, Ordering::SeqCst);
        if killer.chance.below(5) == 0 {
            let victim = usize::try_from(killer.chance.below(MEMBERS)).unwrap();
            members[victim].abort();
            members[victim] = start();
        }
        if !restarted && Instant::now() >= half {
            server.restart(StopMode::Immediate).await.unwrap();
            restarted = true;
        }
    }
    is_open.store(false, Ordering::SeqCst);
    for payer in payers {
        within(LONG, "the payers end", payer).await.unwrap();
    }
    let sql = test.sql(0).await;
    let (goal, paid) = (ACCOUNTS * AT_FIRST, "select count(*) from paid");
    let all = number(&sql, "select count(*) from taken").await;
    eventually("all is paid in", LONG, async || number(&sql, paid).await >= all).await;
    for member in &members {
        member.abort();
    }
    let (sum, wrong, transfers) = audit(&sql).await;
    assert_eq!((sum, wrong), (goal, 0), "of {transfers} transfers");
    assert!(transfers > 100, "{transfers}");
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sums_agree_by_key() {
    bank(Order::ByKey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sums_agree_unordered_too() {
    bank(Order::Unordered).await;
}
