//! A node: its number, its address and its connections.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool::managed::{PoolError, TimeoutType, Timeouts};
use futures_util::future::{join_all, join3};
use tokio::time::timeout;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, Statement};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, InUse, Result};
use crate::id::NodeId;
use crate::migrate::{self, Schema};
use crate::store::connect::{self, refused};
pub(crate) use crate::store::connection::Connection;
use crate::store::failed::Failed;
use crate::store::param::{Param, typed, values};
use crate::store::place;
use crate::store::places::{Place, Places};
pub(crate) use crate::store::pool::Found;
use crate::store::pool::{self, Check, Manager, Object, Pool};
use crate::store::pooler::{PreparedStatements, Way};
use crate::store::session::{Session, Single};
use crate::store::sql;
use crate::store::timeline::Newest;

/// How long a wait for a free connection may take, and for a new one what comes after its making.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// One database that stores messages, or the control database: its pool, and the check that it is
/// what it should be.
pub(crate) struct Node {
    what: String,
    /// Why there is none, where the address can't be used.
    pool: Result<Pool>,
    places: Arc<Places>,
    way: Arc<Way>,
    /// How long getting a connection may take.
    patience: Duration,
    newest: Arc<Newest>,
    /// How often a connection was asked for, but for those of [`Self::get_for_a_lease`].
    uses: AtomicU64,
}

impl Node {
    /// A node's pool. Nothing is connected yet.
    pub(crate) fn new(url: &str, cluster: Uuid, id: NodeId, options: PoolOptions) -> Result<Self> {
        Self::known(url, cluster, id, options, Arc::default())
    }

    /// The same, where something is known of its primaries.
    pub(crate) fn known(
        url: &str,
        cluster: Uuid,
        id: NodeId,
        options: PoolOptions,
        newest: Arc<Newest>,
    ) -> Result<Self> {
        let check: Check =
            Arc::new(move |session| Box::pin(place::check_node(session, cluster, id)));
        Self::open(url, &format!("node {id}"), options, check, newest)
    }

    /// A pool of a database that is to become a node.
    pub(crate) fn candidate(url: &str, options: PoolOptions) -> Result<Self> {
        let check: Check = Arc::new(|session| Box::pin(migrate::check(session, Schema::Node)));
        Self::open(url, "a database that is to be a node", options, check, Arc::default())
    }

    /// A node whose address this build of the library can't use: whoever needs it gets the error.
    pub(crate) fn unusable(id: NodeId, error: Error) -> Self {
        let what = format!("use the address of node {id}");
        let why = Error::with_source(ErrorKind::Incompatible, what.clone(), error);
        let way = Arc::new(Way::new(PreparedStatements::default()));
        let (places, uses) = (Arc::new(Places::new(1)), AtomicU64::new(0));
        let newest = Arc::default();
        Self { what, pool: Err(why), places, way, patience: ACQUIRE_TIMEOUT, newest, uses }
    }

    /// The control database's pool.
    pub(crate) fn control(url: &str, options: PoolOptions) -> Result<Self> {
        let check: Check = Arc::new(|session| Box::pin(place::check_control(session)));
        Self::open(url, "the control database", options, check, Arc::default())
    }

    /// The pool of a database that has an outbox and is no node, or need not be.
    pub(crate) fn outbox(url: &str, options: PoolOptions) -> Result<Self> {
        let check: Check = Arc::new(|session| Box::pin(migrate::check(session, Schema::Outbox)));
        Self::open(url, "a database with an outbox", options, check, Arc::default())
    }

    fn open(
        url: &str,
        name: &str,
        options: PoolOptions,
        check: Check,
        newest: Arc<Newest>,
    ) -> Result<Self> {
        let mut target = connect::parse(url)?;
        if target.config.get_application_name().is_none() {
            target.config.application_name("shardmq");
        }
        let what = format!("connect to {name} at {}", connect::describe(&target.config));
        let patience = ACQUIRE_TIMEOUT + target.patience();
        let way = Arc::new(Way::new(options.prepared_statements));
        let places = Arc::new(Places::new(options.connections));
        let (of_pool, to_server) = (Arc::clone(&places), Arc::clone(&way));
        let manager = Manager {
            target,
            what: what.clone(),
            way: to_server,
            check,
            places: of_pool,
            newest: Arc::clone(&newest),
            untold: AtomicBool::new(false),
        };
        let pool = Ok(pool::build(manager, ACQUIRE_TIMEOUT)?);
        Ok(Self { what, pool, places, way, patience, newest, uses: AtomicU64::new(0) })
    }

