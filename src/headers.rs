//! Headers as Postgres stores them: a JSON object whose values come out as they are there. Pure.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::message::Headers;

/// Reads them. The value of a string is its text. Any other value is its JSON text as the server writes
/// it, also a number that no machine number can hold and arrays of any depth.
pub(crate) fn read(json: &[u8]) -> serde_json::Result<Headers> {
    let values: BTreeMap<String, &RawValue> = serde_json::from_slice(json)?;
    values.into_iter().map(|(name, value)| Ok((name, text(value)?))).collect()
}

fn text(value: &RawValue) -> serde_json::Result<String> {
    let text = value.get();
    if text.starts_with('"') { serde_json::from_str(text) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(json: &str) -> String {
        let text = format!("{{\"name\": {json}}}");
        read(text.as_bytes()).unwrap().remove("name").unwrap()
    }

    #[test]
    fn values_come_out_as_the_server_writes_them() {
        let large = format!("1{}", "0".repeat(400));
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let odd = ["1.10", "18446744073709551616", "[1, {\"b\": null}]", "null", &large, &deep];
        for json in odd {
            assert_eq!(value(json), json);
        }
        assert_eq!(value(r#""a\"b\\ü \n""#), "a\"b\\ü \n");
    }

    #[test]
    fn anything_but_an_object_is_an_error() {
        for json in ["[1]", "null", "\"a\"", "", "{\"a\": ", "{} {}", "{\"a\": \u{1}}"] {
            assert!(read(json.as_bytes()).is_err(), "{json}");
        }
    }

    proptest! {
        #[test]
        fn strings_come_out_as_they_went_in(headers: BTreeMap<String, String>) {
            let json = serde_json::to_vec(&headers).unwrap();
            prop_assert_eq!(read(&json).unwrap(), headers);
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(bytes: Vec<u8>) {
            let _ = read(&bytes);
        }
    }
}
