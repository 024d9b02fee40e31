//! Encrypted connections: who is talked to is who it should be, or nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::{Cluster, Error, ErrorKind, Message};
use tokio::process::Command;

use crate::support::authority::{Authority, started, tls_server};
use crate::support::reading::{next, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, prepare, within};

const SOON: Duration = Duration::from_secs(10);
const NEVER: Duration = Duration::from_mins(10);

/// The address of a server's database by one of its names, with parameters.
fn url(server: &Server, host: &str, database: &str, parameters: &str) -> String {
    format!("postgresql://shardmq@{host}:{}/{database}?{parameters}", server.port())
}

/// Whether an address lets us in: an empty database has no schema, which can only be told inside.
async fn enters(url: &str) -> Result<(), Error> {
    match within(SOON, "an answer", Cluster::connect(url)).await {
        Err(error) if error.kind() == ErrorKind::Incompatible => Ok(()),
        Err(error) => Err(error),
        Ok(_) => panic!("an empty database is no cluster"),
    }
}

async fn refused(url: &str, because: &str) {
    let error = enters(url).await.expect_err(url).chain();
    assert!(error.contains(because), "{url}: {error}");
}

/// Which sessions of a server's programs are encrypted.
async fn sessions(sql: &tokio_postgres::Client) -> BTreeSet<(String, bool)> {
    let asked =
        "select distinct regexp_replace(application_name, ' [0-9a-f]{32}$', ''), ssl from pg_stat_activity join pg_stat_ssl using (pid)
                  where application_name like 'shardmq%' and datname = current_database()";
    let rows = sql.query(asked, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_and_hints_go_over_verified_connections() {
    let authority = Authority::new("ours");
    let server = tls_server(&authority.sign("server", &["localhost"]));
    let Some(server) = started(server).await else { return };
    prepare(&server).await;
    let plain = database(&server).await;
    let name = plain.rsplit_once('/').unwrap().1;
    let parameters = format!("sslmode=verify-full&sslrootcert={}", authority.file());
    let test = TestCluster::of(vec![url(&server, "localhost", name, &parameters)]).await;
    let sql = client(&plain).await;
    topic(&test, "orders", 2).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let consumer = test.cluster.consumer("orders", "g").poll_interval(NEVER);
    let mut messages = consumer.stream().await.unwrap();
    let names = ["shardmq", "shardmq listen", "shardmq topology"];
    let expected = names.map(|name| (name.to_owned(), true));
    let all_encrypted = async || sessions(&sql).await == BTreeSet::from(expected.clone());
    eventually("all sessions are encrypted, also those that listen", SOON, all_encrypted).await;
    // Each fills several records of TLS, and comes by a hint alone.
    for n in 0..20 {
        let sent = format!("{n}{}", "x".repeat(100_000));
        producer.send(Message::new(sent.clone())).await.unwrap();
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), sent);
        delivery.ack().unwrap();
    }
    messages.shutdown(SOON).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap().iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_the_certificate_lacks_is_refused_where_names_count() {
    let authority = Authority::new("ours");
    let Some(server) = started(tls_server(&authority.sign("127.0.0.1", &["localhost"]))).await
    else {
        return;
    };
    let to = |host: &str, mode: &str| {
        let parameters = format!("sslmode={mode}&sslrootcert={}", authority.file());
        url(&server, host, "postgres", &parameters)
    };
    enters(&to("localhost", "verify-full")).await.unwrap();
    refused(&to("127.0.0.1", "verify-full"), "not valid for name").await;
    enters(&to("127.0.0.1", "verify-ca")).await.unwrap();
    enters(&to("127.0.0.1", "require")).await.unwrap();
    // The name is that of the host, wherever its address comes from.
    let pairs = |host: &str| {
        let file = authority.file();
        let port = server.port();
        format!(
            "host={host} hostaddr=127.0.0.1 port={port} user=shardmq dbname=postgres \
             sslmode=verify-full sslrootcert='{file}'"
        )
    };
    enters(&pairs("localhost")).await.unwrap();
    refused(&pairs("example.org"), "not valid for name").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_authority_is_refused_wherever_one_is_named() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let Some(server) = started(tls_server(&theirs.sign("server", &["localhost"]))).await else {
        return;
    };
    let to = |parameters: &str| url(&server, "localhost", "postgres", parameters);
    let root = format!("sslrootcert={}", ours.file());
    for mode in ["verify-full", "verify-ca", "require"] {
        refused(&to(&format!("sslmode={mode}&{root}")), "invalid peer certificate").await;
    }
    // Nobody asked who it is.
    enters(&to("sslmode=require")).await.unwrap();
    enters(&to(&format!("sslmode=prefer&{root}"))).await.unwrap();
    refused(&to("sslmode=verify-full"), "need a root certificate").await;
    refused(&to("sslmode=require&sslrootcert=/nowhere/ca.crt"), "/nowhere/ca.crt: No such file")
        .await;
    let empty = ours.put("empty.crt", "nothing");
    refused(&to(&format!("sslmode=verify-ca&sslrootcert={empty}")), "no certificate in PEM").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_is_refused_where_it_is_looked_at() {
    let authority = Authority::new("ours");
    let Some(server) = started(tls_server(&authority.sign_expired(&["localhost"]))).await else {
        return;
    };
    for mode in ["verify-full", "verify-ca"] {
        let parameters = format!("sslmode={mode}&sslrootcert={}", authority.file());
        refused(&url(&server, "localhost", "postgres", &parameters), "expired").await;
    }
    enters(&url(&server, "localhost", "postgres", "sslmode=require")).await.unwrap();
}

/// In a process of its own, whose machine trusts our authority.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authorities_of_the_machine_are_taken_where_that_is_asked_for() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let Some(server) = started(tls_server(&ours.sign("server", &["localhost"]))).await else {
        return;
    };
    let url = url(&server, "localhost", "postgres", "sslrootcert=system");
    for (authority, said) in [(&ours, "no schema"), (&theirs, "invalid peer certificate")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
        command.args(["topic", "list"]).env("SHARDMQ_URL", &url);
        command.env("SSL_CERT_FILE", authority.file()).env_remove("SSL_CERT_DIR");
        let output = within(SOON, "the program's end", command.output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_shows_its_certificate_where_the_server_wants_one() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let hba = "hostssl all app 127.0.0.1/32 cert\nhost all shardmq 127.0.0.1/32 trust\n";
    let server = tls_server(&ours.sign("server", &["localhost"]))
        .setting("ssl_ca_file", "ca.crt")
        .file("ca.crt", &ours.certificate)
        .file("pg_hba.conf", hba);
    let Some(server) = started(server).await else { return };
    let sql = client(&server.url("postgres")).await;
    sql.batch_execute("create role app login").await.unwrap();
    let plain = url(&server, "localhost", "postgres", "sslmode=verify-full&sslrootcert=");
    let plain = plain.replace("shardmq@", "app@") + &ours.file();
    let with = |authority: &Authority, name: &str| {
        let signed = authority.sign(name, &[]);
        let certificate = authority.put(&format!("{name}.crt"), &signed.certificate);
        let key = authority.put(&format!("{name}.key"), &signed.key);
        format!("{plain}&sslcert={certificate}&sslkey={key}")
    };
    enters(&with(&ours, "app")).await.unwrap();
    refused(&plain, "requires a valid client certificate").await;
    refused(&with(&ours, "other"), "certificate authentication failed").await;
    assert!(enters(&with(&theirs, "app")).await.is_err());

    let open = with(&ours, "app");
    let key = open.rsplit_once('=').unwrap().1;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(key, readable).unwrap();
    refused(&open, "group or others have access").await;
    let without_key = open.replace("&sslkey", "&sslkey=&application_name");
    refused(&without_key, "no sslkey").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tls_on_the_server_only_those_enter_who_do_not_need_it() {
    let server = Server::builder().durable(false).trusts_everybody().start().await.unwrap();
    for mode in ["disable", "allow", "prefer"] {
        let to = url(&server, "127.0.0.1", "postgres", &format!("sslmode={mode}"));
        enters(&to).await.unwrap();
    }
    let to = url(&server, "127.0.0.1", "postgres", "sslmode=require");
    refused(&to, "server does not support TLS").await;
    // A socket needs none, whatever is asked for.
    let socket = server.socket_dir().display().to_string().replace('/', "%2F");
    enters(&url(&server, &socket, "postgres", "sslmode=require")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_prefers_one_way_takes_the_other_where_the_server_insists() {
    let authority = Authority::new("ours");
    let hba = "hostssl postgres shardmq 127.0.0.1/32 trust\n\
        hostnossl postgres plain 127.0.0.1/32 trust\nhostnossl template1 shardmq 127.0.0.1/32 trust\n";
    let server = tls_server(&authority.sign("server", &["localhost"])).file("pg_hba.conf", hba);
    let Some(server) = started(server).await else { return };
    let sql = client(&server.url("template1")).await;
    sql.batch_execute("create role plain login").await.unwrap();
    let to = |user: &str, mode: &str| {
        let url = url(&server, "127.0.0.1", "postgres", &format!("sslmode={mode}"));
        url.replace("shardmq@", &format!("{user}@"))
    };
    for mode in ["allow", "prefer"] {
        enters(&to("shardmq", mode)).await.unwrap();
        enters(&to("plain", mode)).await.unwrap();
    }
    enters(&to("plain", "disable")).await.unwrap();
    refused(&to("shardmq", "disable"), "no pg_hba.conf entry").await;
    refused(&to("plain", "require"), "no pg_hba.conf entry").await;
}