    /// A connection, opened where none is idle. Cancel safe.
    pub(crate) async fn get(&self) -> Result<Connection> {
        self.uses.fetch_add(1, Ordering::Relaxed);
        self.get_for_a_lease().await
    }

    /// The same, to ask for a lease that every process asks for: that is no use of the node.
    pub(crate) async fn get_for_a_lease(&self) -> Result<Connection> {
        // Boxed to keep the caller's future small.
        Box::pin(async {
            let place = self.place(ACQUIRE_TIMEOUT).await?;
            // The pool does not bound the making of a connection.
            let got = timeout(self.patience, self.pool()?.get()).await;
            self.opened(place, got.map_err(|_| self.silent())?).await
        })
        .await
    }

    /// The same, within a time for the wait and as much for the making.
    pub(crate) async fn get_within(&self, limit: Duration) -> Result<Connection> {
        self.uses.fetch_add(1, Ordering::Relaxed);
        // Boxed to keep the caller's future small.
        Box::pin(async {
            let place = self.place(limit).await?;
            let timeouts = Timeouts { wait: Some(limit), create: Some(limit), recycle: None };
            self.opened(place, self.pool()?.timeout_get(&timeouts).await).await
        })
        .await
    }

    fn pool(&self) -> Result<&Pool> {
        self.pool.as_ref().map_err(Clone::clone)
    }

    /// Whether all connections that there may be are in use. Another has to wait for one of them.
    pub(crate) fn is_in_use(&self) -> bool {
        self.places.are_taken()
    }

    fn silent(&self) -> Error {
        Error::new(ErrorKind::Unavailable, format!("{}: the server is silent", self.what))
    }

    fn in_use(&self) -> Error {
        let in_use = InUse(self.places.count());
        Error::with_source(ErrorKind::Unavailable, self.what.clone(), in_use)
    }

    async fn opened(
        &self,
        place: Place,
        got: Result<Object, PoolError<Error>>,
    ) -> Result<Connection> {
        let object = got.map_err(|error| self.explain(error))?;
        let pinned = self.way.is_pinned();
        let object = if place.is_spare { self.find_over(object, pinned).await? } else { object };
        let keeps_statements = self.way.keeps_statements();
        Ok(Connection::new(object, (place, Arc::clone(&self.places)), keeps_statements, pinned))
    }

    /// A connection of its own, outside of the pool: for what takes long.
    pub(crate) async fn single(&self) -> Result<Single> {
        connect::connect_single(&self.pool()?.manager().target).await
    }

    /// The newest primary that is known.
    pub(crate) fn newest(&self) -> &Arc<Newest> {
        &self.newest
    }

    /// Whether another address leads to the same hosts, in whatever order.
    pub(crate) fn has_the_hosts_of(&self, url: &str) -> bool {
        let (Ok(pool), Ok(other)) = (&self.pool, connect::parse(url)) else { return false };
        pool.manager().target.places() == other.places()
    }

    /// Whether the address has several hosts.
    pub(crate) fn has_several_hosts(&self) -> bool {
        self.pool.as_ref().is_ok_and(|pool| pool.manager().target.hosts() > 1)
    }

    /// The primaries at all hosts of the address that answer in time.
    pub(crate) async fn primaries(&self) -> Vec<Found> {
        let Ok(pool) = &self.pool else { return Vec::new() };
        pool::primaries(&pool.manager().target).await
    }

