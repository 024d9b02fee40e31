//! `shardmq produce`: lines in, messages out. Memory is bounded by the producer's buffer and a window
//! of receipts, however long the input is; ids are printed in the order of the lines.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use clap::Parser;
use futures_util::FutureExt;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::value::RawValue;
use shardmq::{DEFAULT_MAX_PAYLOAD_LEN, Message, MessageId, Producer, Receipt};
use tokio::io::{BufReader, Stdin};
use tokio::time::Instant;

use crate::context::Context;
use crate::failure::Failure;
use crate::lines::{Line, Lines};
use crate::output::{Out, counted, counter, note};
use crate::signals::Interrupt;

mod delayed;

/// How many lines may be under way.
const WINDOW: usize = 50_000;
const READ_BYTES: usize = 256 << 10;
const SHUTDOWN: Duration = Duration::from_secs(35);

/// Send each line of stdin as a message.
///
/// A line up to its newline is a message, unchanged: also an empty one, and with a carriage return. With
/// `--json` prints the id of each, in the order of the lines.
#[derive(Parser)]
pub(crate) struct Args {
    topic: String,
    /// Take the key from this field of each line, which must be a JSON object.
    #[arg(long, value_name = "FIELD")]
    key_field: Option<String>,
    /// Take the dedup key from this field of each line, which must be a JSON object: a message whose dedup
    /// key was sent to the topic in the last two days is not stored again, and has the id of the first.
    #[arg(long, value_name = "FIELD", conflicts_with = "delay")]
    dedup_key_field: Option<String>,
    /// Add a header to each message; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header)]
    header: Vec<(String, String)>,
    /// Send each message after a while: 500ms, 30s, 5m, 2h, 3d, 1w. Until then it waits on a node; with
    /// `--json` prints the id by which it can be taken back.
    #[arg(long, value_name = "DURATION", value_parser = delayed::parse_delay)]
    delay: Option<Duration>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let cluster = context.connect().await?;
    let producer = cluster.producer(&args.topic).build().await?;
    let stdin = BufReader::with_capacity(READ_BYTES, tokio::io::stdin());
    let mut lines = Lines::new(stdin, DEFAULT_MAX_PAYLOAD_LEN);
    if let Some(delay) = args.delay {
        let out = context.json.then(Out::new);
        let failed = delayed::run(&producer, &mut lines, (&args, delay), out, &mut interrupt).await;
        let _ = producer.shutdown(SHUTDOWN).await;
        cluster.shutdown().await;
        return if failed? { Err(Failure::Reported) } else { Ok(()) };
    }
    let mut session = Session {
        lines,
        producer,
        args,
        window: VecDeque::new(),
        out: context.json.then(Out::new),
        sent: 0,
        failed: 0,
        counter: counter(),
    };
    let began = Instant::now();
    let mut outcome = session.send_all(&mut interrupt).await;
    while outcome.is_ok() && !session.window.is_empty() {
        outcome = session.settle().await;
    }
    // Lines that were read are sent, also after an error of the input.
    let _ = session.producer.shutdown(SHUTDOWN).await;
    cluster.shutdown().await;
    session.summarize(began.elapsed());
    outcome?;
    if session.failed > 0 {
        return Err(Failure::Reported);
    }
    Ok(())
}

/// A line under way.
struct Pending {
    number: u64,
    answer: Answer,
}

enum Answer {
    ToCome(Receipt),
    Here(Result<MessageId, String>),
}

/// What is printed for a line.
#[derive(Serialize)]
struct Sent<'a> {
    id: Option<MessageId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

struct Session {
    lines: Lines<BufReader<Stdin>>,
    producer: Producer,
    args: Args,
    window: VecDeque<Pending>,
    /// None where ids are not asked for.
    out: Option<Out>,
    sent: u64,
    failed: u64,
    counter: ProgressBar,
}

impl Session {
    /// Sends until the end of the input, or a signal.
    async fn send_all(&mut self, interrupt: &mut Interrupt) -> Result<(), Failure> {
        loop {
            tokio::select! {
                biased;
                () = interrupt.caught() => {
                    note("interrupted: what was read until now is sent");
                    return Ok(());
                }
                () = front(&mut self.window), if !self.window.is_empty() => self.settle().await?,
                line = self.lines.next(), if self.window.len() < WINDOW => match line? {
                    Some(line) => {
                        let pending = self.send(line).await;
                        self.window.push_back(pending);
                    }
                    None => return Ok(()),
                },
            }
        }
    }

    async fn send(&self, line: Line) -> Pending {
        let number = line.number;
        let answer = match message(&self.args, line) {
            Ok(message) => match self.producer.enqueue(message).await {
                Ok(receipt) => Answer::ToCome(receipt),
                Err(error) => Answer::Here(Err(error.chain())),
            },
            Err(why) => Answer::Here(Err(why)),
        };
        Pending { number, answer }
    }

