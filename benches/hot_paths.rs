//! What runs for every message, without a database.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use shardmq::{Message, MessageId, TopicName, key_slot};

fn ids(c: &mut Criterion) {
    let id: MessageId = "1010126112200000001".parse().unwrap();
    c.bench_function("id/parse", |b| {
        b.iter(|| black_box("1010126112200000001").parse::<MessageId>());
    });
    c.bench_function("id/format", |b| b.iter(|| black_box(id).to_string()));
}

fn keys(c: &mut Criterion) {
    c.bench_function("key_slot/11 bytes", |b| {
        b.iter(|| key_slot(black_box("customer-42")));
    });
    c.bench_function("key_slot/36 bytes", |b| {
        b.iter(|| key_slot(black_box("0199a5c2-7d1e-7c3b-9d2f-3f1c6a2b8e4d")));
    });
}

fn names(c: &mut Criterion) {
    c.bench_function("topic_name/parse", |b| {
        b.iter(|| TopicName::new(black_box("orders.placed")));
    });
}

fn messages(c: &mut Criterion) {
    let order = serde_json::json!({"order": 7, "customer": "customer-42", "cents": 1_999});
    c.bench_function("message/json with a key", |b| {
        b.iter(|| Message::json(black_box(&order)).map(|m| m.key("customer-42")));
    });
}

criterion_group!(benches, ids, keys, names, messages);
criterion_main!(benches);
