//! The functions for SQL users: append, append_once, message, messages.

use shardmq::{Message, PartitionId};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row};

use crate::support::clocks::Clocks;
use crate::support::stored::{assert_dense, number, stored, topic};
use crate::support::{TestCluster, own_server};

async fn one(sql: &Client, text: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
    sql.query_one(text, params).await
}

/// The SQLSTATE and the words of a refusal.
fn refusal(outcome: Result<Row, Error>) -> (String, String) {
    let error = outcome.unwrap_err();
    let error = error.as_db_error().unwrap();
    (error.code().code().to_owned(), error.message().to_owned())
}

async fn ready() -> (TestCluster, Client, PartitionId) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    (test, sql, partition)
}

#[tokio::test]
async fn append_takes_arrays_by_name_and_returns_the_first_id() {
    let (_test, sql, partition) = ready().await;
    let text = "select shardmq.append(partition => $1, payloads => array['a', '\\x00ff']::bytea[],
                    keys => array['k', null], headers => array[null, '{\"h\": \"v\"}']::jsonb[])";
    let id: i64 = one(&sql, text, &[&number(partition)]).await.unwrap().get(0);
    let second: i64 = one(&sql, text, &[&number(partition)]).await.unwrap().get(0);
    assert_eq!((id % 100_000_000, second), (1, id + 2));
    let row = one(&sql, "select * from shardmq.message($1)", &[&(id + 1)]).await.unwrap();
    assert_eq!(row.get::<_, i64>("id"), id + 1);
    assert_eq!(row.get::<_, &str>("topic"), "orders");
    assert_eq!(row.get::<_, Option<&str>>("key"), None);
    assert_eq!(row.get::<_, &[u8]>("payload"), b"\0\xff");
    let header: serde_json::Value = row.get("headers");
    assert_eq!(header, serde_json::json!({"h": "v"}));
    for missing in [id + 4, id - 1, 0, 7] {
        let rows = sql.query("select * from shardmq.message($1)", &[&missing]).await;
        assert!(rows.unwrap().is_empty(), "{missing}");
    }
    assert_dense(&stored(&sql, partition).await);
}

#[tokio::test]
async fn messages_go_on_after_an_id_over_batches_and_days() {
    let (test, sql, partition) = ready().await;
    let clocks = Clocks::of(&test).await;
    for day in 0..3 {
        clocks.set(&format!("{day} days 12:00")).await;
        for batch in 0..2 {
            let payloads: Vec<Vec<u8>> = (0..3).map(|n| vec![day, batch, n]).collect();
            let append = "select shardmq.append($1, $2)";
            one(&sql, append, &[&number(partition), &payloads]).await.unwrap();
        }
    }
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!(all.len(), 18);
    for from in 0..18 {
        for max in [1, 2, 5, 100] {
            let text = "select id from shardmq.messages($1, $2, $3)";
            let params: [&(dyn ToSql + Sync); 3] =
                [&number(partition), &all[from].id.number(), &max];
            let rows = sql.query(text, &params).await.unwrap();
            let ids: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
            let rest = all[from + 1..].iter().take(usize::try_from(max).unwrap());
            assert_eq!(ids, rest.map(|m| m.id.number()).collect::<Vec<_>>());
        }
    }
}

#[tokio::test]
async fn a_repeat_returns_the_first_id_also_days_later() {
    let (test, sql, partition) = ready().await;
    let clocks = Clocks::of(&test).await;
    let append =
        "select shardmq.append($1, array['x'::bytea], producer => $2::text::uuid, sequence => $3)";
    let uuid = "00000000-0000-4000-8000-000000000001";
    let mut ids = Vec::new();
    for sequence in [1_i64, 2, 2, 1] {
        let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &uuid, &sequence];
        ids.push(one(&sql, append, &params).await.unwrap().get::<_, i64>(0));
    }
    assert_eq!(ids, [ids[0], ids[0] + 1, ids[0] + 1, ids[0]]);
    clocks.set("3 days 12:00").await;
    let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &uuid, &2_i64];
    assert_eq!(one(&sql, append, &params).await.unwrap().get::<_, i64>(0), ids[1]);
    assert_eq!(stored(&sql, partition).await.len(), 2);

    // One that comes after its successor would be stored out of order.
    let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &uuid, &9_i64];
    one(&sql, append, &params).await.unwrap();
    let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &uuid, &5_i64];
    assert!(refusal(one(&sql, append, &params).await).1.contains("overtaken"));
}

