//! What a suite is worth that has not failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::{StreamExt, stream};
use shardmq::notifier::{Health, Hint, Hints, LocalNotifier, NoNotifier, Notifier};
use shardmq::testing::NotifierSuite;
use shardmq::{NodeId, PartitionId};

/// What is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Ends,
    LosesEveryThird,
    NeverLooks,
    SaysItIsIll,
    Blocks,
    IsDeafWhenCrowded,
}

#[derive(Debug, Clone)]
struct Faulty {
    fault: Fault,
    sound: LocalNotifier,
    published: Arc<AtomicUsize>,
}

impl Notifier for Faulty {
    fn publish(&self, partitions: &[PartitionId]) {
        let nth = self.published.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::LosesEveryThird if nth % 3 == 2 => {}
            Fault::Blocks => {
                std::thread::sleep(std::time::Duration::from_micros(100));
                self.sound.publish(partitions);
            }
            _ => self.sound.publish(partitions),
        }
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let hints = self.sound.subscribe(partitions);
        match self.fault {
            Fault::Ends => Box::pin(hints.take(30)),
            Fault::NeverLooks => {
                Box::pin(hints.filter(|hint| std::future::ready(*hint != Hint::Look)))
            }
            // The first look only: what is missed later is missed.
            Fault::IsDeafWhenCrowded => {
                let later = hints.skip(1);
                let later = later.filter(|hint| std::future::ready(*hint != Hint::Look));
                Box::pin(stream::iter([Hint::Look]).chain(later))
            }
            _ => hints,
        }
    }

    fn health(&self, node: NodeId) -> Health {
        match self.fault {
            Fault::SaysItIsIll => NoNotifier::new().health(node),
            _ => self.sound.health(node),
        }
    }
}

async fn violation(fault: Fault) -> String {
    let sound = LocalNotifier::new();
    let faulty = Faulty { fault, sound, published: Arc::default() };
    let partition = PartitionId::new(1, 1).unwrap();
    let suite = NotifierSuite::new(faulty.clone(), faulty, partition);
    suite.check().await.expect_err(&format!("{fault:?}")).to_string()
}

#[tokio::test(start_paused = true)]
async fn each_fault_is_found() {
    for (fault, named) in [
        (Fault::Ends, "MUST NOT end"),
        (Fault::LosesEveryThird, "MUST deliver"),
        (Fault::NeverLooks, "MUST yield a look first"),
        (Fault::SaysItIsIll, "MUST say that all is well"),
        (Fault::IsDeafWhenCrowded, "MUST deliver"),
    ] {
        let found = violation(fault).await;
        assert!(found.contains(named), "{fault:?}: {found}");
    }
}

#[tokio::test]
async fn to_block_is_found_by_the_clock() {
    assert!(violation(Fault::Blocks).await.contains("MUST return from publish at once"));
}
