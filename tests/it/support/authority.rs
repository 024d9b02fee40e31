//! Certificates for tests: an authority of their own, and what it signs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use shardmq::embedded::{Server, ServerBuilder};
use tempfile::TempDir;

/// Signs certificates, and has a folder for them.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate: String,
    dir: TempDir,
}

/// A certificate and its key, in PEM.
pub struct Signed {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = named(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let dir = tempfile::tempdir().unwrap();
        Self { issuer: Issuer::new(params, key), certificate, dir }
    }

    /// For a client or user of this name, or a server that is known by these.
    pub fn sign(&self, name: &str, hosts: &[&str]) -> Signed {
        self.sign_params(&named(name, hosts))
    }

    /// One whose time is over.
    pub fn sign_expired(&self, hosts: &[&str]) -> Signed {
        let mut params = named("expired", hosts);
        (params.not_before, params.not_after) =
            (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        self.sign_params(&params)
    }

    fn sign_params(&self, params: &CertificateParams) -> Signed {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Signed { certificate, key: key.serialize_pem() }
    }

    /// The authority's own certificate in a file.
    pub fn file(&self) -> String {
        self.put("ca.crt", &self.certificate)
    }

    /// A file that only its owner may read.
    pub fn put(&self, name: &str, text: &str) -> String {
        put(self.dir.path(), name, text)
    }
}

/// Writes a file that only its owner may read; returns its path.
pub fn put(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn named(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(hosts).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// Starts a server that is to speak TLS. None where its programs were built without: there is nothing
/// to test then.
pub async fn started(builder: ServerBuilder) -> Option<Server> {
    match builder.start().await {
        Err(error) if error.chain().contains("SSL is not supported by this build") => {
            eprintln!("skipped: this Postgres was built without TLS");
            None
        }
        server => Some(server.unwrap()),
    }
}

/// A server that speaks TLS with this certificate.
pub fn tls_server(signed: &Signed) -> ServerBuilder {
    Server::builder()
        .durable(false)
        .trusts_everybody()
        .setting("ssl", "on")
        .file("server.crt", &signed.certificate)
        .file("server.key", &signed.key)
}
