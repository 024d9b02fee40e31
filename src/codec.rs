//! How values become payloads, and payloads values.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};

/// Writes values as payloads and reads them back.
///
/// An implementation MUST read what it wrote. A payload that it can't read MUST be answered with an
/// error of the kind [`ErrorKind::Decode`], never with a panic: payloads come from anywhere.
pub trait Codec {
    /// The payload of a value.
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Bytes>;

    /// The value of a payload.
    fn decode<T: DeserializeOwned>(&self, payload: &[u8]) -> Result<T>;
}

/// JSON, the default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Json;

impl Codec for Json {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Bytes> {
        serde_json::to_vec(value)
            .map(Bytes::from)
            .map_err(|error| Error::with_source(ErrorKind::Invalid, "write a value as JSON", error))
    }

    fn decode<T: DeserializeOwned>(&self, payload: &[u8]) -> Result<T> {
        serde_json::from_slice(payload)
            .map_err(|error| Error::with_source(ErrorKind::Decode, "read a payload as JSON", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn json_reads_what_it_wrote(value: Vec<(String, Option<i64>)>) {
            let payload = Json.encode(&value).unwrap();
            prop_assert_eq!(Json.decode::<Vec<(String, Option<i64>)>>(&payload).unwrap(), value);
        }

        #[test]
        fn json_answers_any_bytes_without_a_panic(payload: Vec<u8>) {
            if let Err(error) = Json.decode::<Vec<u32>>(&payload) {
                prop_assert_eq!(error.kind(), ErrorKind::Decode);
            }
        }
    }
}