#[tokio::test]
async fn append_rolls_the_day_and_stands_where_a_later_day_is() {
    let (test, sql, partition) = ready().await;
    let clocks = Clocks::of(&test).await;
    let append = "select shardmq.append($1, array['x'::bytea])";
    let day_of = |id: i64| i32::try_from(id / 100_000_000 % 1_000_000).unwrap();
    for (at, day) in [("23:59:00", 0), ("1 day 00:00:30", 1), ("23:59:00", 1), ("4 days", 4)] {
        clocks.set(at).await;
        let id: i64 = one(&sql, append, &[&number(partition)]).await.unwrap().get(0);
        assert_eq!(day_of(id), clocks.day(day).await, "{at}");
    }
    clocks.set("40 days").await;
    let (state, words) = refusal(one(&sql, append, &[&number(partition)]).await);
    assert_eq!(state, "55000");
    assert!(words.contains("clock"), "{words}");
}

#[tokio::test]
async fn append_refuses_what_it_must() {
    let (_test, sql, partition) = ready().await;
    let p = number(partition);
    let calls = [
        ("array['x'::bytea], producer => gen_random_uuid()", "22023"),
        ("array['x'::bytea], sequence => 1", "22023"),
        ("array[]::bytea[]", "22023"),
        ("null", "22023"),
        ("array[null, 'x']::bytea[]", "23514"),
        ("array[array['x', 'y']]::bytea[]", "23514"),
        ("array['x'::bytea], keys => array['a', 'b']", "23514"),
        ("array['x'::bytea], headers => array['{}', '{}']::jsonb[]", "23514"),
        ("array['x'::bytea], headers => array['[1]']::jsonb[]", "23514"),
        ("array['x'::bytea], keys => array[repeat('k', 1025)]", "23514"),
        (
            "array['x'::bytea], headers => array[jsonb_build_object('h', repeat('v', 65536))]",
            "23514",
        ),
        ("array_fill('x'::bytea, array[100001])", "22023"),
    ];
    for (arguments, expected) in calls {
        let call = format!("select shardmq.append({p}, {arguments})");
        let (state, words) = refusal(one(&sql, &call, &[]).await);
        assert_eq!(state, expected, "{arguments}: {words}");
    }
    let (state, words) =
        refusal(one(&sql, "select shardmq.append(10199, array['x'::bytea])", &[]).await);
    assert_eq!(state, "55000");
    assert!(words.contains("10199") && words.contains("unknown partition"), "{words}");
    assert!(stored(&sql, partition).await.is_empty());
}

