//! What is sent: text like that of small business events, different from message to message.

use crate::store::append::Arrays;
use crate::store::packed::Packed;

/// How many different payloads there are: at least a batch, and no more than about this many bytes.
const VARIETY: (usize, usize) = (1_000, 4_096);
const BYTES: usize = 32 << 20;

/// Payloads of one size, made before anything is measured. They stay in memory to the end of the
/// process, so that taking one costs nothing: no copy, no count of references that threads contend for.
#[derive(Clone, Copy)]
pub(super) struct Payloads {
    text: &'static str,
    size: usize,
    variety: usize,
}

impl Payloads {
    pub(super) fn new(size: usize) -> Self {
        let mut random = Random(0x5EED);
        let variety = (BYTES / size).clamp(VARIETY.0, VARIETY.1);
        let all: String = (0..variety).map(|_| text(size, &mut random)).collect();
        Self { text: all.leak(), size, variety }
    }

    /// The payload of the nth message.
    pub(super) fn nth(self, n: usize) -> &'static [u8] {
        let start = n % self.variety * self.size;
        self.text.as_bytes().get(start..start + self.size).unwrap_or_default()
    }

    /// All of them in batches of so many.
    pub(super) fn batches(self, of: usize) -> Vec<Arrays> {
        let batch = |n: usize| {
            let payloads: Vec<_> = (n * of..(n + 1) * of).map(|n| self.nth(n)).collect();
            arrays(&payloads)
        };
        (0..self.variety / of).map(batch).collect()
    }
}

/// A batch of these payloads.
pub(super) fn arrays(payloads: &[impl AsRef<[u8]>]) -> Arrays {
    let mut packed = Packed::default();
    let mut bytes = 0;
    for payload in payloads {
        packed.push(payload.as_ref());
        bytes += payload.as_ref().len();
    }
    Arrays {
        count: i32::try_from(payloads.len()).unwrap_or(i32::MAX),
        bytes: i32::try_from(bytes).unwrap_or(i32::MAX),
        payloads: packed,
        ..Arrays::default()
    }
}

/// A JSON object filled up with random letters; cut off where the size is too small for it.
fn text(size: usize, random: &mut Random) -> String {
    let (order, customer, cents) =
        (random.below(100_000_000), random.below(50_000), random.below(99_999));
    let mut text =
        format!("{{\"order\":{order},\"customer\":\"c-{customer}\",\"cents\":{cents},\"note\":\"");
    while text.len() + 2 < size {
        text.push(char::from(b'a' + u8::try_from(random.below(26)).unwrap_or(0)));
    }
    text.push_str("\"}");
    text.truncate(size);
    text
}

/// The generator `SplitMix64`: the same payloads in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_have_the_size_and_are_json_where_there_is_room() {
        for size in [1, 20, 100, 1024] {
            let payloads = Payloads::new(size);
            assert_eq!((payloads.nth(4_095).len(), payloads.nth(4_096).len()), (size, size));
            let json = serde_json::from_slice::<serde_json::Value>(payloads.nth(7));
            assert_eq!(json.is_ok(), size >= 100);
        }
    }

    #[test]
    fn batches_hold_what_single_messages_hold() {
        let payloads = Payloads::new(100);
        let batches = payloads.batches(1_000);
        assert_eq!((batches.len(), batches[1].count, batches[1].bytes), (4, 1_000, 100_000));
        let unpacked = batches[1].payloads.unpack();
        assert_eq!(unpacked.element(5), Some(payloads.nth(1_005)));
    }
}
