//! Where a group starts, or is moved to, as an argument.

use std::time::SystemTime;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use shardmq::Start;

/// Takes earliest, latest, a time (without a zone in UTC) or a message id.
pub(crate) fn parse_start(text: &str) -> Result<Start, String> {
    match text {
        "earliest" => return Ok(Start::Earliest),
        "latest" => return Ok(Start::Latest),
        _ => {}
    }
    if text.len() == 19 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Start::Id).map_err(|error: shardmq::Error| error.chain());
    }
    let in_utc = || {
        let local = text.parse::<DateTime>().ok()?;
        Some(local.to_zoned(TimeZone::UTC).ok()?.timestamp())
    };
    text.parse::<Timestamp>()
        .ok()
        .or_else(in_utc)
        .map(|at| Start::At(SystemTime::from(at)))
        .ok_or_else(|| "it is neither earliest, latest, a time nor a message id".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_start_is_a_word_a_time_or_an_id() {
        assert_eq!(parse_start("earliest"), Ok(Start::Earliest));
        assert_eq!(parse_start("latest"), Ok(Start::Latest));
        let day = Start::At(UNIX_EPOCH + Duration::from_hours(24));
        assert_eq!(parse_start("1970-01-02T00:00:00Z"), Ok(day));
        assert_eq!(parse_start("1970-01-02T02:00:00+02:00"), Ok(day));
        assert_eq!(parse_start("1970-01-02T00:00:00"), Ok(day));
        assert_eq!(parse_start("1970-01-02"), Ok(day));
        let id = "1010126112200000001";
        assert_eq!(parse_start(id), Ok(Start::Id(id.parse().unwrap())));
        assert!(parse_start("tomorrow").is_err());
        assert!(parse_start("9999926112200000001").is_err());
    }
}
