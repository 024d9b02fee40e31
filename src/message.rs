//! What is sent: a payload, perhaps a key, perhaps headers.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use bytes::Bytes;
use serde::Serialize;

use crate::codec::{Codec, Json};
use crate::error::{Error, Result};

/// The most bytes of a key.
pub const MAX_KEY_LEN: usize = 1024;
/// The most bytes of a dedup key.
pub const MAX_DEDUP_KEY_LEN: usize = 1024;
/// The most bytes of all header names and values of a message together.
pub const MAX_HEADERS_LEN: usize = 64 * 1024;
/// The most bytes of a payload that a producer can be configured to take.
pub const MAX_PAYLOAD_LEN: usize = 64 * 1024 * 1024;
/// The most bytes of a payload unless configured otherwise.
pub const DEFAULT_MAX_PAYLOAD_LEN: usize = 4 * 1024 * 1024;

/// Header names that begin so are ShardMQ's own.
pub(crate) const RESERVED_HEADER_PREFIX: &str = "shardmq.";
/// The identity of a message that was stored elsewhere first.
pub(crate) const UID_HEADER: &str = "shardmq.uid";
/// On a message that its producer sent elsewhere without knowing whether it was stored before.
pub(crate) const DUPLICATE_HEADER: &str = "shardmq.duplicate";

/// Headers of a message, sorted by name.
pub type Headers = BTreeMap<String, String>;

/// A message to send.
///
/// ```
/// use shardmq::Message;
///
/// let message = Message::json(&serde_json::json!({"order": 7}))?
///     .key("customer-42")
///     .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
/// # Ok::<(), shardmq::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub(crate) payload: Bytes,
    pub(crate) key: Option<String>,
    pub(crate) dedup_key: Option<Box<str>>,
    pub(crate) headers: Headers,
}

impl Message {
    /// A message with these bytes, sent and received unchanged. By default up to 4 MiB.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), key: None, dedup_key: None, headers: Headers::new() }
    }

    /// A message with this value as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        Self::encoded(&Json, value)
    }

    /// A message with this value, written by a codec.
    pub fn encoded<T: Serialize + ?Sized>(codec: &impl Codec, value: &T) -> Result<Self> {
        codec.encode(value).map(Self::new)
    }

    /// Messages of one key go to one partition and are delivered in the order in which they were
    /// sent. Up to 1 KiB, without NUL characters. Without a key, a message goes where there is room.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Stores the message once: a message with a dedup key that was stored in the topic in the last two
    /// days, by whichever producer or process, is not stored again, and its send returns the id of the
    /// first. For a request that a client repeats, or a job that is started over. 1 byte to 1 KiB, without
    /// NUL characters. It is not stored with the message.
    ///
    /// The [key](Self::key) chooses the partition, as ever, and where there is none the dedup key does. So
    /// a repeat must have the same key, or again none; and with a [`Balancer`](crate::Balancer) it must be
    /// given the same partition.
    ///
    /// While the node of that partition is away the message waits for it, up to the
    /// [send timeout](crate::ProducerBuilder::send_timeout), also with
    /// [`KeyFailover::Divert`](crate::KeyFailover::Divert); with
    /// [`KeyFailover::Fail`](crate::KeyFailover::Fail) it fails at once. An attempt without an answer is
    /// repeated, which is harmless here. A send that ended with [`ErrorKind::Unknown`] may be repeated as
    /// well, with the same dedup key.
    ///
    /// [`ErrorKind::Unknown`]: crate::ErrorKind::Unknown
    pub fn dedup_key(mut self, key: impl Into<String>) -> Self {
        self.dedup_key = Some(key.into().into_boxed_str());
        self
    }

    /// Adds a header; a second one of the same name takes its place. All together up to 64 KiB,
    /// without NUL characters. Names that begin with `shardmq.` are refused.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// The payload's bytes.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// What this message counts for in buffers: the bytes of payload, key and headers.
    pub(crate) fn size(&self) -> usize {
        self.payload.len() + self.key.as_ref().map_or(0, String::len) + self.headers_len()
    }

    fn headers_len(&self) -> usize {
        self.headers.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// Checks the limits, before anything is sent.
    pub(crate) fn check(&self, max_payload: usize) -> Result<()> {
        if self.payload.len() > max_payload {
            return Err(Error::invalid(format!(
                "payload has {} bytes, the limit is {max_payload}",
                self.payload.len()
            )));
        }
        if let Some(key) = &self.key {
            check_key("key", key, 0..=MAX_KEY_LEN)?;
        }
        if let Some(key) = &self.dedup_key {
            check_key("dedup key", key, 1..=MAX_DEDUP_KEY_LEN)?;
        }
        if self.headers.is_empty() { Ok(()) } else { self.check_headers() }
    }

    fn check_headers(&self) -> Result<()> {
        let len = self.headers_len();
        if len > MAX_HEADERS_LEN {
            return Err(Error::invalid(format!(
                "headers have {len} bytes, the limit is {MAX_HEADERS_LEN}"
            )));
        }
        for (name, value) in &self.headers {
            let shown: String = name.chars().take(40).collect();
            if name.is_empty() || name.contains('\0') || value.contains('\0') {
                return Err(Error::invalid(format!(
                    "header {shown:?} has an empty name or a NUL character, which Postgres can't store"
                )));
            }
            if name.starts_with(RESERVED_HEADER_PREFIX) {
                return Err(Error::invalid(format!(
                    "header {shown:?} begins with {RESERVED_HEADER_PREFIX:?}, which is reserved"
                )));
            }
        }
        Ok(())
    }
}

