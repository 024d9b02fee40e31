//! Medians and spreads.

/// Numbers in rising order.
pub(crate) struct Spread(Vec<f64>);

impl Spread {
    pub(crate) fn of(mut numbers: Vec<f64>) -> Self {
        numbers.sort_by(f64::total_cmp);
        Self(numbers)
    }

    /// The number that this part of all is not above (nearest rank).
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let rank = (part * self.0.len() as f64).ceil().max(1.0);
        let index = (1..=self.0.len()).find(|n| *n as f64 >= rank).unwrap_or(self.0.len());
        self.0.get(index - 1).copied().unwrap_or(f64::NAN)
    }

    /// Median, quartiles, extremes and count.
    pub(crate) fn text(&self) -> String {
        let [min, q1, median, q3, max] =
            [0.0, 0.25, 0.5, 0.75, 1.0].map(|part| self.quantile(part));
        let count = self.0.len();
        format!("{median:.2} (quartiles {q1:.2} to {q3:.2}, all {min:.2} to {max:.2}, {count})")
    }
}