#[tokio::test]
async fn append_once_returns_the_first_id_and_shares_keys_with_the_library() {
    let (test, sql, partition) = ready().await;
    let clocks = Clocks::of(&test).await;
    clocks.set("23:59").await;
    let text = "select shardmq.append_once(partition => $1, payload => 'x', dedup_key => 'a',
                    key => 'k', headers => '{\"h\": \"v\"}')";
    let id: i64 = one(&sql, text, &[&number(partition)]).await.unwrap().get(0);
    // Over midnight too.
    clocks.set("1 day 00:01").await;
    let new = one(&sql, "select shardmq.append_once($1, 'z', 'new')", &[&number(partition)]).await;
    assert_eq!(new.unwrap().get::<_, i64>(0) % 100_000_000, 1);
    assert_eq!(one(&sql, text, &[&number(partition)]).await.unwrap().get::<_, i64>(0), id);
    let producer = clocks.on(test.cluster.producer("orders")).build().await.unwrap();
    let sent = producer.send(Message::new("x").dedup_key("a")).await.unwrap();
    assert_eq!(sent.number(), id);
    let sent = producer.send(Message::new("y").dedup_key("b")).await.unwrap();
    let plain = "select shardmq.append_once($1, 'x', 'b')";
    assert_eq!(
        one(&sql, plain, &[&number(partition)]).await.unwrap().get::<_, i64>(0),
        sent.number()
    );
    let row = one(&sql, "select * from shardmq.message($1)", &[&id]).await.unwrap();
    assert_eq!(row.get::<_, &str>("key"), "k");
    assert_eq!(row.get::<_, serde_json::Value>("headers"), serde_json::json!({"h": "v"}));
    assert_eq!(stored(&sql, partition).await.len(), 3);
    // It is not there until its transaction has committed.
    sql.batch_execute(&format!(
        "begin; select shardmq.append_once({partition}, 'x', 'c'); rollback"
    ))
    .await
    .unwrap();
    one(&sql, "select shardmq.append_once($1, 'x', 'c')", &[&number(partition)]).await.unwrap();
    assert_eq!(stored(&sql, partition).await.len(), 4);
}

#[tokio::test]
async fn append_once_refuses_what_it_must() {
    let (_test, sql, partition) = ready().await;
    let calls = [
        ("'x', null", "23502"),
        ("'x', ''", "23514"),
        ("'x', repeat('k', 1025)", "23514"),
        ("null, 'a'", "23502"),
        ("'x', 'a', repeat('k', 1025)", "23514"),
        ("'x', 'a', headers => '[1]'", "23514"),
    ];
    for (arguments, expected) in calls {
        let call = format!("select shardmq.append_once({partition}, {arguments})");
        let (state, words) = refusal(one(&sql, &call, &[]).await);
        assert_eq!(state, expected, "{arguments}: {words}");
    }
    let unknown = refusal(one(&sql, "select shardmq.append_once(10199, 'x', 'a')", &[]).await);
    assert_eq!(unknown.0, "55000");
    assert!(unknown.1.contains("10199: unknown partition"), "{}", unknown.1);
    let keys = one(&sql, "select count(*) from shardmq.sent_key", &[]).await.unwrap();
    assert_eq!((stored(&sql, partition).await.len(), keys.get::<_, i64>(0)), (0, 0));
}

/// The library draws a new sequence for each attempt.
#[tokio::test]
async fn a_sequence_that_another_batch_has_is_not_taken_for_a_duplicate() {
    let (_test, sql, partition) = ready().await;
    let append = "select outcome, ids is null from shardmq.append_batch_once($1,
        (select topic_id from shardmq.partition), 1,
        (select day from shardmq.partition), '00000000-0000-4000-8000-000000000001', $2,
        null, null, array['x'::bytea], array[$3])";
    let mut outcomes = Vec::new();
    for (sequence, key) in [(1_i64, "a"), (1, "a"), (1, "b"), (3, "c"), (2, "d"), (2, "c")] {
        let row = one(&sql, append, &[&number(partition), &sequence, &key]).await.unwrap();
        outcomes.push((row.get::<_, String>(0), row.get::<_, bool>(1)));
    }
    let outcomes: Vec<_> = outcomes.iter().map(|(o, none)| (o.as_str(), *none)).collect();
    let (appended, duplicate, overtaken) =
        (("appended", false), ("duplicate", false), ("overtaken", true));
    assert_eq!(outcomes, [appended, duplicate, overtaken, appended, overtaken, duplicate]);
    assert_eq!(stored(&sql, partition).await.len(), 2);
}

