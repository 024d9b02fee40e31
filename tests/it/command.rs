//! The command, as people and scripts run it: the built program, its output and its exit code.

#![allow(clippy::unwrap_used)]

/// Dead letters are listed, shown, sent again and dropped.
mod dead;
/// The demo keeps what it says.
mod demo;
/// Private servers that live until a signal.
mod dev;
/// What goes wrong is said clearly, with an exit code.
mod errors;
/// Groups are listed, described, moved and deleted.
mod group;
/// Every documented field of every JSON.
mod json;
/// Lines in, the same lines out.
mod lines;
/// Which notifier a cluster has.
mod notifier;
/// Groups go on where they ended, whatever ended them.
mod resume;
/// A checked workload, while somebody breaks the servers.
pub mod verify;

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::support::within;

/// Longer than anything takes that works.
const LONG: Duration = Duration::from_mins(1);

/// What a run of the program left behind.
pub struct Finished {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl Finished {
    /// Fails where the program did.
    pub fn good(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// The JSON objects on stdout, one a line.
    pub fn json(&self) -> Vec<Value> {
        let lines = self.stdout.split_inclusive(|byte| *byte == b'\n');
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }
}

/// The program with these arguments, separated by blanks, on this cluster.
fn command(url: &str, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command
        .args(arguments.split_whitespace())
        .env("SHARDMQ_URL", url)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs the program to its end.
pub async fn run(url: &str, arguments: &str) -> Finished {
    finish(command(url, arguments).spawn().unwrap()).await
}

/// Runs the program to its end with this on its stdin.
pub async fn run_with(url: &str, arguments: &str, input: &[u8]) -> Finished {
    let mut child = command(url, arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writing = tokio::spawn(async move { stdin.write_all(&input).await });
    let finished = finish(child).await;
    // A program that ends early does not read everything.
    let _ = writing.await.unwrap();
    finished
}

async fn finish(child: Child) -> Finished {
    finish_within(LONG, child).await
}

async fn finish_within(patience: Duration, child: Child) -> Finished {
    let output = within(patience, "the program's end", child.wait_with_output()).await.unwrap();
    Finished {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The bytes of a message, however its line shows them.
fn payload(line: &Value) -> Vec<u8> {
    match (&line["payload"], &line["payload_base64"]) {
        (Value::String(text), Value::Null) => text.as_bytes().to_vec(),
        (Value::Null, Value::String(text)) => from_base64(text),
        other => panic!("not exactly one payload: {other:?}"),
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    let alphabet = ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']);
    let alphabet: Vec<char> = alphabet.collect();
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for letter in text.trim_end_matches('=').chars() {
        let value = alphabet.iter().position(|known| *known == letter).unwrap();
        bits = bits << 6 | u32::try_from(value).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).unwrap());
        }
    }
    bytes
}
