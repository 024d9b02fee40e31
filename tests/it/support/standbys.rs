//! A primary with standbys that stream from it, to be stopped, killed and promoted.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::process::Command;
use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use tokio_postgres::Client;

use super::{client, database, eventually, own_server};

const SOON: Duration = Duration::from_secs(20);

/// A primary and two standbys, `s1` and `s2`.
pub struct Replicated {
    pub primary: Server,
    pub standbys: [Server; 2],
    /// A database on all of them, at an address with all hosts.
    pub url: String,
    name: String,
}

impl Replicated {
    /// Commits on the primary wait for these standbys; on one that is promoted for none.
    pub async fn start(synchronous: &str) -> Self {
        let primary = own_server().await;
        let fresh = || Server::builder().durable(false).trusts_everybody().start();
        let standbys = [fresh().await.unwrap(), fresh().await.unwrap()];
        let plain = database(&primary).await;
        follow(&standbys, &primary).await;
        let sql = client(&primary.url("postgres")).await;
        let set = format!("alter system set synchronous_standby_names = '{synchronous}'");
        sql.batch_execute(&set).await.unwrap();
        sql.batch_execute("select pg_reload_conf()").await.unwrap();
        caught_up(&sql, 2).await;
        let is_sync = "select count(*) = 2 from pg_stat_replication where sync_state <> 'async'";
        let is_set = async || {
            let is_sync: bool = sql.query_one(is_sync, &[]).await.unwrap().get(0);
            is_sync != synchronous.is_empty()
        };
        eventually("the standbys are waited for", SOON, is_set).await;
        let ports = [primary.port(), standbys[0].port(), standbys[1].port()];
        let url = url(&ports, &plain, "");
        let name = plain.rsplit_once('/').unwrap().1.to_owned();
        Self { primary, standbys, url, name }
    }

    /// A plain connection to the database on one server.
    pub async fn sql(&self, server: &Server) -> Client {
        client(&server.url(&self.name)).await
    }

    /// Stops both standbys; the first one last, so that it has all that was ever waited for.
    pub async fn stop_standbys(&self) {
        self.standbys[1].stop_server(StopMode::Fast).await.unwrap();
        self.standbys[0].stop_server(StopMode::Fast).await.unwrap();
    }

    /// Starts the first standby where it is stopped, and makes it a primary.
    pub async fn promote(&self) {
        let standby = &self.standbys[0];
        if standby.pid().is_none() {
            standby.start_server().await.unwrap();
        }
        let sql = client(&standby.url("postgres")).await;
        sql.batch_execute("select pg_promote()").await.unwrap();
    }
}

/// An address of these ports, in this order.
pub fn url(ports: &[u16], plain: &str, parameters: &str) -> String {
    let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let name = plain.rsplit_once('/').unwrap().1;
    format!("postgresql://shardmq@{}/{name}?{parameters}", hosts.join(","))
}

/// Makes running servers hot standbys of another, which is stopped for as long as it is copied. They are
/// named s1, s2 and so on.
pub async fn follow(standbys: &[Server], primary: &Server) {
    primary.stop_server(StopMode::Fast).await.unwrap();
    for (standby, number) in standbys.iter().zip(1..) {
        standby.stop_server(StopMode::Fast).await.unwrap();
        let data = standby.data_dir();
        let owner = data.metadata().unwrap();
        let own_settings = fs::read_to_string(data.join("postgresql.conf")).unwrap();
        fs::remove_dir_all(&data).unwrap();
        let copy = Command::new("cp").arg("-a").arg(primary.data_dir()).arg(&data).status();
        assert!(copy.unwrap().success());
        let settings = format!(
            "{own_settings}\nprimary_conninfo = 'host=127.0.0.1 port={} user=shardmq \
             application_name=s{number}'\n",
            primary.port()
        );
        fs::write(data.join("postgresql.conf"), settings).unwrap();
        fs::write(data.join("standby.signal"), "").unwrap();
        chown(data.join("standby.signal"), Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    primary.start_server().await.unwrap();
    for standby in standbys {
        standby.start_server().await.unwrap();
    }
}

/// Waits until so many standbys have all that the primary has.
pub async fn caught_up(sql: &Client, standbys: i64) {
    let asked = "select count(*) = $1 and bool_and(replay_lsn = pg_current_wal_lsn())
                   from pg_stat_replication";
    let same = async || {
        sql.query_one(asked, &[&standbys]).await.unwrap().get::<_, Option<bool>>(0) == Some(true)
    };
    eventually("the standbys have all", SOON, same).await;
}
