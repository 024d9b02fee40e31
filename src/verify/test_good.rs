//! Random good histories: none is accused.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::verify::test_kit::{Stamped, check_events};
use crate::verify::test_model::{Liberties, Model};
use crate::verify::{CheckOptions, Event};

/// Deliveries of an id that its group had before; for histories without lost tails.
fn redelivered(events: &[Stamped]) -> u64 {
    let mut seen = BTreeSet::new();
    let deliveries = events.iter().filter_map(|stamped| match stamped.event {
        Event::Delivered { holding, id, .. } => Some((holding.group, id)),
        _ => None,
    });
    deliveries.filter(|delivery| !seen.insert(*delivery)).count() as u64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 60 } else { 500 }))]

    #[test]
    fn good_histories_are_not_accused(
        seed: u64, steps in 0_usize..600, seeks: bool, lost_tails: bool,
    ) {
        let model = Model::run(seed, steps, Liberties { seeks, lost_tails });
        let report = check_events(&model.events, &CheckOptions::default());
        prop_assert_eq!(report.violations, 0, "{:#?}", report.anomalies);
        prop_assert_eq!(report.work.events, model.events.len() as u64);
        prop_assert_eq!(report.holes, 0);
        let counted = report.acknowledged + report.refused + report.unknown;
        prop_assert_eq!(counted, model.counters.iter().sum::<u64>());
        if !lost_tails {
            prop_assert_eq!(report.redelivered, redelivered(&model.events));
        }
    }
}

#[test]
fn the_model_takes_its_liberties() {
    let mut sums = [0; 7];
    for seed in 0..20 {
        let liberties = Liberties { seeks: false, lost_tails: seed % 2 == 0 };
        let model = Model::run(seed * 1_000_003, 500, liberties);
        let report = check_events(&model.events, &CheckOptions::default());
        let counts = [
            report.redelivered,
            report.holdings,
            report.unknown_found,
            report.unknown_missing,
            report.duplicated_marked,
            report.tail_lost,
            report.tail_reused,
        ];
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    assert!(sums.iter().all(|sum| *sum >= 10), "{sums:?}");
}

/// A holding that only confirms a cursor which it found, of messages that went with a lost tail since.
#[test]
fn a_commit_of_what_was_finished_before_is_no_overrun() {
    let liberties = Liberties { seeks: false, lost_tails: true };
    let model = Model::run(7_649_770_293_363_103_198, 175, liberties);
    let report = check_events(&model.events, &CheckOptions::default());
    assert_eq!(report.violations, 0, "{:#?}", report.anomalies);
}
