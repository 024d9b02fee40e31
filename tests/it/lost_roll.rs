//! A standby is promoted that lacks nothing but the roll of a partition to the next day: the day that
//! readers have left takes appends again.

use std::time::Duration;

use futures_util::FutureExt;
use shardmq::embedded::Server;
use shardmq::{ErrorKind, Messages, PartitionId};
use tokio::sync::mpsc;
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::put_back::{Snapshot, put_back, snapshot};
use crate::support::stored::topic;
use crate::support::{TestCluster, own_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// A consumer that has read "x" of the first day, has gone on to the second one and found nothing there.
struct Left {
    test: TestCluster,
    server: Server,
    /// The state before the roll.
    before: Snapshot,
    messages: Messages,
}

async fn append(sql: &Client, text: &str) {
    let sent = format!("select shardmq.append(10101, array['{text}']::bytea[])");
    sql.batch_execute(&sent).await.unwrap();
}

/// The server's clock is in the middle of a day, counted from that on which the test began.
async fn on_day(sql: &Client, day: u32) {
    let moved = format!(
        "update public.moved
            set ahead = midnight + interval '{day} days 12 hours' - clock_timestamp()"
    );
    sql.batch_execute(&moved).await.unwrap();
}

impl Left {
    /// `anew`: another consumer takes the position over before the roll, and reads nothing itself.
    async fn by(poll_interval: Duration, anew: bool) -> Self {
        let server = own_server().await;
        let test = TestCluster::on(&server, 1).await;
        topic(&test, "orders", 1).await;
        drop(Clocks::of(&test).await);
        let sql = test.sql(0).await;
        on_day(&sql, 0).await;
        append(&sql, "x").await;
        // As upkeep does.
        sql.batch_execute("select shardmq.make_days_ahead(10101, 3)").await.unwrap();
        let (mut messages, mut places) = consume(&test, poll_interval).await;
        assert_eq!(next(&mut messages).await, "x");
        messages.flush().await.unwrap();
        if anew {
            messages.shutdown(SECOND).await.unwrap();
            (messages, places) = consume(&test, poll_interval).await;
        }
        reach(&mut places, "empty").await;
        let before = snapshot(&server).await;
        let sql = test.sql(0).await;
        on_day(&sql, 1).await;
        sql.batch_execute("select shardmq.roll(10101, shardmq.clock())").await.unwrap();
        // Nothing tells a reader that the day has changed but a look.
        messages.handle().pause([partition(&test).await]).unwrap();
        messages.handle().resume([partition(&test).await]).unwrap();
        reach(&mut places, "closed").await;
        reach(&mut places, "empty").await;
        Self { test, server, before, messages }
    }
}

type Places = mpsc::UnboundedReceiver<&'static str>;

async fn consume(test: &TestCluster, poll_interval: Duration) -> (Messages, Places) {
    let (places, passed) = mpsc::unbounded_channel();
    let consumer = test.cluster.consumer("orders", "g").poll_interval(poll_interval);
    let consumer = consumer.failpoint(move |place| {
        let _ = places.send(place);
        async {}.boxed()
    });
    (consumer.stream().await.unwrap(), passed)
}

async fn reach(places: &mut Places, wanted: &str) {
    let reached = async { while places.recv().await != Some(wanted) {} };
    within(20 * SECOND, wanted, reached).await;
}

async fn partition(test: &TestCluster) -> PartitionId {
    test.cluster.topic("orders").await.unwrap().partitions[0].partition
}

/// The next message's text, acknowledged. The lost tail may be told before.
async fn next(messages: &mut Messages) -> String {
    loop {
        match within(20 * SECOND, "a delivery", messages.next()).await.unwrap() {
            Ok(delivery) => {
                let text = String::from_utf8(delivery.payload().to_vec()).unwrap();
                delivery.ack().unwrap();
                return text;
            }
            Err(news) => assert_eq!(news.kind(), ErrorKind::LeaseLost),
        }
    }
}

async fn nothing_is_left(test: &TestCluster, messages: &Messages) {
    within(20 * SECOND, "the flush", messages.flush()).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_appended_to_the_day_that_was_left_is_delivered() {
    let Left { test, server, before, mut messages } = Left::by(SECOND / 10, false).await;
    put_back(&server, &before).await;
    let sql = test.sql(0).await;
    append(&sql, "y1").await;
    append(&sql, "y2").await;
    assert_eq!([next(&mut messages).await, next(&mut messages).await], ["y1", "y2"]);
    on_day(&sql, 1).await;
    append(&sql, "z").await;
    assert_eq!(next(&mut messages).await, "z");
    nothing_is_left(&test, &messages).await;
}

/// Nobody looks at the partition while it stands on the earlier day.
async fn a_second_roll_hides_nothing(anew: bool) {
    let Left { test, server, before, mut messages } = Left::by(600 * SECOND, anew).await;
    messages.handle().pause([partition(&test).await]).unwrap();
    put_back(&server, &before).await;
    let sql = test.sql(0).await;
    append(&sql, "y1").await;
    append(&sql, "y2").await;
    on_day(&sql, 1).await;
    append(&sql, "z").await;
    messages.handle().resume([partition(&test).await]).unwrap();
    let texts = [next(&mut messages).await, next(&mut messages).await, next(&mut messages).await];
    assert_eq!(texts, ["y1", "y2", "z"]);
    nothing_is_left(&test, &messages).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_sees_the_partition_only_after_the_next_roll_skips_nothing() {
    a_second_roll_hides_nothing(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_only_took_over_a_position_skips_nothing() {
    a_second_roll_hides_nothing(true).await;
}