    async fn place(&self, limit: Duration) -> Result<Place> {
        let place = timeout(limit, self.places.take()).await.map_err(|_| self.in_use())?;
        place.ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, format!("{}: the pool is closed", self.what))
        })
    }

    /// Asks on a connection whether commits that hang are over: an answer may have been lost on its
    /// way. A connection that does not answer is closed.
    async fn find_over(&self, object: Object, pinned: bool) -> Result<Object> {
        let server = object.backend.server;
        let asked = self.places.pids(server);
        if asked.is_empty() {
            return Ok(object);
        }
        let pids: [(&(dyn ToSql + Sync), Type); 1] = [(&asked, Type::INT4_ARRAY)];
        let asking = Session::new(&object.client, pinned).query(sql::AT_WORK, &pids);
        let Ok(rows) = timeout(ACQUIRE_TIMEOUT, asking).await else {
            drop(Object::take(object));
            return Err(self.silent());
        };
        let rows = rows.map_err(|error| refused(error, &self.what))?;
        let at_work: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        self.places.at_work(server, &asked, &at_work);
        Ok(object)
    }

    /// How often it was used: another number than before says that it is in use.
    pub(crate) fn uses(&self) -> u64 {
        self.uses.load(Ordering::Relaxed)
    }

    fn explain(&self, error: PoolError<Error>) -> Error {
        match error {
            PoolError::Backend(error) => error,
            PoolError::Timeout(TimeoutType::Wait) => self.in_use(),
            PoolError::Timeout(_) => self.silent(),
            other => Error::with_source(ErrorKind::Unavailable, self.what.clone(), other),
        }
    }

    /// Closes the connections that nobody has used for so long.
    pub(crate) fn close_idle(&self, idle: Duration) {
        if let Ok(pool) = &self.pool {
            drop(pool.retain(|_, metrics| metrics.last_used() < idle));
        }
    }

    /// Closes the pool: later calls of `get` fail.
    pub(crate) fn close(&self) {
        if let Ok(pool) = &self.pool {
            pool.close();
        }
        self.places.close();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.places.close();
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("what", &self.what).finish_non_exhaustive()
    }
}

/// How a pool is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolOptions {
    pub(crate) connections: usize,
    pub(crate) prepared_statements: PreparedStatements,
}

/// How a transaction of [`write`] is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The commit waits for disk and standby, also where the database's default is weaker.
    Durable,
    /// The same, and it waits for locks for a second at most.
    Patient,
    /// The same, and it waits for locks for a tenth of a second at most.
    Brief,
    /// The commit waits for nothing: for leases, which a crash may take back.
    Relaxed,
}

impl Durability {
    /// The transaction's first statements.
    fn opening(self) -> Cow<'static, str> {
        match self {
            Self::Durable => durable(sql::BEGIN_DURABLE).into(),
            Self::Patient => durable(sql::BEGIN_PATIENT).into(),
            Self::Brief => durable(sql::BEGIN_BRIEF).into(),
            Self::Relaxed => sql::BEGIN_RELAXED.into(),
        }
    }
}

/// First statements after which the commit waits for disk and standby also where the transaction
/// finds everything done: an earlier transaction may have done it without a standby. Only a commit
/// that has written something waits.
fn durable(opening: &str) -> String {
    format!("{opening};\n{}", sql::PROBE)
}

/// Runs one statement that reads, prepared where that may be kept.
pub(crate) async fn query(
    connection: &Connection,
    statement: &str,
    params: &[&dyn Param],
) -> Result<Vec<Row>, Failed> {
    let kept = prepared(connection, statement).await?;
    connection.in_bounds(run(connection, statement, kept.as_ref(), params)).await
}

/// The same, for a statement that always has a row.
pub(crate) async fn query_one(
    connection: &Connection,
    statement: &str,
    params: &[&dyn Param],
) -> Result<Row, Failed> {
    let kept = prepared(connection, statement).await?;
    connection.in_bounds(run_one(connection, statement, kept.as_ref(), params)).await
}

/// Looks by a statement that is never kept, whose text is another each time.
pub(crate) async fn look(connection: &Connection, text: &str) -> Result<Vec<Row>, Failed> {
    connection.in_transaction(sql::BEGIN_LOOK, connection.query_typed(text, &[])).await
}

async fn run_one(
    connection: &Connection,
    text: &str,
    kept: Option<&Statement>,
    params: &[&dyn Param],
) -> Result<Row, Failed> {
    match kept {
        Some(statement) => connection.one_prepared(statement, &values(params)).await,
        None => connection.one_typed(text, &typed(params)).await,
    }
}