/// Both functions for one partition.
fn appends(partition: PartitionId) -> [String; 2] {
    [
        format!("select shardmq.append({partition}, array['x'::bytea])"),
        format!("select shardmq.append_once({partition}, 'x', gen_random_uuid()::text)"),
    ]
}

#[tokio::test]
async fn appends_refuse_isolation_levels_in_which_they_would_not_see_their_predecessors() {
    let (_test, sql, partition) = ready().await;
    for level in ["repeatable read", "serializable"] {
        for append in appends(partition) {
            sql.batch_execute(&format!("begin isolation level {level}")).await.unwrap();
            let (state, words) = refusal(one(&sql, &append, &[]).await);
            sql.batch_execute("rollback").await.unwrap();
            assert_eq!(state, "25000");
            assert!(words.contains(level), "{words}");
        }
    }
}

#[tokio::test]
async fn appends_are_durable_and_bounded_in_time_whatever_the_session_says() {
    let (_test, sql, partition) = ready().await;
    for append in appends(partition) {
        sql.batch_execute("set synchronous_commit = off; begin").await.unwrap();
        one(&sql, &append, &[]).await.unwrap();
        let settings = "select current_setting('synchronous_commit'),
            current_setting('idle_in_transaction_session_timeout'), current_setting('lock_timeout')";
        let row = one(&sql, settings, &[]).await.unwrap();
        let settings: [&str; 3] = [row.get(0), row.get(1), row.get(2)];
        assert_eq!(settings, ["on", "5s", "30s"]);
        sql.batch_execute("commit").await.unwrap();
    }
}

/// A role that may append can't store under the identity of another's producer, nor overtake it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_appends_takes_no_place_of_another_producer() {
    // Roles are the server's.
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("first")).await.unwrap();
    let sql = test.sql(0).await;
    sql.batch_execute(
        "create role appender login password 'secret'; grant usage on schema shardmq to appender;
         grant execute on function shardmq.append to appender",
    )
    .await
    .unwrap();
    let theirs: uuid::Uuid = stored_producer(&sql, partition).await;
    let mut config: tokio_postgres::Config = test.node_urls[0].parse().unwrap();
    config.user("appender").password("secret");
    let (appender, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let append = "select shardmq.append($1, array['x'::bytea], producer => $2, sequence => $3)";
    let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &theirs, &i64::MAX];
    let id: i64 = appender.query_one(append, &params).await.unwrap().get(0);
    producer.send(Message::new("second")).await.unwrap();
    // Its own repeats are known as ever.
    assert_eq!(appender.query_one(append, &params).await.unwrap().get::<_, i64>(0), id);
    let params: [&(dyn ToSql + Sync); 3] = [&number(partition), &theirs, &i64::MAX];
    assert_ne!(sql.query_one(append, &params).await.unwrap().get::<_, i64>(0), id);
}

async fn stored_producer(sql: &Client, partition: PartitionId) -> uuid::Uuid {
    let uid = "select split_part(uid, ':', 1)::uuid from shardmq.messages($1) limit 1";
    sql.query_one(uid, &[&number(partition)]).await.unwrap().get(0)
}

/// Headers of ShardMQ's own are the library's: consumers and dedup go by them.
#[tokio::test]
async fn who_may_append_can_set_no_header_of_the_librarys() {
    let (_test, sql, partition) = ready().await;
    let forged = r#"{"shardmq.uid": "11111111-1111-4111-8111-111111111111:8:0"}"#;
    for forging in [
        format!(
            "select shardmq.append({partition}, array['x']::bytea[], null, array['{forged}']::jsonb[])"
        ),
        format!("select shardmq.append_once({partition}, 'x', 'k', null, '{forged}')"),
        format!("select shardmq.append_once({partition}, 'x', 'k', null, '{{\"shardmq.\": 1}}')"),
    ] {
        let (code, message) = refusal(one(&sql, &forging, &[]).await);
        assert!(code == "22023" && message.contains("reserved"), "{forging}: {message}");
    }
}
