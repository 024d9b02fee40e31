//! Private Redis servers: that they answer, can be killed and restarted, and leave nothing behind.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use shardmq::ErrorKind;
use shardmq::embedded::{Redis, StopMode};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;

use super::endings::{is_used, servers_in, shared_tempdir, victim, victim_command};
use super::{eventually, eventually_gone, is_alive, kill};
use crate::support::authority::Authority;

/// What a Redis says that was built without TLS, before 7.2 and later.
const NO_TLS: [&str; 2] = [">>> 'tls-cert-file\nBad directive", "Failed finding TLS support"];

async fn redis() -> Redis {
    Redis::builder().start().await.unwrap()
}

fn folder_of(redis: &Redis) -> PathBuf {
    redis.data_dir().parent().unwrap().to_owned()
}

/// A connection to a Redis.
struct Client(BufReader<TcpStream>);

impl Client {
    async fn connect(redis: &Redis) -> Self {
        Self(BufReader::new(TcpStream::connect(("127.0.0.1", redis.port())).await.unwrap()))
    }

    /// Sends a command and returns the answer; of a list all that is in it, with spaces between.
    async fn ask(&mut self, command: &[&str]) -> String {
        let words = command.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
        let request = format!("*{}\r\n{}", command.len(), words.collect::<String>());
        self.0.write_all(request.as_bytes()).await.unwrap();
        let (mut parts, mut missing) = (Vec::new(), 1);
        while missing > 0 {
            missing -= 1;
            let line = self.line().await;
            if let Some(count) = line.strip_prefix('*') {
                missing += count.parse::<usize>().unwrap();
            } else if let Some(length) = line.strip_prefix('$').filter(|length| *length != "-1") {
                let mut text = vec![0; length.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut text).await.unwrap();
                parts.push(String::from_utf8(text).unwrap().trim_end().to_owned());
            } else {
                parts.push(line);
            }
        }
        parts.join(" ")
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        line.trim_end().to_owned()
    }
}

async fn ask(redis: &Redis, command: &[&str]) -> String {
    Client::connect(redis).await.ask(command).await
}

#[tokio::test]
async fn a_redis_answers_and_keeps_nothing_on_disk() {
    let redis = redis().await;
    assert_eq!(redis.url(), format!("redis://127.0.0.1:{}/", redis.port()));
    assert_eq!(ask(&redis, &["PING"]).await, "+PONG");
    for (setting, value) in [("save", ""), ("appendonly", "no"), ("bind", "127.0.0.1")] {
        assert_eq!(ask(&redis, &["CONFIG", "GET", setting]).await, format!("{setting} {value}"));
    }
    let info = ask(&redis, &["INFO", "server"]).await;
    assert!(info.contains(&format!("process_id:{}\r\n", redis.pid().unwrap())), "{info}");
    assert!(redis.log().contains("Ready to accept connections"));
    redis.stop().await.unwrap();
}

#[tokio::test]
async fn settings_and_files_reach_redis() {
    let builder = Redis::builder().file("more.conf", "maxmemory 64mb\n");
    let builder = builder.setting("include", "more.conf").setting("save", "3600 1");
    let redis = builder.start().await.unwrap();
    assert_eq!(ask(&redis, &["CONFIG", "GET", "maxmemory"]).await, "maxmemory 67108864");
    assert_eq!(ask(&redis, &["CONFIG", "GET", "save"]).await, "save 3600 1");
}

#[tokio::test]
async fn a_setting_that_redis_refuses_is_an_error_with_its_log_but_without_the_value() {
    let builder = Redis::builder().setting("maxmemory", "secret");
    let error = builder.start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains(">>> 'maxmemory\n"), "{error:?}");
    assert!(!error.chain().contains("secret"), "{error:?}");
    let error = Redis::builder().setting("port", "6379").start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let error = Redis::builder().file("redis.conf", "").start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn who_has_no_password_is_refused() {
    let password = "a \"b\"\\\u{fc}\n/@";
    let redis = Redis::builder().password(password).start().await.unwrap();
    let url = format!("redis://:a%20%22b%22%5C%C3%BC%0A%2F%40@127.0.0.1:{}/", redis.port());
    assert_eq!(redis.url(), url);
    let mut client = Client::connect(&redis).await;
    assert!(client.ask(&["PING"]).await.starts_with("-NOAUTH"));
    assert!(client.ask(&["AUTH", "wrong"]).await.starts_with("-WRONGPASS"));
    assert!(client.ask(&["PING"]).await.starts_with("-NOAUTH"));
    assert_eq!(client.ask(&["AUTH", password]).await, "+OK");
    assert_eq!(client.ask(&["PING"]).await, "+PONG");
    // A server that asks for a password can be restarted too.
    redis.restart(StopMode::Fast).await.unwrap();
    assert!(ask(&redis, &["PING"]).await.starts_with("-NOAUTH"));
    assert!(!format!("{redis:?}").contains("a%20"));
}

