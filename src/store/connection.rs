//! A connection while somebody has it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::join3;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, Statement};

use crate::store::failed::Failed;
use crate::store::param::Unseen;
use crate::store::places::{Place, Places};
use crate::store::pool::Object;
use crate::store::sql;
use crate::store::timeline::Primary;

/// A connection of a pool. Statements go through this module, so that none is kept prepared where a
/// pooler stands in between, and each is bounded.
///
/// Dropped while a statement is under way or a transaction open, it is closed: the next one to get
/// it would wait behind that. Where its commit was sent, it keeps its place until that is answered.
pub(crate) struct Connection {
    /// There until this value is dropped.
    held: Option<(Object, Place)>,
    places: Arc<Places>,
    keeps_statements: bool,
    /// The settings of [`session`](crate::store::session) are the session's own.
    pinned: bool,
    /// How many statements were sent and not answered.
    under_way: AtomicUsize,
    /// A transaction is open beyond a statement.
    open: AtomicBool,
    /// A commit was sent on it, and is not answered.
    commits: AtomicBool,
}

impl Connection {
    pub(super) fn new(
        object: Object,
        (place, places): (Place, Arc<Places>),
        keeps_statements: bool,
        pinned: bool,
    ) -> Self {
        Self {
            held: Some((object, place)),
            places,
            keeps_statements,
            pinned,
            under_way: AtomicUsize::new(0),
            open: AtomicBool::new(false),
            commits: AtomicBool::new(false),
        }
    }

    /// Whether statements may be kept prepared on it.
    pub(crate) fn keeps_statements(&self) -> bool {
        self.keeps_statements
    }

    /// Which primary it leads to, where that is known.
    pub(crate) fn primary(&self) -> Option<Primary> {
        self.object().primary
    }

    /// Runs statements without parameters and rows, sent as one message.
    pub(crate) async fn batch_execute(&self, statements: &str) -> Result<(), Failed> {
        self.counted(self.client().batch_execute(statements)).await
    }

    /// Whether something may be committed durably here: not beside commits that hang, which would
    /// be one more.
    pub(crate) fn may_commit(&self) -> Result<(), Failed> {
        if self.held().1.is_spare { Err(Failed::NoPlace) } else { Ok(()) }
    }

    /// Begins a transaction that is open until [`commit`](Self::commit) or
    /// [`roll_back`](Self::roll_back).
    pub(crate) async fn open_transaction(&self, opening: &str) -> Result<(), Failed> {
        self.open.store(true, Ordering::Relaxed);
        self.batch_execute(opening).await
    }

    /// Commits. Dropped before the answer, the connection keeps its place until it is answered.
    pub(crate) async fn commit(&self) -> Result<(), Failed> {
        self.commits.store(true, Ordering::Relaxed);
        let committed = self.end("commit").await;
        self.commits.store(false, Ordering::Relaxed);
        committed
    }

    /// Takes back what the open transaction has done.
    pub(crate) async fn roll_back(&self) -> Result<(), Failed> {
        self.end("rollback").await
    }

    async fn end(&self, ending: &str) -> Result<(), Failed> {
        self.batch_execute(ending).await?;
        self.open.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// A statement that is kept: only where they are.
    pub(crate) async fn prepare(&self, text: &str) -> Result<Statement, Failed> {
        let object = self.object();
        if let Some(kept) = object.kept(text) {
            return Ok(kept);
        }
        // To parse it takes locks too.
        let parse = async { Ok(self.answered(object.client.prepare(text)).await?) };
        let statement = self.in_bounds(parse).await?;
        object.keep(text, statement.clone());
        Ok(statement)
    }

    /// Runs a statement that is kept.
    pub(crate) async fn query_prepared(
        &self,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Failed> {
        let unseen: Vec<Unseen<'_>> = params.iter().map(|value| Unseen(*value)).collect();
        let unseen: Vec<_> = unseen.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
        self.counted(self.client().query(statement, &unseen)).await
    }

    /// Parses and runs a statement that is not kept.
    pub(crate) async fn query_typed(
        &self,
        text: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, Failed> {
        self.counted(self.client().query_typed(text, params)).await
    }

    /// Runs a statement that brings no bounds of its own, in the session's or, where that has none,
    /// in a transaction that sets them. That takes no further round trip.
    pub(super) async fn in_bounds<T>(
        &self,
        run: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        if self.pinned || self.open.load(Ordering::Relaxed) {
            return run.await;
        }
        self.in_transaction(sql::BEGIN_READ, run).await
    }

    /// Runs a statement that reads in a transaction that is opened so.
    pub(super) async fn in_transaction<T>(
        &self,
        opening: &str,
        run: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        // Each sends as it is polled for the first time, in this order.
        let (begun, answer, ended) =
            join3(self.batch_execute(opening), run, self.batch_execute("commit")).await;
        begun?;
        let answer = answer?;
        ended?;
        Ok(answer)
    }

    /// Runs a statement that is kept and has one row.
    pub(super) async fn one_prepared(
        &self,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Failed> {
        self.counted(self.client().query_one(statement, params)).await
    }

    /// Parses and runs a statement that is not kept and has one row.
    pub(super) async fn one_typed(
        &self,
        text: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Row, Failed> {
        self.counted(self.client().query_typed_one(text, params)).await
    }

    /// Waits for the answer to a statement. Where the future is dropped before, the connection is
    /// noted as one that still waits.
    async fn answered<T>(&self, sent: impl Future<Output = T>) -> T {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let answer = sent.await;
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        answer
    }

    /// An answer, where no commit on this connection ended before the standby had it, and it is not
    /// that of an older primary than is known. Each answer is looked at, since a commit is a
    /// statement like others, and a statement alone commits itself.
    async fn counted<T>(
        &self,
        sent: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Failed> {
        let answer = self.answered(sent).await?;
        match self.object() {
            object if object.cut.is_noted() => Err(Failed::Unconfirmed),
            object if object.is_outdated() => Err(Failed::Outdated),
            _ => Ok(answer),
        }
    }

    fn held(&self) -> &(Object, Place) {
        // Taken only by `close` and `drop`, which end this value.
        self.held.as_ref().unwrap_or_else(|| unreachable!("the connection is there until the end"))
    }

    fn object(&self) -> &Object {
        &self.held().0
    }

    fn client(&self) -> &Client {
        &self.object().client
    }

    /// Closes it, whatever it is at; where its commit is not answered yet, it is closed then.
    pub(super) fn close(mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        let Some((object, place)) = self.held.take() else { return };
        let runtime = tokio::runtime::Handle::try_current();
        let (true, Ok(runtime)) = (self.commits.load(Ordering::Relaxed), runtime) else {
            drop(Object::take(object));
            return;
        };
        let hangs = self.places.hang(object.backend);
        runtime.spawn(async move {
            tokio::select! {
                // Queued behind the commit, this is answered when that is, or when the connection
                // ends.
                _ = object.client.batch_execute("") => {}
                () = hangs.given_up.cancelled() => {}
            }
            drop(Object::take(object));
            drop((hangs, place));
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.under_way.load(Ordering::Relaxed) > 0 || self.open.load(Ordering::Relaxed) {
            self.give_up();
        }
        if let Some((object, place)) = self.held.take() {
            // Its place is free once it is in the pool.
            drop(object);
            drop(place);
        }
    }
}
