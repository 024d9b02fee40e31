//! One message that the server refuses, among many that it takes.

use std::sync::{Arc, Mutex};

use shardmq::{ErrorKind, Message, MessageId, PartitionId};
use tokio_postgres::Client;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::support::TestCluster;
use crate::support::stored::{assert_dense, stored, table, topic};

/// Makes the server refuse messages that begin with "bad".
async fn refuse_bad(sql: &Client, partition: PartitionId) {
    let day: i32 =
        sql.query_one("select shardmq.day_of(shardmq.clock())", &[]).await.unwrap().get(0);
    let table = table(partition, day);
    let check = format!(
        "create or replace function public.no_bad(bytea[]) returns boolean language sql immutable
            as $$ select not exists (select from unnest($1) p where substr(p, 1, 3) = 'bad') $$;
         alter table {table} add constraint no_bad check (public.no_bad(payloads))"
    );
    sql.batch_execute(&check).await.unwrap();
}

async fn send_with_bad(bad: &[usize], keyed: bool) {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    refuse_bad(&sql, partition).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let message = |n: usize| {
        let text = if bad.contains(&n) { "bad" } else { "m" };
        let message = Message::new(format!("{text}{n}")).header("n", n.to_string());
        if keyed { message.key("k") } else { message }
    };
    let outcomes = producer.send_all((0..1_000).map(message)).await;
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    let mut expected: Vec<(MessageId, String)> = Vec::new();
    for (n, outcome) in outcomes.into_iter().enumerate() {
        if bad.contains(&n) {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.chain().contains("no_bad"), "{}", error.chain());
        } else {
            expected.push((outcome.unwrap(), format!("m{n}")));
        }
    }
    let found: Vec<_> = all.iter().map(|m| (m.id, m.text().to_owned())).collect();
    assert_eq!(found, expected);
    // Later ones are not held up, nor counted for what is over.
    producer.send(Message::new("later")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_message_of_a_thousand_fails_alone() {
    send_with_bad(&[617], true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_messages_at_the_ends_and_in_the_middle_fail_alone() {
    send_with_bad(&[0, 1, 500, 999], false).await;
}

/// The dedup keys are divided with their messages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_messages_among_some_with_dedup_keys_fail_alone_and_the_others_are_known() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let message = |n: usize| {
        let text = if [0, 77, 299].contains(&n) { "bad" } else { "m" };
        let message = Message::new(format!("{text}{n}")).dedup_key(format!("d{n}"));
        if n.is_multiple_of(2) { message.key(n.to_string()) } else { message }
    };
    let known = producer.send(message(150)).await.unwrap();
    refuse_bad(&sql, partition).await;
    let mut sent = Vec::new();
    for _ in 0..2 {
        let outcomes = producer.send_all((0..300).map(message)).await;
        sent.push(
            outcomes
                .into_iter()
                .map(|o| o.map_err(|e| e.kind()))
                .collect::<Vec<Result<MessageId, ErrorKind>>>(),
        );
    }
    assert_eq!(sent[0], sent[1]);
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!((all.len(), sent[0][150]), (297, Ok(known)));
    for (n, outcome) in sent[0].iter().enumerate() {
        match outcome {
            Err(kind) => assert!(*kind == ErrorKind::Invalid && [0, 77, 299].contains(&n)),
            Ok(id) => {
                let found = all.iter().find(|m| m.id == *id).unwrap();
                assert_eq!(found.text(), format!("m{n}"));
                assert_eq!(found.key, (n % 2 == 0).then(|| n.to_string()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_bad_messages_only_fails_as_a_whole() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    refuse_bad(&sql, partition).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let outcomes = producer.send_all((0..20).map(|n| Message::new(format!("bad{n}"))));
    assert!(outcomes.await.iter().all(Result::is_err));
    assert!(stored(&sql, partition).await.is_empty());
}

/// All that is logged on a thread, at every level, as text.
#[derive(Clone, Default)]
struct Everything(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Everything {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// "Failing row contains (..)" would show keys, headers and payloads to everybody who reads a log.
#[tokio::test]
async fn a_refusal_shows_no_message_in_errors_or_logs() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    refuse_bad(&sql, partition).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let log = Everything::default();
    let writer = log.clone();
    let everything = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .with_filter(LevelFilter::TRACE);
    // This test has one thread, so that no other's words are among them.
    let here = tracing_subscriber::registry().with(everything).set_default();
    let message = || Message::new("bad secret").key("secret").header("h", "secret");
    let plain = producer.send(message()).await.unwrap_err();
    let once = producer.send(message().dedup_key("secret")).await.unwrap_err();
    drop(here);
    for error in [plain, once] {
        let mut texts = vec![format!("{error:?}"), error.chain()];
        let first: &dyn std::error::Error = &error;
        for cause in std::iter::successors(Some(first), |cause| cause.source()) {
            texts.extend([cause.to_string(), format!("{cause:?}")]);
        }
        assert!(texts[0].contains("no_bad"), "{texts:?}");
        assert!(!texts.concat().contains("secret"), "{texts:?}");
    }
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("no_bad") && !log.contains("secret"), "{log}");
}
