//! What a suite is worth that has not failed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, stream};
use shardmq::notifier::{Health, HealthCell, Hint, Hints, LocalNotifier, NoNotifier, Notifier};
use shardmq::testing::NotifierSuite;
use shardmq::{NodeId, PartitionId};
use tokio::sync::{Notify, broadcast};

/// What is wrong with one around an interruption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relapse {
    SaysAllIsWell,
    DoesNotSayWhy,
    NeverLooksAgain,
    NeverSaysItIsWell,
}

/// One that can be interrupted by hand.
#[derive(Debug, Clone)]
struct Breakable {
    relapse: Option<Relapse>,
    health: Arc<HealthCell>,
    hints: broadcast::Sender<Hint>,
}

impl Breakable {
    fn new(relapse: Option<Relapse>) -> Self {
        let health = HealthCell::new();
        health.arrive();
        Self { relapse, health: Arc::new(health), hints: broadcast::channel(1024).0 }
    }

    fn interrupt(&self) {
        match self.relapse {
            Some(Relapse::SaysAllIsWell) => return,
            Some(Relapse::DoesNotSayWhy) => self.health.rest(),
            _ => drop(self.health.interrupt("by hand")),
        }
        let _ = self.hints.send(Hint::Interrupted);
    }

    fn mend(&self) {
        if self.relapse != Some(Relapse::NeverSaysItIsWell) {
            self.health.arrive();
        }
        if self.relapse != Some(Relapse::NeverLooksAgain) {
            let _ = self.hints.send(Hint::Look);
        }
    }
}

impl Notifier for Breakable {
    fn publish(&self, partitions: &[PartitionId]) {
        if self.health.is_ok() {
            let _ = self.hints.send(Hint::Partitions(partitions.to_vec()));
        }
    }

    fn subscribe(&self, _: &[PartitionId]) -> Hints {
        let receiver = self.hints.subscribe();
        let now = if self.health.is_ok() { Hint::Look } else { Hint::Interrupted };
        let later = stream::unfold(receiver, |mut receiver| async {
            let hint = receiver.recv().await.unwrap_or(Hint::Look);
            Some((hint, receiver))
        });
        Box::pin(stream::iter([now]).chain(later))
    }

    fn health(&self, _: NodeId) -> Health {
        let mut health = self.health.get();
        if self.relapse == Some(Relapse::DoesNotSayWhy) {
            health.error = None;
        }
        health
    }
}

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
                // Over two seconds for as often as the suite publishes in a row.
                std::thread::sleep(std::time::Duration::from_micros(500));
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

/// Merges a hint into the same one before it, and drops what comes when too many wait for a subscription.
#[derive(Debug, Clone)]
struct Forgetful {
    most: usize,
    queues: Arc<Mutex<Vec<Arc<Queue>>>>,
    sound: LocalNotifier,
}

/// What waits for a subscription.
#[derive(Debug, Default)]
struct Queue {
    hints: Mutex<VecDeque<Vec<PartitionId>>>,
    added: Notify,
}

impl Queue {
    async fn heard(&self) -> Hint {
        loop {
            let first = self.hints.lock().unwrap().pop_front();
            if let Some(partitions) = first {
                return Hint::Partitions(partitions);
            }
            self.added.notified().await;
        }
    }
}

impl Notifier for Forgetful {
    fn publish(&self, partitions: &[PartitionId]) {
        let queues = self.queues.lock().unwrap();
        for queue in &*queues {
            let mut hints = queue.hints.lock().unwrap();
            let is_known = hints.back().is_some_and(|last| last == partitions);
            if !is_known && hints.len() < self.most {
                hints.push_back(partitions.to_vec());
                queue.added.notify_one();
            }
        }
    }

    fn subscribe(&self, _: &[PartitionId]) -> Hints {
        let queue = Arc::<Queue>::default();
        self.queues.lock().unwrap().push(Arc::clone(&queue));
        let later =
            stream::unfold(queue, |queue| async move { Some((queue.heard().await, queue)) });
        Box::pin(stream::iter([Hint::Look]).chain(later))
    }

    fn health(&self, node: NodeId) -> Health {
        self.sound.health(node)
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

/// Only who has not read for long misses something.
#[tokio::test(start_paused = true)]
async fn to_drop_what_comes_last_is_found() {
    let check = async |most| {
        let one = Forgetful { most, queues: Arc::default(), sound: LocalNotifier::new() };
        let partition = PartitionId::new(1, 1).unwrap();
        NotifierSuite::new(one.clone(), one, partition).check().await
    };
    check(1_000).await.unwrap();
    let found = check(32).await.unwrap_err().to_string();
    assert!(found.contains("MUST deliver"), "{found}");
}

#[tokio::test(start_paused = true)]
async fn each_relapse_is_found() {
    let check = async |relapse| {
        let one = Breakable::new(relapse);
        let partition = PartitionId::new(1, 1).unwrap();
        let suite = NotifierSuite::new(one.clone(), one.clone(), partition);
        suite.check_interruption(async { one.interrupt() }, async { one.mend() }).await
    };
    check(None).await.unwrap();
    for (relapse, named) in [
        (Relapse::SaysAllIsWell, "SHOULD find out"),
        (Relapse::DoesNotSayWhy, "MUST say in its health why"),
        (Relapse::NeverLooksAgain, "MUST yield a look after"),
        (Relapse::NeverSaysItIsWell, "MUST yield a look after"),
    ] {
        let found = check(Some(relapse)).await.unwrap_err().to_string();
        assert!(found.contains(named), "{relapse:?}: {found}");
    }
}