#[tokio::test]
async fn a_user_of_ones_own_may_do_everything_and_others_nothing() {
    let redis = Redis::builder().acl_user("worker", "to work").start().await.unwrap();
    assert_eq!(redis.url(), format!("redis://worker:to%20work@127.0.0.1:{}/", redis.port()));
    let mut client = Client::connect(&redis).await;
    assert!(client.ask(&["PING"]).await.starts_with("-NOAUTH"));
    assert!(client.ask(&["AUTH", "to work"]).await.starts_with("-WRONGPASS"));
    assert_eq!(client.ask(&["AUTH", "worker", "to work"]).await, "+OK");
    assert_eq!(client.ask(&["SET", "key", "value"]).await, "+OK");
    assert_eq!(client.ask(&["PUBLISH", "channel", "hint"]).await, ":0");
    assert_eq!(client.ask(&["CONFIG", "GET", "appendonly"]).await, "appendonly no");
}

#[tokio::test]
async fn a_redis_with_a_certificate_speaks_tls_and_nothing_else() {
    let authority = Authority::new("authority");
    let signed = authority.sign("redis", &["127.0.0.1"]);
    let builder = Redis::builder().tls(signed.certificate, signed.key);
    let redis = match builder.start().await {
        Err(error) if NO_TLS.iter().any(|words| error.chain().contains(words)) => {
            return eprintln!("skipped: this Redis was built without TLS");
        }
        redis => redis.unwrap(),
    };
    assert_eq!(redis.url(), format!("rediss://127.0.0.1:{}/", redis.port()));
    let port = redis.port();
    let ping = move || ping_over_tls(port, &authority.certificate);
    assert_eq!(tokio::task::spawn_blocking(ping).await.unwrap(), "+PONG\r\n");
    let mut plain = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    plain.write_all(b"PING\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"+"), "{answer:?}");
}

fn ping_over_tls(port: u16, authority: &str) -> String {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let session = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut stream = StreamOwned::new(session, socket);
    stream.write_all(b"PING\r\n").unwrap();
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).unwrap();
    String::from_utf8(answer.to_vec()).unwrap()
}

#[tokio::test]
async fn redis_servers_at_once_do_not_meet() {
    let (first, second) = tokio::join!(redis(), redis());
    assert_ne!(first.port(), second.port());
    assert_eq!(ask(&first, &["SET", "key", "value"]).await, "+OK");
    assert_eq!(ask(&second, &["GET", "key"]).await, "$-1");
    // The end of one does not touch the other.
    let (pid, folder) = (first.pid().unwrap(), folder_of(&first));
    drop(first);
    eventually_gone(pid, &folder).await;
    assert_eq!(ask(&second, &["PING"]).await, "+PONG");
}

#[tokio::test]
async fn the_folder_of_a_redis_is_private_and_not_roots() {
    let redis = redis().await;
    for path in [folder_of(&redis), redis.data_dir()] {
        let meta = path.metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o700, "{}", path.display());
        assert_ne!(meta.uid(), 0, "{}", path.display());
    }
    let config = redis.data_dir().join("redis.conf").metadata().unwrap();
    assert_eq!(config.permissions().mode() & 0o777, 0o600);
    if cfg!(target_os = "linux") {
        let process = PathBuf::from(format!("/proc/{}", redis.pid().unwrap()));
        assert_ne!(process.metadata().unwrap().uid(), 0);
    }
}

#[tokio::test]
async fn a_killed_redis_is_noticed_and_comes_back_empty_on_its_port() {
    let redis = redis().await;
    let (port, url) = (redis.port(), redis.url());
    assert_eq!(ask(&redis, &["SET", "key", "value"]).await, "+OK");
    kill(redis.pid().unwrap(), "KILL");
    assert!(!redis.exited().await.unwrap().success());
    assert_eq!(redis.pid(), None);
    redis.start_server().await.unwrap();
    assert_eq!((redis.port(), redis.url()), (port, url));
    assert_eq!(ask(&redis, &["GET", "key"]).await, "$-1");
    for mode in [StopMode::Immediate, StopMode::Fast] {
        let before = redis.pid();
        redis.restart(mode).await.unwrap();
        assert_ne!(redis.pid(), before);
        assert_eq!(ask(&redis, &["PING"]).await, "+PONG");
    }
}

