//! The places of a pool's connections, each of which is kept until its commit is answered.
//!
//! ```text
//! free ── taken ── given back ─> free
//!           │
//!           └─ given up, its commit sent ─> hangs ── answered, ended, seen to be over ─> free
//! ```
//!
//! A server goes on with a commit whose client has gone, and may wait for a standby for hours. So a connection
//! that was given up in its commit keeps its place until the commit is answered: else each attempt would leave
//! one more session on the server. While the commits of all places hang, one more connection is there, for what
//! commits nothing durably: leases are kept, and it is found out where another server has taken over, or where
//! a commit's answer was lost on its way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// The places of a pool.
#[derive(Debug)]
pub(super) struct Places {
    count: usize,
    free: Arc<Semaphore>,
    spare: Arc<Semaphore>,
    hanging: Mutex<Hanging>,
    /// How many hang.
    known: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Hanging {
    next: u64,
    /// Where each hangs, and what ends the wait.
    all: HashMap<u64, (Backend, CancellationToken)>,
}

/// Who serves a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backend {
    /// The server, told by the time of its start.
    pub(super) server: SystemTime,
    /// The process; none where a pooler may give the session another each time.
    pub(super) pid: Option<i32>,
}

/// A place, free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    /// It is the one beside hanging commits: nothing is committed durably here.
    pub(super) is_spare: bool,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        let (free, spare) = (Arc::new(Semaphore::new(count)), Arc::new(Semaphore::new(1)));
        Self { count, free, spare, hanging: Mutex::default(), known: watch::Sender::new(0) }
    }

    /// How many places there are, without the spare one.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The most connections that there are at a time.
    pub(super) fn most(&self) -> usize {
        self.count + 1
    }

    /// A place, as soon as there is one; the spare one while the commits of all others hang. None where the
    /// pool is closed. Cancel safe.
    pub(super) async fn take(&self) -> Option<Place> {
        let own = Arc::clone(&self.free).acquire_owned();
        tokio::select! {
            biased;
            permit = own => Some(Place { _permit: permit.ok()?, is_spare: false }),
            permit = self.spare() => Some(Place { _permit: permit?, is_spare: true }),
        }
    }

    /// Whether whoever takes the next one has to wait.
    pub(super) fn are_taken(&self) -> bool {
        self.free.available_permits() == 0
    }

    async fn spare(&self) -> Option<OwnedSemaphorePermit> {
        let all_hang = |hanging: &usize| *hanging >= self.count;
        self.known.subscribe().wait_for(all_hang).await.ok()?;
        Arc::clone(&self.spare).acquire_owned().await.ok()
    }

    /// A commit on a server hangs, until this is dropped.
    pub(super) fn hang(self: &Arc<Self>, backend: Backend) -> Hangs {
        let given_up = CancellationToken::new();
        let mut hanging = self.lock();
        hanging.next += 1;
        let id = hanging.next;
        hanging.all.insert(id, (backend, given_up.clone()));
        self.known.send_replace(hanging.all.len());
        drop(hanging);
        Hangs { places: Arc::clone(self), id, given_up }
    }

    /// A server has answered: commits that hang on another one are not waited for any more.
    pub(super) fn answered(&self, server: SystemTime) {
        self.give_up(|backend| backend.server != server);
    }

    /// The processes of a server whose commits hang.
    pub(super) fn pids(&self, server: SystemTime) -> Vec<i32> {
        let hanging = self.lock();
        let here = hanging.all.values().filter(|entry| entry.0.server == server);
        here.filter_map(|entry| entry.0.pid).collect()
    }

    /// Of these processes of a server only some are at work: the commits of the others are over.
    pub(super) fn at_work(&self, server: SystemTime, asked: &[i32], at_work: &[i32]) {
        let is_over = |pid| asked.contains(&pid) && !at_work.contains(&pid);
        self.give_up(|backend| backend.server == server && backend.pid.is_some_and(is_over));
    }

    fn give_up(&self, which: impl Fn(&Backend) -> bool) {
        let hanging = self.lock();
        let given_up = hanging.all.values().filter(|entry| which(&entry.0));
        given_up.for_each(|entry| entry.1.cancel());
    }

    /// Nothing is waited for any more.
    pub(super) fn close(&self) {
        self.free.close();
        self.spare.close();
        self.give_up(|_| true);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Hanging> {
        self.hanging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A commit that hangs.
pub(super) struct Hangs {
    places: Arc<Places>,
    id: u64,
    /// Cancelled where it is not waited for any more.
    pub(super) given_up: CancellationToken,
}

impl Drop for Hangs {
    fn drop(&mut self) {
        let mut hanging = self.places.lock();
        hanging.all.remove(&self.id);
        self.places.known.send_replace(hanging.all.len());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;

    fn server(number: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(number)
    }

    fn backend(number: u64, pid: i32) -> Backend {
        Backend { server: server(number), pid: Some(pid) }
    }

    fn taken(places: &Places) -> Option<bool> {
        places.take().now_or_never().flatten().map(|place| place.is_spare)
    }

    #[tokio::test]
    async fn the_spare_place_is_there_only_while_all_others_hang() {
        let places = Arc::new(Places::new(2));
        let (one, two) = (places.take().await.unwrap(), places.take().await.unwrap());
        assert_eq!(taken(&places), None);
        let hangs = places.hang(backend(1, 1));
        assert_eq!(taken(&places), None);
        let also = places.hang(backend(1, 2));
        assert_eq!(taken(&places), Some(true));
        let spare = places.take().await.unwrap();
        assert_eq!(taken(&places), None);
        drop((hangs, one));
        assert_eq!(taken(&places), Some(false));
        drop((also, two, spare));
        assert_eq!(taken(&places), Some(false));
    }

    #[tokio::test]
    async fn what_hangs_is_given_up_where_its_process_is_not_at_work_any_more() {
        let places = Arc::new(Places::new(3));
        let hangs = [backend(1, 5), backend(1, 6), backend(2, 5)].map(|on| places.hang(on));
        let later = places.hang(backend(1, 7));
        let asked = places.pids(server(2));
        places.at_work(server(2), &asked, &asked);
        assert!(hangs.iter().all(|hangs| !hangs.given_up.is_cancelled()));
        places.at_work(server(1), &[5, 6], &[6]);
        let given_up = hangs.each_ref().map(|hangs| hangs.given_up.is_cancelled());
        assert_eq!(given_up, [true, false, false]);
        assert!(!later.given_up.is_cancelled());
    }

    #[tokio::test]
    async fn what_hangs_is_given_up_where_another_server_answers_or_the_pool_is_closed() {
        let places = Arc::new(Places::new(2));
        let (old, new) = (places.hang(backend(1, 1)), places.hang(backend(2, 1)));
        places.answered(server(2));
        assert!(old.given_up.is_cancelled() && !new.given_up.is_cancelled());
        places.close();
        assert!(new.given_up.is_cancelled());
        assert!(places.take().await.is_none());
    }
}
