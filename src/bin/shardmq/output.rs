//! What is printed: lines to stdout, notes to stderr, tables, times, and messages as JSON.

use std::io::{self, Write};
use std::time::SystemTime;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;
use shardmq::{Delivery, Headers, MessageId, PartitionId, StoredMessage};
use tokio::io::{AsyncWriteExt, Stdout};

use crate::failure::{FAILED, Failure};

/// Standard output. A line is not out before `flush`, which fails where the reader has gone.
pub(crate) struct Out {
    buffer: Vec<u8>,
    stdout: Stdout,
}

impl Out {
    pub(crate) fn new() -> Self {
        let buffer = Vec::new();
        let stdout = tokio::io::stdout();
        Self { buffer, stdout }
    }

    /// Adds a value as one line of JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.buffer, value)
            .map_err(|error| Failure::new(FAILED, format!("write JSON: {error}")))?;
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Adds a line of text.
    pub(crate) fn line(&mut self, text: &str) {
        self.buffer.extend_from_slice(text.as_bytes());
        self.buffer.push(b'\n');
    }

    /// Hands everything to the reader. If dropped, some of it may have gone.
    pub(crate) async fn flush(&mut self) -> Result<(), Failure> {
        self.stdout.write_all(&self.buffer).await?;
        self.stdout.flush().await?;
        self.buffer.clear();
        Ok(())
    }
}

/// Says something to people, on stderr. Whether they hear it does not matter.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A count of messages on stderr, where that is a terminal.
pub(crate) fn counter() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {human_pos} messages in {elapsed}");
    let bar = ProgressBar::new_spinner();
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// A count of something else.
pub(crate) fn progress_of(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    let style = ProgressStyle::with_template("{spinner} {human_pos} {msg} in {elapsed}");
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// Progress towards a known count, on stderr, where that is a terminal.
pub(crate) fn progress(count: u64, doing: &'static str) -> ProgressBar {
    let template = "{msg:12} {wide_bar} {human_pos}/{human_len}";
    let bar = ProgressBar::new(count).with_message(doing);
    ProgressStyle::with_template(template)
        .map_or(bar.clone(), |style| bar.with_style(style.progress_chars("=> ")))
}

/// A table for people; the columns of these numbers are aligned to the right.
pub(crate) fn table(header: &[&str], numbers: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.to_vec())
        .add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// RFC 3339 in UTC with microseconds, which is what Postgres keeps.
pub(crate) fn time(at: SystemTime) -> String {
    Timestamp::try_from(at).map_or_else(|_| "out of range".to_owned(), |at| format!("{at:.6}"))
}

/// `1 line`, `2 lines`.
pub(crate) fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// What is there, or a dash.
pub(crate) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// An age, or a dash.
pub(crate) fn secs(age: Option<f64>) -> String {
    or_dash(age.map(|age| format!("{age:.1} s")))
}

/// A message as every command prints it. `attempt` is there where it was delivered.
#[derive(Serialize)]
pub(crate) struct MessageLine<'a> {
    id: MessageId,
    uid: String,
    topic: &'a str,
    partition: PartitionId,
    key: Option<&'a str>,
    headers: Headers,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    appended_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<u32>,
}

impl<'a> From<&'a Delivery> for MessageLine<'a> {
    fn from(delivery: &'a Delivery) -> Self {
        let (payload, payload_base64) = payload(delivery.payload());
        Self {
            id: delivery.id(),
            uid: delivery.uid().to_string(),
            topic: delivery.topic().as_str(),
            partition: delivery.partition(),
            key: delivery.key(),
            headers: delivery.headers(),
            payload,
            payload_base64,
            appended_at: time(delivery.appended_at()),
            attempt: Some(delivery.attempt()),
        }
    }
}

impl<'a> From<&'a StoredMessage> for MessageLine<'a> {
    fn from(message: &'a StoredMessage) -> Self {
        let (payload, payload_base64) = payload(&message.payload);
        Self {
            id: message.id,
            uid: message.uid.clone(),
            topic: message.topic.as_str(),
            partition: message.id.partition(),
            key: message.key.as_deref(),
            headers: message.headers.clone(),
            payload,
            payload_base64,
            appended_at: time(message.appended_at),
            attempt: None,
        }
    }
}

/// Text where the bytes are text, base64 where they are not.
fn payload(bytes: &[u8]) -> (Option<&str>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text), None),
        Err(_) => (None, Some(base64(bytes))),
    }
}

/// The standard alphabet, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| chunk.get(index).copied().map_or(0, usize::from);
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            if place <= chunk.len() {
                text.push(char::from(ALPHABET[bits >> (18 - 6 * place) & 63]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let cases = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        for (len, expected) in cases.into_iter().enumerate() {
            assert_eq!(base64(&b"foobar"[..len]), expected);
        }
        assert_eq!(base64(b"\xff\xfe\x00"), "//4A");
    }

    #[test]
    fn times_have_six_decimals_and_end_in_z() {
        let at = UNIX_EPOCH + Duration::from_millis(1_500);
        assert_eq!(time(at), "1970-01-01T00:00:01.500000Z");
        assert_eq!(time(UNIX_EPOCH), "1970-01-01T00:00:00.000000Z");
    }
}
