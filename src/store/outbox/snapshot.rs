//! Which transactions are under way, as a snapshot has it.

/// Whether transactions were over when a statement began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// The first that had not ended by then, as far as was known: all before are over but those in `open`.
    pub(crate) next: u64,
    /// In rising order.
    pub(crate) open: Vec<u64>,
}

impl Snapshot {
    /// Of the form `xmin:xmax:a,b,c`; none where it is not.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let next = parts.nth(1)?.parse().ok()?;
        let open = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let mut open: Vec<u64> = open.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        open.sort_unstable();
        Some(Self { next, open })
    }

    /// Whether this transaction was over.
    pub(crate) fn is_over(&self, xid: u64) -> bool {
        xid < self.next && self.open.binary_search(&xid).is_err()
    }

    /// The transactions before this one that were not over.
    pub(crate) fn open_before(&self, xid: u64) -> impl Iterator<Item = u64> {
        let open = self.open.iter().copied().take_while(move |open| *open < xid);
        open.chain(self.next..xid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_tells_what_is_over() {
        let snapshot = Snapshot::parse("10:20:10,14,15").unwrap();
        assert_eq!(
            [9, 10, 11, 19, 20].map(|xid| snapshot.is_over(xid)),
            [true, false, true, true, false]
        );
        assert_eq!(snapshot.open_before(22).collect::<Vec<_>>(), [10, 14, 15, 20, 21]);
        assert_eq!(snapshot.open_before(12).collect::<Vec<_>>(), [10]);
        assert_eq!(Snapshot::parse("7:7:").unwrap().open_before(7).count(), 0);
        for nonsense in ["", "nonsense", "1:2", "1:x:", "1:2:a", "1:2:1,,x"] {
            assert_eq!(Snapshot::parse(nonsense), None, "{nonsense}");
        }
    }
}
