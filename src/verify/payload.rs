//! Payloads that show whether they arrived as they were sent.
//!
//! ```text
//! 0   checksum of all that follows (8 bytes, little endian, as all numbers here)
//! 8   value (8)
//! 16  length of the whole (4)
//! 20  length of the key (2), or 65,535 without a key
//! 22  "MQ"
//! 24  key, then filling that follows from the value
//! ```

use crate::error::{Error, ErrorKind, Result};
use crate::verify::event::Value;
use crate::verify::record::mix;

const HEAD_LEN: usize = 24;
const MARK: [u8; 2] = *b"MQ";
const NO_KEY: u16 = u16::MAX;

/// What a checked payload carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<'a> {
    /// The value.
    pub value: Value,
    /// The key that the message was sent with, so that a delivery with another key shows.
    pub key: Option<&'a str>,
}

impl<'a> Payload<'a> {
    /// The shortest payload, in bytes: one without a key. A key adds its length.
    pub const MIN_LEN: usize = HEAD_LEN;

    /// Writes it, filled up to `len` bytes (longer where value and key need more). A key of 65,535
    /// bytes or more, or a length of 4 GiB or more, is refused.
    pub fn encode(&self, len: usize) -> Result<Vec<u8>> {
        let key = self.key.unwrap_or_default();
        let len = len.max(HEAD_LEN + key.len());
        let key_len = u16::try_from(key.len()).ok().filter(|len| *len < NO_KEY);
        let (Some(key_len), Ok(total)) = (key_len, u32::try_from(len)) else {
            return Err(Error::invalid(
                "a checked payload has a key below 65,535 bytes and is below 4 GiB",
            ));
        };
        let key_len = if self.key.is_some() { key_len } else { NO_KEY };
        let mut bytes = Vec::with_capacity(len + 8);
        bytes.extend([0; 8]);
        bytes.extend(self.value.number().to_le_bytes());
        bytes.extend(total.to_le_bytes());
        bytes.extend(key_len.to_le_bytes());
        bytes.extend(MARK);
        bytes.extend(key.as_bytes());
        fill(&mut bytes, len, self.value);
        let sum = checksum(&bytes[8..]);
        bytes[..8].copy_from_slice(&sum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote. Anything else is an error of the kind
    /// [`ErrorKind::Decode`]: record such a message with no value, as damaged.
    pub fn decode(bytes: &'a [u8]) -> Result<Self> {
        read(bytes).ok_or_else(|| {
            let what = format!("read a checked payload of {} bytes", bytes.len());
            Error::new(ErrorKind::Decode, what)
        })
    }
}

fn read(bytes: &[u8]) -> Option<Payload<'_>> {
    let head: &[u8; HEAD_LEN] = bytes.first_chunk()?;
    let [.., k0, k1, m0, m1] = *head;
    let sum = u64::from_le_bytes(*head.first_chunk()?);
    let value = u64::from_le_bytes(*head[8..].first_chunk()?);
    let total = u32::from_le_bytes(*head[16..].first_chunk()?);
    if [m0, m1] != MARK || usize::try_from(total).ok()? != bytes.len() {
        return None;
    }
    if checksum(&bytes[8..]) != sum {
        return None;
    }
    let key = match u16::from_le_bytes([k0, k1]) {
        NO_KEY => None,
        len => {
            let key = bytes.get(HEAD_LEN..HEAD_LEN + usize::from(len))?;
            Some(std::str::from_utf8(key).ok()?)
        }
    };
    let value = Value::from_number(value);
    Some(Payload { value, key })
}

/// Letters that follow from the value: neither all alike nor beyond compression.
fn fill(bytes: &mut Vec<u8>, len: usize, value: Value) {
    let mut state = value.number();
    while bytes.len() < len {
        state = mix(state);
        bytes.extend(state.to_le_bytes().map(|byte| b'a' + byte % 16));
    }
    bytes.truncate(len);
}

/// Sees every changed, missing and misplaced word.
fn checksum(bytes: &[u8]) -> u64 {
    let chunks = bytes.chunks_exact(8);
    let mut last = [0; 8];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    let words = chunks.filter_map(|chunk| chunk.first_chunk().copied());
    words.chain([last]).fold(0, |state, word| mix(state.rotate_left(1) ^ u64::from_le_bytes(word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn payloads_round_trip_and_have_the_length_that_was_asked(
            number: u64, key in proptest::option::of("[a-z]{0,40}"), len in 0_usize..500,
        ) {
            let payload = Payload { value: Value::from_number(number), key: key.as_deref() };
            let bytes = payload.encode(len).unwrap();
            let least = Payload::MIN_LEN + key.as_ref().map_or(0, String::len);
            prop_assert_eq!(bytes.len(), len.max(least));
            prop_assert_eq!(Payload::decode(&bytes).unwrap(), payload);
        }

        #[test]
        fn a_changed_byte_or_a_cut_shows(
            number: u64, len in 24_usize..200, at: prop::sample::Index, change in 1_u8..,
        ) {
            let payload = Payload { value: Value::from_number(number), key: Some("key") };
            let mut bytes = payload.encode(len).unwrap();
            let at = at.index(bytes.len());
            prop_assert!(Payload::decode(&bytes[..at]).is_err());
            bytes[at] ^= change;
            prop_assert_eq!(Payload::decode(&bytes).unwrap_err().kind(), ErrorKind::Decode);
        }
    }
}
