//! Groups are looked at, moved and deleted by those who look after them.

use std::time::{Duration, SystemTime};

use shardmq::embedded::StopMode;
use shardmq::{CursorState, ErrorKind, MessageId, PartitionId, Sought, Start};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::clocks::Clocks;
use crate::support::reading::{append_texts, cursor, next, take, texts_until};
use crate::support::stored::{number, stored, topic};
use crate::support::{TestCluster, database, eventually, own_server, shared_server, within};

/// Deleted, once nobody consumes.
mod deleting;

const SECOND: Duration = Duration::from_secs(1);
/// Longer than a seek tries.
const PATIENCE: Duration = Duration::from_secs(15);
const FLUSH: &str = include_str!("../../src/store/sql/flush.sql");

/// A topic of two partitions on one node, each with three batches of two; group g has read all.
struct Ready {
    test: TestCluster,
    sql: Client,
    partitions: Vec<PartitionId>,
}

impl Ready {
    async fn new() -> Self {
        let test = TestCluster::new(1).await;
        let partitions = topic(&test, "orders", 2).await;
        let sql = test.sql(0).await;
        // In turn, so that the times of both interleave.
        for batch in 0..3 {
            for partition in &partitions {
                append_texts(&sql, *partition, [format!("{batch}"), format!("{batch}+")]).await;
            }
        }
        let ready = Self { test, sql, partitions };
        assert_eq!(ready.rest().await.len(), 12);
        ready
    }

    /// All that the group reads, by partition, from where it is to the end.
    async fn read(&self) -> Vec<Vec<String>> {
        let mut messages = self.test.cluster.consumer("orders", "g").stream().await.unwrap();
        let mut texts = vec![Vec::new(); self.partitions.len()];
        let mut open: Vec<PartitionId> = self.partitions.clone();
        for partition in &self.partitions {
            append_texts(&self.sql, *partition, ["end"]).await;
        }
        while !open.is_empty() {
            let delivery = next(&mut messages).await;
            let text = crate::support::reading::text(&delivery);
            let place = self.partitions.iter().position(|p| *p == delivery.partition()).unwrap();
            if text == "end" && delivery.id() == self.last(delivery.partition()).await {
                open.retain(|p| *p != delivery.partition());
            } else if text != "end" {
                texts[place].push(text);
            }
            delivery.ack().unwrap();
        }
        messages.shutdown(SECOND).await.unwrap();
        texts
    }

    async fn rest(&self) -> Vec<String> {
        self.read().await.concat()
    }

    async fn last(&self, partition: PartitionId) -> MessageId {
        let last = "select shardmq.last_id($1)";
        let id: i64 = self.sql.query_one(last, &[&number(partition)]).await.unwrap().get(0);
        MessageId::try_from(id).unwrap()
    }

