//! That a long history takes no more memory than was allowed; and what histories on disk are like.

use std::fs;
use std::time::Duration;

use crate::error::ErrorKind;
use crate::verify::test_kit::{MILLI, held, id_in, uid, value};
use crate::verify::{CheckOptions, Event, History, Recorder, check};

/// Five events each.
const MESSAGES: u32 = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
const PARTITIONS: u8 = 4;
const MEMORY: usize = 1 << 20;

fn note(recorder: &mut Recorder, at: u64, event: &Event) {
    recorder.record(Duration::from_nanos(at), event).unwrap();
}

/// Several writers' and readers' files, whose events interleave.
fn record(history: &History) {
    let mut producer = history.recorder().unwrap();
    let mut consumer = history.recorder().unwrap();
    let mut reader = history.recorder().unwrap();
    for number in 1..=MESSAGES {
        let part = 1 + u8::try_from(number % u32::from(PARTITIONS)).unwrap();
        let id = id_in(part, number.div_ceil(PARTITIONS.into()));
        let (value, uid, holding) = (value(number), uid(number.into()), held(1));
        let lane = Some(u64::from(part));
        let at = u64::from(number) * 1_000;
        note(&mut producer, at, &Event::Sending { value, lane });
        note(&mut producer, at + 10, &Event::Acknowledged { value, id });
        let delivered = Event::Delivered { holding, id, uid, value: Some(value) };
        note(&mut consumer, at + 20, &delivered);
        note(&mut consumer, at + 30, &Event::Acked { holding, id });
        // Every thousandth is lost.
        if number % 1_000 != 0 {
            let stored = Event::Stored { id, uid, value: Some(value), marked_duplicate: false };
            note(&mut reader, at, &stored);
        }
    }
}

#[test]
fn a_long_history_is_checked_in_little_memory() {
    let history = History::new(&std::env::temp_dir()).unwrap();
    record(&history);
    let options = CheckOptions { memory_bytes: MEMORY, ..CheckOptions::default() };
    let report = check(&history, &options).unwrap();
    let messages = u64::from(MESSAGES);
    assert_eq!(report.work.events, messages * 5 - messages / 1_000);
    assert_eq!(report.acknowledged, messages);
    assert_eq!(report.lost, messages / 1_000);
    assert_eq!(report.violations, report.lost);
    assert_eq!(report.anomalies.len(), 10);
    assert!(report.work.peak_buffer_bytes <= MEMORY);
    assert!(report.work.spilled_runs > 50, "{:?}", report.work);
    assert!(report.work.spilled_bytes > 100 * messages);
    // Nothing is left behind but the history.
    assert_eq!(fs::read_dir(history.folder()).unwrap().count(), 3);
}

#[test]
fn a_history_can_be_kept_and_opened_and_recorded_on() {
    let under = tempfile::tempdir().unwrap();
    let history = History::new(under.path()).unwrap();
    let value = value(1);
    let mut recorder = history.recorder().unwrap();
    note(&mut recorder, MILLI, &Event::Sending { value, lane: None });
    let options = CheckOptions::default();
    assert_eq!(check(&history, &options).unwrap_err().kind(), ErrorKind::Conflict);
    drop(recorder);
    let folder = history.keep();

    let history = History::open(&folder).unwrap();
    let mut recorder = history.recorder().unwrap();
    let id = id_in(1, 1);
    note(&mut recorder, 2 * MILLI, &Event::Acknowledged { value, id });
    recorder.close().unwrap();
    let report = check(&history, &options).unwrap();
    assert_eq!((report.acknowledged, report.lost), (1, 1));
    drop(history);
    assert!(folder.exists(), "what was kept stays");
}

#[test]
fn a_record_that_was_cut_off_by_a_crash_is_left_out() {
    let history = History::new(&std::env::temp_dir()).unwrap();
    let mut recorder = history.recorder().unwrap();
    for number in 1..=2 {
        let value = value(number);
        note(&mut recorder, MILLI, &Event::Sending { value, lane: None });
    }
    recorder.close().unwrap();
    let path = history.folder().join("recorder-00000.bin");
    let len = fs::metadata(&path).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(len - 20).unwrap();
    let report = check(&history, &CheckOptions::default()).unwrap();
    assert_eq!(report.unknown, 1);
}

#[test]
fn events_of_a_recorder_stay_in_their_order_whatever_the_clock_says() {
    let history = History::new(&std::env::temp_dir()).unwrap();
    let mut recorder = history.recorder().unwrap();
    let holding = held(1);
    for (at, number) in [(5 * MILLI, 1), (4 * MILLI, 2), (4 * MILLI, 3)] {
        let delivered = Event::Delivered {
            holding,
            id: id_in(1, number),
            uid: uid(number.into()),
            value: Some(value(number)),
        };
        note(&mut recorder, at, &delivered);
    }
    recorder.close().unwrap();
    let report = check(&history, &CheckOptions::default()).unwrap();
    assert_eq!((report.delivered, report.delivery_order), (3, 0));
}

#[test]
fn what_is_no_history_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = History::open(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let path = folder.path().join("recorder-00000.bin");
    fs::write(&path, "something else").unwrap();
    let history = History::open(folder.path()).unwrap();
    let error = check(&history, &CheckOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
}

#[test]
fn a_report_is_flat_json_with_values_and_ids_as_text() {
    let history = History::new(&std::env::temp_dir()).unwrap();
    let mut recorder = history.recorder().unwrap();
    let (value, id) = (value(1), id_in(1, 1));
    note(&mut recorder, MILLI, &Event::Acknowledged { value, id });
    recorder.close().unwrap();
    let report = check(&history, &CheckOptions::default()).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["lost"], 1);
    assert_eq!(json["violations"], 1);
    let anomaly = &json["anomalies"][0];
    assert_eq!(anomaly["kind"], "lost");
    assert_eq!(anomaly["values"][0], "1-1");
    assert_eq!(anomaly["ids"][0], "1010126112200000001");
    assert_eq!(anomaly["partition"], 10_101);
}