async fn prepared(connection: &Connection, text: &str) -> Result<Option<Statement>, Failed> {
    if connection.keeps_statements() { connection.prepare(text).await.map(Some) } else { Ok(None) }
}

/// Sends when it is polled for the first time.
async fn run(
    connection: &Connection,
    text: &str,
    kept: Option<&Statement>,
    params: &[&dyn Param],
) -> Result<Vec<Row>, Failed> {
    match kept {
        Some(statement) => connection.query_prepared(statement, &values(params)).await,
        None => connection.query_typed(text, &typed(params)).await,
    }
}

/// Runs one statement, prepared where that may be kept, in a transaction of its own that does not
/// depend on the database's defaults, in one round trip. Where an error comes back, `is_definite`
/// tells whether the statement may have been committed all the same. A connection that was left in
/// the middle is closed.
pub(crate) async fn write(
    connection: Connection,
    durability: Durability,
    statement: &str,
    params: &[&dyn Param],
) -> Result<Vec<Row>, Failed> {
    let guard = Unfinished::to_commit(connection, durability)?;
    let connection = guard.connection();
    let kept = match prepared(connection, statement).await {
        Ok(kept) => kept,
        Err(error) => {
            guard.finished();
            return Err(error);
        }
    };
    let opening = durability.opening();
    // Each sends as it is polled for the first time, in this order.
    let (begun, rows, committed) = join3(
        connection.batch_execute(&opening),
        run(connection, statement, kept.as_ref(), params),
        connection.commit(),
    )
    .await;
    guard.finished();
    begun?;
    let rows = rows?;
    committed?;
    Ok(rows)
}

/// Runs statements one after the other in one transaction that begins with an opening of its own,
/// in one round trip. Answers as [`write`] does.
pub(crate) async fn write_all(
    connection: Connection,
    durability: Durability,
    opening: &str,
    statements: &[(&str, &[&dyn Param])],
) -> Result<Vec<Vec<Row>>, Failed> {
    let opening = match durability {
        Durability::Relaxed => format!("{opening};\nset local synchronous_commit = off"),
        Durability::Durable | Durability::Patient | Durability::Brief => durable(opening),
    };
    let guard = Unfinished::to_commit(connection, durability)?;
    let connection = guard.connection();
    let mut kept = Vec::with_capacity(statements.len());
    for (text, _) in statements {
        match prepared(connection, text).await {
            Ok(statement) => kept.push(statement),
            Err(error) => {
                guard.finished();
                return Err(error);
            }
        }
    }
    let runs = statements
        .iter()
        .zip(&kept)
        .map(|((text, params), kept)| run(connection, text, kept.as_ref(), params));
    // Each sends as it is polled for the first time, in this order.
    let (begun, rows, committed) =
        join3(connection.batch_execute(&opening), join_all(runs), connection.commit()).await;
    guard.finished();
    begun?;
    let rows = rows.into_iter().collect::<Result<_, _>>()?;
    committed?;
    Ok(rows)
}

/// A connection with a pipeline under way. Dropped before the end, it is closed rather than given
/// back: nothing may be left open in the pool. Where its commit was sent it keeps its place until
/// that is answered.
pub(crate) struct Unfinished(Option<Connection>);

impl Unfinished {
    pub(crate) fn new(connection: Connection) -> Self {
        Self(Some(connection))
    }

    /// For a transaction that commits: one that is to be durable not beside commits that hang.
    pub(crate) fn to_commit(
        connection: Connection,
        durability: Durability,
    ) -> Result<Self, Failed> {
        if durability != Durability::Relaxed {
            connection.may_commit()?;
        }
        Ok(Self::new(connection))
    }

    pub(crate) fn connection(&self) -> &Connection {
        // Taken only by `finished` and `drop`, which end this value.
        self.0.as_ref().unwrap_or_else(|| unreachable!("the connection is there until the end"))
    }

    /// The pipeline is through: the connection is used on.
    pub(crate) fn answered(mut self) -> Connection {
        self.0.take().unwrap_or_else(|| unreachable!("the connection is there until the end"))
    }

    /// The pipeline is through: the connection goes back to its pool.
    pub(crate) fn finished(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            connection.close();
        }
    }
}