    async fn seek(&self, to: Start) -> Vec<Sought> {
        self.test.cluster.seek("orders", "g", to, None).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_group_goes_on_where_a_seek_says() {
    let ready = Ready::new().await;
    let [a, b] = [ready.partitions[0], ready.partitions[1]];
    let all = stored(&ready.sql, a).await;
    let every = ["0", "0+", "1", "1+", "2", "2+"];
    let seeks = [
        (Start::Earliest, &every[..], &every[..]),
        (Start::Latest, &[], &[]),
        (Start::At(all[2].appended_at), &every[2..], &every[2..]),
        // Between the batch of one partition and that of the other.
        (Start::At(all[2].appended_at + Duration::from_micros(1)), &every[4..], &every[2..]),
        // Exact in the middle of a batch of its own partition, at its time in the other.
        (Start::Id(all[3].id), &every[3..], &every[2..]),
        (Start::At(SystemTime::now() + 60 * SECOND), &[], &[]),
    ];
    for (to, in_a, in_b) in seeks {
        let before = [ready.last(a).await, ready.last(b).await];
        let ahead = "update shardmq.cursor set acked_ahead = '{[7,9)}'";
        ready.sql.batch_execute(ahead).await.unwrap();
        let reset = cursor(&ready.sql, "g", a).await.reset_epoch;
        let sought = ready.seek(to).await;
        assert_eq!(sought.iter().map(|s| s.partition).collect::<Vec<_>>(), [a, b]);
        assert_eq!(sought[0].before_id, Some(before[0]), "{to:?}: all was read");
        let now = cursor(&ready.sql, "g", a).await;
        assert_eq!((now.reset_epoch, now.acked_ahead.as_str()), (reset + 1, "{}"));
        assert_eq!(now.member, None);
        assert_eq!(MessageId::try_from(now.acked_id).ok(), sought[0].acked_id);
        assert_eq!(ready.read().await, [in_a, in_b], "{to:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_named_partitions_are_moved() {
    let ready = Ready::new().await;
    let [a, b] = [ready.partitions[0], ready.partitions[1]];
    let before = cursor(&ready.sql, "g", a).await;
    let cluster = &ready.test.cluster;
    let sought = cluster.seek("orders", "g", Start::Earliest, Some(&[b, b])).await.unwrap();
    assert_eq!(sought.len(), 1);
    assert_eq!(cursor(&ready.sql, "g", a).await, before);
    assert_eq!(cursor(&ready.sql, "g", b).await.acked_id, 0);
    assert_eq!(ready.read().await[0], Vec::<String>::new());

    let stranger = PartitionId::new(1, 99).unwrap();
    let elsewhere = MessageId::new(stranger, stored(&ready.sql, a).await[0].id.day(), 1).unwrap();
    let calls = [
        ("orders", "gg", Start::Latest, None, ErrorKind::NotFound, "the nearest are g"),
        ("order", "g", Start::Latest, None, ErrorKind::NotFound, "the nearest are orders"),
        ("orders", "g", Start::Latest, Some(&[a, stranger][..]), ErrorKind::NotFound, "10199"),
        ("orders", "g", Start::Id(elsewhere), None, ErrorKind::NotFound, "10199"),
        ("orders", "g", Start::Latest, Some(&[]), ErrorKind::Invalid, "empty"),
    ];
    let untouched = cursor(&ready.sql, "g", a).await;
    for (topic, group, to, partitions, kind, words) in calls {
        let error = cluster.seek(topic, group, to, partitions).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        assert!(error.to_string().contains(words), "{error:?}");
    }
    assert_eq!(cursor(&ready.sql, "g", a).await, untouched);
}

/// Messages that come after the seek are read, whatever it went to, also past the end of the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_is_not_there_yet_and_days_that_are_dropped() {
    let ready = Ready::new().await;
    let a = ready.partitions[0];
    let last = ready.last(a).await;
    let later = MessageId::new(a, last.day(), last.sequence() + 2).unwrap();
    let sought = ready.seek(Start::Id(later)).await;
    // No time is known: the others go to the latest.
    assert_eq!(sought[1].acked_id, sought[1].before_id);
    append_texts(&ready.sql, a, ["before", "at"]).await;
    assert_eq!(ready.read().await, [vec!["at"], vec![]]);

    // Nothing is before the low watermark, by whatever way.
    let first = stored(&ready.sql, a).await[0].id.number();
    let drop = "update shardmq.partition set low_watermark = $2 where partition = $1";
    ready.sql.execute(drop, &[&number(a), &(first + 3)]).await.unwrap();
    for to in [Start::Earliest, Start::Id(MessageId::try_from(first).unwrap())] {
        ready.seek(to).await;
        assert_eq!(cursor(&ready.sql, "g", a).await.acked_id, first + 2, "{to:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seek_goes_over_days_and_makes_cursors_that_are_missing() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    let a = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    drop(test.cluster.consumer("orders", "g").start(Start::Latest).stream().await.unwrap());
    for day in 1..4 {
        clocks.set(&format!("{day} days 12:00")).await;
        append_texts(&sql, a, [day, day + 10]).await;
    }
    sql.batch_execute("delete from shardmq.cursor").await.unwrap();
    let all = stored(&sql, a).await;
    let sought = test.cluster.seek("orders", "g", Start::Id(all[3].id), None).await.unwrap();
    assert_eq!((sought[0].before_id, sought[0].acked_id), (None, Some(all[2].id)));
    let sought = test.cluster.seek("orders", "g", Start::Latest, None).await.unwrap();
    assert_eq!((sought[0].before_id, sought[0].acked_id), (Some(all[2].id), Some(all[5].id)));
    // Where a node does not know the group it hears of it.
    sql.batch_execute("delete from shardmq.cursor; delete from shardmq.group_start").await.unwrap();
    let sought = test.cluster.seek("orders", "g", Start::At(all[4].appended_at), None).await;
    assert_eq!(sought.unwrap().len(), 1);
    let position = cursor(&sql, "g", a).await.acked_id;
    assert!(position >= all[3].id.number() && position < all[4].id.number());
}

/// By SQL: neither a group that is not known here, nor a target that is none or two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_function_moves_nothing_that_it_does_not_know() {
    let ready = Ready::new().await;
    let seek = "select partition, before_id, acked_id, moved
                  from shardmq.seek($1::text, $2::text, null, $3::timestamptz, $4::bigint, $5::bool)";
    let (none, at) = (None::<SystemTime>, Some(SystemTime::UNIX_EPOCH));
    for (topic, group) in [("orders", "stranger"), ("other", "g")] {
        let rows = ready.sql.query(seek, &[&topic, &group, &at, &None::<i64>, &false]).await;
        assert!(rows.unwrap().is_empty());
    }
    for (at, latest) in [(none, false), (at, true)] {
        let refused = ready.sql.query(seek, &[&"orders", &"g", &at, &None::<i64>, &latest]).await;
        assert_eq!(refused.unwrap_err().code().unwrap().code(), "22023");
    }
    let rows: i64 =
        ready.sql.query_one("select count(*) from shardmq.cursor", &[]).await.unwrap().get(0);
    assert_eq!(rows, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_cursor_is_passed_over_and_named_when_the_patience_is_over() {
    let ready = Ready::new().await;
    let [a, b] = [ready.partitions[0], ready.partitions[1]];
    let mut blocker = ready.test.sql(0).await;
    let open = blocker.transaction().await.unwrap();
    let lock = "select from shardmq.cursor where partition = $1 for update";
    open.execute(lock, &[&number(a)]).await.unwrap();
    let before = cursor(&ready.sql, "g", a).await;
    let cluster = &ready.test.cluster;
    let seek = cluster.seek("orders", "g", Start::Earliest, None);
    let error = within(PATIENCE, "the seek", seek).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let (names, others) = (a.to_string(), b.to_string());
    assert!(error.to_string().contains(&names) && !error.to_string().contains(&others), "{error}");
    assert_eq!(cursor(&ready.sql, "g", a).await, before);
    // The other is moved, once.
    let moved = cursor(&ready.sql, "g", b).await;
    assert_eq!((moved.acked_id, moved.reset_epoch), (0, 1));

    // While it is tried the lock goes away.
    let seeking = tokio::spawn({
        let cluster = cluster.clone();
        async move { cluster.seek("orders", "g", Start::Latest, None).await }
    });
    let b_moved = || async { cursor(&ready.sql, "g", b).await.reset_epoch == 2 };
    eventually("the other is moved", 20 * SECOND, b_moved).await;
    open.rollback().await.unwrap();
    let sought = within(PATIENCE, "the seek", seeking).await.unwrap().unwrap();
    assert_eq!(sought.len(), 2);
    assert_eq!(cursor(&ready.sql, "g", a).await.reset_epoch, 1);
}

/// A flush as a member sends it.
async fn flush(
    sql: &Client,
    partition: PartitionId,
    (owner, epoch, reset): (Uuid, i64, i64),
    to: i64,
) -> String {
    let server = sql.query_one("select pg_postmaster_start_time()", &[]).await.unwrap();
    let server: SystemTime = server.get(0);
    let rows = sql
        .query(
            FLUSH,
            &[
                &"g",
                &vec![number(partition)],
                &vec![owner],
                &vec![epoch],
                &vec![reset],
                &vec![to],
                &vec!["{}"],
                &vec![server],
            ],
        )
        .await
        .unwrap();
    rows[0].get(1)
}

/// Gives a partition to a member with a lease; returns its fence.
async fn own(sql: &Client, partition: PartitionId) -> (Uuid, i64, i64) {
    let member = Uuid::now_v7();
    let lease = "insert into shardmq.member (member, group_name, leased_until, lease_secs)
                 values ($1, 'g', now() + interval '1 hour', 3600)";
    sql.execute(lease, &[&member]).await.unwrap();
    let take = "update shardmq.cursor set member = $1, owner = gen_random_uuid(), epoch = epoch + 1
                 where partition = $2 returning owner, epoch, reset_epoch";
    let row = sql.query_one(take, &[&member, &number(partition)]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_commit_never_overwrites_a_seek() {
    let ready = Ready::new().await;
    let a = ready.partitions[0];
    let last = ready.last(a).await.number();
    let fence = own(&ready.sql, a).await;
    let owned = cursor(&ready.sql, "g", a).await;
    // Composed before, sent after.
    ready.seek(Start::Earliest).await;
    assert_eq!(flush(&ready.sql, a, fence, last).await, "reset");
    let now = cursor(&ready.sql, "g", a).await;
    assert_eq!(now.acked_id, 0);
    assert_eq!((now.member, now.owner, now.epoch), (owned.member, owned.owner, owned.epoch));

    // Sent before and committed after: the seek comes after the commit, and so does its position.
    let fence = (fence.0, fence.1, now.reset_epoch);
    let late = ready.test.sql(0).await;
    late.batch_execute("begin").await.unwrap();
    assert_eq!(flush(&late, a, fence, last).await, "moved");
    let seeking = tokio::spawn({
        let cluster = ready.test.cluster.clone();
        async move { cluster.seek("orders", "g", Start::Earliest, None).await }
    });
    let b = ready.partitions[1];
    let b_moved = || async { cursor(&ready.sql, "g", b).await.reset_epoch == 2 };
    eventually("the other is moved", 20 * SECOND, b_moved).await;
    late.batch_execute("commit").await.unwrap();
    let sought = within(PATIENCE, "the seek", seeking).await.unwrap().unwrap();
    assert_eq!(sought[0].before_id, MessageId::try_from(last).ok());
    assert_eq!(cursor(&ready.sql, "g", a).await.acked_id, 0);
}

/// Something is appended and acknowledged after the seek began, and before it has the cursor's lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn latest_is_never_before_what_was_acknowledged() {
    let ready = Ready::new().await;
    let a = ready.partitions[0];
    // Who looks at the cursor for the second time, which is to lock it, waits for the gate.
    let slow = "create sequence public.looks;
        create function public.look() returns boolean language plpgsql volatile as $$ begin
            if nextval('public.looks') = 2 then perform pg_advisory_xact_lock_shared(42); end if;
            return true;
        end $$;
        alter table shardmq.cursor rename to quick;
        create view shardmq.cursor as select * from shardmq.quick where public.look()";
    ready.sql.batch_execute(slow).await.unwrap();
    let gate = ready.test.sql(0).await;
    gate.batch_execute("begin; select pg_advisory_xact_lock(42)").await.unwrap();
    let seeking = tokio::spawn({
        let cluster = ready.test.cluster.clone();
        async move { cluster.seek("orders", "g", Start::Latest, Some(&[a])).await }
    });
    let waits = "select count(*) from pg_locks where locktype = 'advisory' and objid = 42 and not granted
                    and database = (select oid from pg_database where datname = current_database())";
    let waits = async || ready.sql.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1;
    eventually("it is about to lock the cursor", 20 * SECOND, waits).await;
    let id = append_texts(&ready.sql, a, ["x"]).await;
    let acknowledge = "update shardmq.quick set acked_id = $2 where partition = $1";
    ready.sql.execute(acknowledge, &[&number(a), &id]).await.unwrap();
    gate.batch_execute("commit").await.unwrap();
    let sought = within(PATIENCE, "the seek", seeking).await.unwrap().unwrap();
    let id = MessageId::try_from(id).ok();
    assert_eq!((sought[0].before_id, sought[0].acked_id), (id, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_consumers_are_told_of_a_seek() {
    let ready = Ready::new().await;
    let config: tokio_postgres::Config = ready.test.control_url.parse().unwrap();
    let (listener, mut connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let messages = std::future::poll_fn(move |cx| connection.poll_message(cx));
        let mut messages = std::pin::pin!(futures_util::stream::unfold(messages, |mut m| async {
            Some(((&mut m).await, m))
        }));
        while let Some(Some(Ok(message))) = futures_util::StreamExt::next(&mut messages).await {
            if let tokio_postgres::AsyncMessage::Notification(n) = message {
                sender.send(n.payload().to_owned()).unwrap();
            }
        }
    });
    listener.batch_execute("listen shardmq_group").await.unwrap();
    ready.seek(Start::Earliest).await;
    let told = within(20 * SECOND, "a notification", heard.recv()).await;
    assert_eq!(told.as_deref(), Some("orders g"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_are_listed_with_their_lag_and_live_consumers() {
    let ready = Ready::new().await;
    let cluster = &ready.test.cluster;
    topic(&ready.test, "other", 1).await;
    assert!(cluster.groups(Some("other")).await.unwrap().is_empty());
    let mut messages = cluster.consumer("orders", "slow").stream().await.unwrap();
    take(&mut messages, 1).await.remove(0).ack().unwrap();
    messages.flush().await.unwrap();
    // Who is gone or silent does not count, nor who is in another topic's group of the same name.
    let elsewhere = cluster.consumer("other", "g").stream().await.unwrap();
    let dead = "insert into shardmq_control.member
            (member, topic, group_name, host, pid, heartbeat_at, gone_at)
        values (gen_random_uuid(), 'orders', 'g', 'gone', 1, now(), now()),
               (gen_random_uuid(), 'orders', 'g', 'silent', 1, now() - interval '1 hour', null)";
    ready.sql.batch_execute(dead).await.unwrap();

    let groups = cluster.groups(None).await.unwrap();
    let names: Vec<_> = groups.iter().map(|g| (g.topic.as_str(), g.group.as_str())).collect();
    assert_eq!(names, [("orders", "g"), ("orders", "slow"), ("other", "g")]);
    let [g, slow] = [&groups[0], &groups[1]];
    assert_eq!((g.members, g.partitions, g.unknown, g.lag, g.lag_secs), (0, 2, 0, 0, None));
    assert_eq!(groups[2].members, 1);
    let all = i64::try_from(slow.lag).unwrap();
    assert_eq!((slow.members, slow.unknown, all), (1, 0, 14 - 1));
    assert!(slow.lag_secs.unwrap() > 0.0 && !slow.broadcast);
    assert_eq!(slow.start_at, SystemTime::UNIX_EPOCH);
    assert_eq!(cluster.groups(Some("orders")).await.unwrap().len(), 2);
    let error = cluster.groups(Some("oders")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    messages.shutdown(Duration::ZERO).await.unwrap();
    elsewhere.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_described_with_its_consumers_and_who_has_what() {
    let ready = Ready::new().await;
    let cluster = &ready.test.cluster;
    let messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let holds = async || messages.handle().held_partitions() == 2;
    eventually("it has both", 20 * SECOND, holds).await;
    let info = cluster.group("orders", "g").await.unwrap();
    assert_eq!(info.members.len(), 1);
    let member = &info.members[0];
    assert_eq!(member.member, messages.handle().member().to_string());
    assert_eq!((member.pid, member.live), (std::process::id().try_into().unwrap(), true));
    assert!(!member.host.is_empty() && member.heartbeat_secs < 10.0);
    assert_eq!((&member.partitions, &member.unreachable), (&ready.partitions, &Vec::new()));
    for (shown, partition) in info.partitions.iter().zip(&ready.partitions) {
        let row = cursor(&ready.sql, "g", *partition).await;
        assert_eq!((shown.partition, shown.state), (*partition, CursorState::Owned));
        assert_eq!(shown.member.as_ref(), Some(&member.member));
        assert_eq!((shown.epoch, shown.reset_epoch), (Some(row.epoch), Some(row.reset_epoch)));
        assert_eq!((shown.lag, shown.acked_id), (Some(0), shown.last_id));
    }
    messages.shutdown(SECOND).await.unwrap();

    let left = async || cluster.group("orders", "g").await.unwrap().members.is_empty();
    eventually("it is gone", 2 * PATIENCE, left).await;
    // Its lease over, and silent; one partition given back.
    own(&ready.sql, ready.partitions[0]).await;
    ready.sql.batch_execute("update shardmq.member set leased_until = now()").await.unwrap();
    let insert = "insert into shardmq_control.member (member, topic, group_name, host, pid, heartbeat_at)
                  select member, 'orders', 'g', 'away', 1, now() - interval '1 hour'
                    from shardmq.cursor where member is not null
                  union all select gen_random_uuid(), 'orders', 'g', 'gone', 1, now() - interval '1 hour'";
    ready.sql.batch_execute(insert).await.unwrap();
    let info = cluster.group("orders", "g").await.unwrap();
    let states: Vec<_> = info.partitions.iter().map(|p| p.state).collect();
    assert_eq!(states, [CursorState::LeaseOver, CursorState::Free]);
    let hosts: Vec<_> = info.members.iter().map(|m| (m.host.as_str(), m.live)).collect();
    assert_eq!(hosts, [("away", false)], "who has nothing left is not shown");
    let round_trip = serde_json::from_value(serde_json::to_value(&info).unwrap()).unwrap();
    assert_eq!(info, round_trip);

    let error = cluster.group("orders", "f").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let words = "group f of topic orders does not exist; the nearest are g";
    assert_eq!(error.to_string(), words);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_shown_as_such_and_keeps_no_other_from_moving() {
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 2).await;
    let sql = [test.sql(0).await, test.sql(1).await];
    for (sql, partition) in sql.iter().zip(&partitions) {
        append_texts(sql, *partition, ["a", "end"]).await;
    }
    let builder = test.cluster.consumer("orders", "g").lease(SECOND);
    let mut messages = builder.stream().await.unwrap();
    for _ in 0..2 {
        texts_until(&mut messages, "end").await;
    }
    messages.shutdown(SECOND).await.unwrap();
    dying.stop_server(StopMode::Immediate).await.unwrap();

    let groups = within(PATIENCE, "the list", test.cluster.groups(None)).await.unwrap();
    assert_eq!((groups[0].partitions, groups[0].unknown, groups[0].lag), (2, 1, 0));
    let group = test.cluster.group("orders", "g");
    let info = within(PATIENCE, "the description", group).await.unwrap();
    let states: Vec<_> = info.partitions.iter().map(|p| (p.partition, p.state, p.lag)).collect();
    let expected = [
        (partitions[0], CursorState::Free, Some(0)),
        (partitions[1], CursorState::Unreachable, None),
    ];
    assert_eq!(states, expected);

    let seek = test.cluster.seek("orders", "g", Start::Earliest, None);
    let error = within(PATIENCE, "the seek", seek).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("node 02 failed"), "{error}");
    assert_eq!(cursor(&sql[0], "g", partitions[0]).await.acked_id, 0);
    let error = test.cluster.delete_group("orders", "g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(test.cluster.groups(None).await.unwrap().len(), 1, "control still has it");

    dying.start_server().await.unwrap();
    let again = test.cluster.seek("orders", "g", Start::Earliest, None).await.unwrap();
    assert_eq!(again.len(), 2);
    // The crash may have brought the lease back that was given up.
    deleting::deleted(&test).await;
    assert!(test.cluster.groups(None).await.unwrap().is_empty());
}