    /// Waits for the first line under way, and takes all that are answered with it.
    async fn settle(&mut self) -> Result<(), Failure> {
        front(&mut self.window).await;
        while front(&mut self.window).now_or_never().is_some() {
            let Some(pending) = self.window.pop_front() else {
                break;
            };
            if let Answer::Here(result) = &pending.answer {
                self.settled(pending.number, result)?;
            }
        }
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        match out.flush().await {
            // Nobody reads the ids any more. The lines are sent all the same.
            Err(Failure::ReaderGone) => self.out = None,
            flushed => flushed?,
        }
        Ok(())
    }

    fn settled(&mut self, number: u64, result: &Result<MessageId, String>) -> Result<(), Failure> {
        match result {
            Ok(_) => self.sent += 1,
            Err(why) => {
                self.failed += 1;
                self.counter.suspend(|| note(&format!("error: line {number}: {why}")));
            }
        }
        self.counter.inc(1);
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        let id = result.as_ref().ok().copied();
        let error = result.as_ref().err().map(String::as_str);
        out.json(&Sent { id, error })
    }

    fn summarize(&self, took: Duration) {
        self.counter.finish_and_clear();
        let (sent, secs) = (counted(self.sent, "message"), took.as_secs_f64());
        let topic = &self.args.topic;
        note(&format!("{sent} sent to topic {topic} in {secs:.1} s"));
        if self.failed > 0 {
            note(&format!("{} failed", counted(self.failed, "line")));
        }
    }
}

fn message(args: &Args, line: Line) -> Result<Message, String> {
    if line.len > line.bytes.len() {
        let (len, limit) = (line.len, DEFAULT_MAX_PAYLOAD_LEN);
        return Err(format!("payload has {len} bytes, the limit is {limit}"));
    }
    let text_of = |field: &Option<String>| {
        field.as_deref().map(|field| key_of(&line.bytes, field)).transpose()
    };
    let (key, dedup_key) = (text_of(&args.key_field)?, text_of(&args.dedup_key_field)?);
    let mut message = Message::new(line.bytes);
    if let Some(key) = key {
        message = message.key(key);
    }
    if let Some(key) = dedup_key {
        message = message.dedup_key(key);
    }
    for (name, value) in &args.header {
        message = message.header(name, value);
    }
    Ok(message)
}

/// Returns when the first line under way, if any, is answered. Cancel safe.
async fn front(window: &mut VecDeque<Pending>) {
    if let Some(pending) = window.front_mut()
        && let Answer::ToCome(receipt) = &mut pending.answer
    {
        let result = receipt.await.map_err(|error| error.chain());
        pending.answer = Answer::Here(result);
    }
}

/// The key in a field of a JSON object: a string as it is, another scalar as its JSON text.
fn key_of(line: &[u8], field: &str) -> Result<String, String> {
    let object: HashMap<String, &RawValue> = serde_json::from_slice(line)
        .map_err(|error| format!("no JSON object to take the key from: {error}"))?;
    let value = object
        .get(field)
        .ok_or_else(|| format!("the JSON object has no field {field:?} to take the key from"))?;
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'"') => {
            serde_json::from_str(text).map_err(|error| format!("field {field:?}: {error}"))
        }
        Some(b'{' | b'[') => Err(format!("field {field:?} is no string, number, boolean or null")),
        _ => Ok(text.to_owned()),
    }
}

pub(crate) fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is not of the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_string_or_the_text_of_a_scalar() {
        let line = br#"{"s":"a\u00e4\"","n":1.50,"big":12345678901234567890123,"b":true,"z":null}"#;
        let cases = [
            ("s", "aä\""),
            ("n", "1.50"),
            ("big", "12345678901234567890123"),
            ("b", "true"),
            ("z", "null"),
        ];
        for (field, key) in cases {
            assert_eq!(key_of(line, field).as_deref(), Ok(key));
        }
        assert_eq!(key_of(b" { \"a\" : 7 }\r", "a").as_deref(), Ok("7"));
    }

    #[test]
    fn a_line_without_a_key_is_refused_with_a_reason() {
        let refusal = |line: &[u8]| key_of(line, "a").unwrap_err();
        assert!(refusal(b"plain text").contains("no JSON object"));
        assert!(refusal(b"").contains("no JSON object"));
        assert!(refusal(b"[1]").contains("no JSON object"));
        assert!(refusal(b"{\"a\":\"\xff\"}").contains("no JSON object"));
        assert!(refusal(b"{\"b\":1}").contains("no field \"a\""));
        assert!(refusal(b"{\"a\":[1]}").contains("no string"));
    }
}