fn check_key(what: &str, key: &str, limits: RangeInclusive<usize>) -> Result<()> {
    let (len, shortest, longest) = (key.len(), limits.start(), limits.end());
    if len < *shortest {
        return Err(Error::invalid(format!("{what} is empty, it needs {shortest} byte at least")));
    }
    if len > *longest {
        return Err(Error::invalid(format!("{what} has {len} bytes, the limit is {longest}")));
    }
    if key.contains('\0') {
        let why = format!("{what} has a NUL character, which Postgres can't store in text");
        return Err(Error::invalid(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(message: &Message) -> String {
        message.check(DEFAULT_MAX_PAYLOAD_LEN).unwrap_err().to_string()
    }

    #[test]
    fn limits_are_inclusive_and_errors_name_them() {
        let fits = Message::new(vec![0; DEFAULT_MAX_PAYLOAD_LEN]).key("k".repeat(MAX_KEY_LEN));
        assert!(fits.header("h", "v".repeat(MAX_HEADERS_LEN - 1)).check(4 << 20).is_ok());
        assert!(refusal(&Message::new(vec![0; 4_194_305])).contains("4194304"));
        assert!(refusal(&Message::new("").key("k".repeat(1025))).contains("1024"));
        assert!(refusal(&Message::new("").dedup_key("k".repeat(1025))).contains("1024"));
        assert!(refusal(&Message::new("").dedup_key("")).contains("dedup key is empty"));
        let fits = ["k".to_owned(), "k".repeat(MAX_DEDUP_KEY_LEN)];
        assert!(fits.into_iter().all(|key| Message::new("").dedup_key(key).check(1).is_ok()));
        let long = Message::new("").header("h", "v".repeat(MAX_HEADERS_LEN));
        assert!(refusal(&long).contains("65536"));
    }

    #[test]
    fn nul_is_refused_in_keys_and_headers_and_taken_in_payloads() {
        assert!(refusal(&Message::new("").key("a\0b")).contains("NUL"));
        assert!(refusal(&Message::new("").dedup_key("a\0b")).contains("NUL"));
        assert!(refusal(&Message::new("").header("a", "\0")).contains("NUL"));
        assert!(refusal(&Message::new("").header("", "x")).contains("empty"));
        assert!(refusal(&Message::new("").header("shardmq.uid", "x")).contains("reserved"));
        assert!(Message::new(&b"\0\xff"[..]).check(10).is_ok());
    }
}
