//! Receipts, and batches that are divided or marked.

use super::*;
use crate::error::Error;
use proptest::prelude::*;

fn id(sequence: u32) -> MessageId {
    let day = Day::from_yymmdd(261_122).unwrap();
    MessageId::new("10101".parse().unwrap(), day, sequence).unwrap()
}

async fn answers(receipts: Vec<Receipt>) -> Vec<Option<u32>> {
    let mut answers = Vec::new();
    for receipt in receipts {
        answers.push(receipt.await.ok().map(MessageId::sequence));
    }
    answers
}

#[tokio::test]
async fn receipts_are_answered_in_the_order_of_the_batch() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let receipts: Vec<_> = (0..3).map(|_| batch.push(&Message::new("x"))).collect();
    batch.tickets.complete(Ok(id(7)));
    assert_eq!(answers(receipts).await, [Some(7), Some(8), Some(9)]);
}

#[tokio::test]
async fn a_divided_batch_answers_each_message_once() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let receipts: Vec<_> = (0..4).map(|_| batch.push(&Message::new("x"))).collect();
    let (refused, rest) = batch.divide(1);
    refused.tickets.complete(Err(Error::invalid("no")));
    let (first, second) = rest.divide(2);
    second.tickets.complete(Ok(id(20)));
    first.tickets.complete(Ok(id(10)));
    assert_eq!(answers(receipts).await, [None, Some(10), Some(11), Some(20)]);
}

#[tokio::test]
async fn receipts_of_messages_with_ids_of_their_own_get_each_its_own() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Once);
    let message = Message::new("x").dedup_key("d");
    let receipts: Vec<_> = (0..7).map(|_| batch.push(&message)).collect();
    let (first, second) = batch.divide(4);
    second.tickets.complete_each(&[3, 4, 9].map(id));
    first.tickets.complete_each(&[7, 8, 3, 8].map(id));
    let expected = [7, 8, 3, 8, 3, 4, 9].map(Some);
    assert_eq!(answers(receipts).await, expected);
    assert!(first.tickets.completion.all().await.is_ok());
}

#[test]
fn parts_of_what_has_dedup_keys_stay_unknown_and_others_were_fenced() {
    for (kind, unknown) in [(Kind::Once, true), (Kind::Keyed, false)] {
        let mut batch = Batch::new(Duration::from_secs(1), kind);
        let _receipts = [(); 2].map(|()| batch.push(&Message::new("x").key("k").dedup_key("d")));
        batch.unknown = true;
        let (first, second) = batch.divide(1);
        assert_eq!((first.unknown, second.unknown), (unknown, unknown));
    }
}

#[test]
fn a_marked_message_keeps_its_headers_and_the_identity_it_had_first() {
    let uid = |text: &[u8]| {
        let headers: crate::message::Headers = serde_json::from_slice(text).unwrap();
        assert_eq!(headers[DUPLICATE_HEADER], "possible");
        headers[UID_HEADER].clone()
    };
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    drop(batch.push(&Message::new("x").header("h", "v")));
    drop(batch.push(&Message::new("y")));
    batch.sequence = Some(7);
    let marked = batch.marked(Uuid::from_u128(1));
    let texts = marked.arrays.headers.as_ref().map(Packed::unpack).unwrap();
    let text = |index| texts.element(index).unwrap().get(1..).unwrap();
    assert!(String::from_utf8_lossy(text(0)).contains(r#""h":"v""#));
    assert_eq!(uid(text(1)), format!("{}:7:1", Uuid::from_u128(1)));
    assert_eq!((marked.len(), marked.sequence), (2, None));
    let again = marked.marked(Uuid::from_u128(2));
    let texts = again.arrays.headers.as_ref().map(Packed::unpack).unwrap();
    let text = |index| texts.element(index).unwrap().get(1..).unwrap();
    assert_eq!(uid(text(1)), format!("{}:7:1", Uuid::from_u128(1)));
}

#[tokio::test]
async fn a_divided_batch_takes_no_more_messages() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let _receipts = [(); 2].map(|()| batch.push(&Message::new("x")));
    assert!(batch.has_room(1));
    let (first, second) = batch.divide(1);
    assert!(!first.has_room(1) && !second.has_room(1));
}

#[tokio::test]
async fn whoever_waits_for_all_and_whoever_waits_for_one_are_both_woken() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let one = tokio::spawn(batch.push(&Message::new("x")));
    tokio::task::yield_now().await;
    let completion = Arc::clone(&batch.tickets.completion);
    let all = tokio::spawn(async move { completion.all().await });
    tokio::task::yield_now().await;
    batch.tickets.complete(Ok(id(1)));
    assert_eq!(one.await.unwrap().unwrap(), id(1));
    all.await.unwrap().unwrap();
}

#[tokio::test]
async fn whoever_waits_for_all_hears_of_the_first_failure_when_all_are_answered() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let _receipts = [(); 3].map(|()| batch.push(&Message::new("x")));
    let completion = Arc::clone(&batch.tickets.completion);
    let (first, second) = batch.divide(1);
    first.tickets.complete(Err(Error::invalid("no")));
    let soon = tokio::time::timeout(Duration::ZERO, completion.all());
    assert!(soon.await.is_err());
    second.tickets.complete(Ok(id(1)));
    assert!(completion.all().await.is_err());
}

#[tokio::test]
async fn a_waiting_receipt_is_woken() {
    let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
    let receipt = tokio::spawn(batch.push(&Message::new("x")));
    tokio::task::yield_now().await;
    batch.tickets.complete(Ok(id(1)));
    assert_eq!(receipt.await.unwrap().unwrap(), id(1));
}

proptest! {
    #[test]
    fn dividing_keeps_every_message_key_dedup_key_and_header(
        messages in proptest::collection::vec((".{0,5}", proptest::option::of("[a-z]{1,3}"), any::<bool>()), 1..20),
        cut in 0_u32..20,
        once in any::<bool>(),
    ) {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        for (text, key, header) in &messages {
            let mut message = Message::new(text.clone());
            message.key.clone_from(key);
            message.dedup_key = once.then(|| format!("d{text}").into());
            drop(batch.push(&if *header { message.header("h", text) } else { message }));
        }
        let cost = batch.cost;
        let (a, b) = batch.divide(cut);
        prop_assert_eq!(a.cost + b.cost, cost);
        let mut seen = Vec::new();
        for half in [a, b] {
            let keys = half.arrays.keys.as_ref().map(Packed::unpack).unwrap_or_default();
            let headers = half.arrays.headers.as_ref().map(Packed::unpack).unwrap_or_default();
            let payloads = half.arrays.payloads.unpack();
            let dedup_keys = half.arrays.dedup_keys.as_ref().map(Packed::unpack).unwrap_or_default();
            prop_assert_eq!(dedup_keys.len(), if once { payloads.len() } else { 0 });
            for index in 0..payloads.len() {
                let text = |bytes: Option<&[u8]>| bytes.map(|b| String::from_utf8(b.to_vec()).unwrap());
                let payload = text(payloads.element(index)).unwrap();
                if once {
                    prop_assert_eq!(text(dedup_keys.element(index)), Some(format!("d{payload}")));
                }
                seen.push((
                    payload,
                    text(keys.element(index)),
                    headers.element(index).is_some(),
                ));
            }
        }
        prop_assert_eq!(seen, messages);
    }
}