#[tokio::test]
async fn a_stopped_redis_stays_down_until_it_is_started() {
    let redis = redis().await;
    assert_eq!(redis.start_server().await.unwrap_err().kind(), ErrorKind::Conflict);
    let folder = folder_of(&redis);
    for mode in [StopMode::Fast, StopMode::Immediate] {
        redis.stop_server(mode).await.unwrap();
        redis.stop_server(StopMode::Fast).await.unwrap();
        assert_eq!(redis.pid(), None);
        assert_eq!(redis.exited().await.unwrap().success(), mode == StopMode::Fast);
        assert!(TcpStream::connect(("127.0.0.1", redis.port())).await.is_err());
        redis.start_server().await.unwrap();
        assert_eq!(ask(&redis, &["PING"]).await, "+PONG");
    }
    redis.stop_server(StopMode::Immediate).await.unwrap();
    redis.stop().await.unwrap();
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_redis_waits_for_its_port_and_takes_nobody_else_for_itself() {
    let redis = redis().await;
    redis.stop_server(StopMode::Fast).await.unwrap();
    let other = tokio::net::TcpListener::bind(("127.0.0.1", redis.port())).await.unwrap();
    let answering = tokio::spawn(async move {
        loop {
            let (mut client, _) = other.accept().await.unwrap();
            let _ = client.write_all(b"+PONG\r\n").await;
        }
    });
    let give_way = async {
        let in_vain = || async { redis.log().contains("Address already in use") };
        eventually("it tried", in_vain).await;
        answering.abort();
        let _ = answering.await;
    };
    let (started, ()) = tokio::join!(redis.start_server(), give_way);
    started.unwrap();
    let info = ask(&redis, &["INFO", "server"]).await;
    assert!(info.contains(&format!("process_id:{}\r\n", redis.pid().unwrap())), "{info}");
}

#[tokio::test]
async fn stop_leaves_nothing_of_a_redis() {
    let redis = redis().await;
    let (pid, folder) = (redis.pid().unwrap(), folder_of(&redis));
    assert!(is_alive(pid) && folder.exists());
    redis.stop().await.unwrap();
    assert!(!is_alive(pid) && !folder.exists());
}

#[tokio::test]
async fn drop_leaves_nothing_even_of_a_suspended_redis() {
    let redis = redis().await;
    let (pid, folder) = (redis.pid().unwrap(), folder_of(&redis));
    kill(pid, "STOP");
    drop(redis);
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn a_suspended_redis_can_be_stopped_at_once() {
    let redis = redis().await;
    kill(redis.pid().unwrap(), "STOP");
    redis.restart(StopMode::Immediate).await.unwrap();
    assert_eq!(ask(&redis, &["PING"]).await, "+PONG");
}

#[tokio::test]
async fn a_killed_parent_takes_its_redis_along() {
    let base = shared_tempdir();
    let mut victim = victim("redis", base.path(), 0);
    let started = said(&mut victim, "pid ").await;
    let (pid, folder) = started.split_once(' ').unwrap();
    let (pid, folder) = (pid.parse().unwrap(), PathBuf::from(folder));
    assert!(is_alive(pid) && folder.exists());
    victim.kill().await.unwrap();
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn a_parent_killed_during_the_start_takes_its_redis_along() {
    let base = shared_tempdir();
    for seen in ["server.log", "data/redis.conf", "data/redis.pid"] {
        let mut victim = victim("redis", base.path(), 0);
        // Who is killed before its watchdog runs leaves a folder with nothing in it.
        let is_there = |folder: &PathBuf| folder.join(seen).exists() && is_used(folder);
        eventually(seen, || async { servers_in(base.path()).iter().any(is_there) }).await;
        victim.kill().await.unwrap();
        eventually("nothing is left", || async { servers_in(base.path()).is_empty() }).await;
        eventually("no process is left", || async { !is_used(base.path()) }).await;
    }
}

#[tokio::test]
async fn a_start_of_a_redis_that_is_given_up_leaves_nothing() {
    let base = shared_tempdir();
    for milliseconds in [5, 10, 20, 30, 50] {
        let mut victim = victim("redis dropped", base.path(), milliseconds);
        assert!(victim.wait().await.unwrap().success());
        assert!(servers_in(base.path()).is_empty());
        eventually("no process is left", || async { !is_used(base.path()) }).await;
    }
}

#[tokio::test]
async fn a_missing_redis_is_named() {
    let base = shared_tempdir();
    // In another process, because of the variable.
    let mut command = victim_command("redis", base.path(), 0);
    let mut victim = command.env("SHARDMQ_REDIS_BIN", base.path()).spawn().unwrap();
    let error = said(&mut victim, "error ").await;
    let dir = base.path().display();
    let expected = format!(
        "NotFound: SHARDMQ_REDIS_BIN is {dir}, which has neither redis-server nor valkey-server"
    );
    assert_eq!(error, expected);
    assert!(servers_in(base.path()).is_empty());
}

/// What the victim says after this word.
async fn said(victim: &mut Child, word: &str) -> String {
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if let Some(rest) = line.strip_prefix(word) {
            return rest.to_owned();
        }
    }
}

/// What a copy of this program does whose end is looked at.
pub async fn be_a_victim() {
    match Redis::builder().start().await {
        Ok(redis) => {
            println!("\npid {} {}", redis.pid().unwrap(), folder_of(&redis).display());
            std::future::pending::<()>().await;
        }
        Err(error) => println!("\nerror {error:?}"),
    }
}
