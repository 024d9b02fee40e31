//! `shardmq produce --delay`: lines in, messages for later; as many in one statement as are there.

use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;
use shardmq::{DEFAULT_MAX_PAYLOAD_LEN, MAX_DELAYED, Message, Producer, ScheduledId};
use tokio::io::{BufReader, Stdin};
use tokio::time::Instant;

use super::{Args, message};
use crate::failure::Failure;
use crate::lines::Lines;
use crate::output::{Out, counted, note};
use crate::signals::Interrupt;

/// The bytes at which a statement takes no more lines.
const BYTES: usize = 8 << 20;

/// What is printed for a line.
#[derive(Serialize)]
struct Scheduled<'a> {
    scheduled_id: Option<ScheduledId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

/// Lines that were read, by number, as messages or with what is wrong.
type Read = Vec<(u64, Result<Message, String>)>;

/// Stores each line until it is due. True: some line failed.
pub(super) async fn run(
    producer: &Producer,
    lines: &mut Lines<BufReader<Stdin>>,
    (args, delay): (&Args, Duration),
    mut out: Option<Out>,
    interrupt: &mut Interrupt,
) -> Result<bool, Failure> {
    let began = Instant::now();
    let (mut stored, mut failed) = (0, 0);
    loop {
        let first = tokio::select! {
            biased;
            () = interrupt.caught() => None,
            line = lines.next() => line?,
        };
        let Some(first) = first else { break };
        let mut bytes = first.len;
        let mut read: Read = vec![(first.number, message(args, first))];
        while read.len() < MAX_DELAYED
            && bytes < BYTES
            && let Some(Some(line)) = lines.next().now_or_never().transpose()?
        {
            bytes += line.len.min(DEFAULT_MAX_PAYLOAD_LEN);
            read.push((line.number, message(args, line)));
        }
        for (number, result) in store(producer, delay, read).await {
            match &result {
                Ok(_) => stored += 1,
                Err(why) => {
                    failed += 1;
                    note(&format!("error: line {number}: {why}"));
                }
            }
            if let Some(out) = &mut out {
                let error = result.as_ref().err().map(String::as_str);
                out.json(&Scheduled { scheduled_id: result.as_ref().ok().copied(), error })?;
            }
        }
        if let Some(waiting) = &mut out {
            match waiting.flush().await {
                // Nobody reads the ids any more. The lines are stored all the same.
                Err(Failure::ReaderGone) => out = None,
                flushed => flushed?,
            }
        }
    }
    let (stored, secs) = (counted(stored, "message"), began.elapsed().as_secs_f64());
    note(&format!("{stored} for topic {} wait until they are due, in {secs:.1} s", args.topic));
    if failed > 0 {
        note(&format!("{} failed", counted(failed, "line")));
    }
    Ok(failed > 0)
}

async fn store(
    producer: &Producer,
    delay: Duration,
    read: Read,
) -> Vec<(u64, Result<ScheduledId, String>)> {
    let messages: Vec<Message> =
        read.iter().filter_map(|(_, m)| m.as_ref().ok().cloned()).collect();
    let mut answers = producer.deliver_all_after(delay, messages).await.into_iter();
    let answer = |(number, message): (u64, Result<Message, String>)| {
        let answer = message.and_then(|_| {
            let answer = answers.next().ok_or_else(|| "no answer".to_owned())?;
            answer.map_err(|error| error.chain())
        });
        (number, answer)
    };
    read.into_iter().map(answer).collect()
}

/// A number and a unit: `500ms`, `30s`, `5m`, `2h`, `3d`, `1w`.
pub(super) fn parse_delay(text: &str) -> Result<Duration, String> {
    let form = "it is not a number and a unit: 500ms, 30s, 5m, 2h, 3d or 1w";
    let unit = text.find(|c: char| !c.is_ascii_digit()).ok_or(form)?;
    let (number, unit) = text.split_at(unit);
    let number: u64 = number.parse().map_err(|_| form)?;
    let ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 604_800_000,
        _ => return Err(form.to_owned()),
    };
    Ok(Duration::from_millis(number.saturating_mul(ms)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_a_number_and_a_unit() {
        let cases =
            [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000), ("0s", 0)];
        for (text, ms) in cases {
            assert_eq!(parse_delay(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(parse_delay("3d"), Ok(Duration::from_hours(72)));
        for text in ["", "5", "s", "-1s", "1.5s", "1 s", "1sec", "1y"] {
            assert!(parse_delay(text).is_err(), "{text}");
        }
    }
}
