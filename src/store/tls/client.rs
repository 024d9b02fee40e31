//! rustls, set up from the files that a connection string names.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::{Mode, Root, Tls};
use crate::error::{Error, ErrorKind, Result};

type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Tls {
    pub(super) fn client_config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let verifier = self.verifier(&provider)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("set up TLS", error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match self.identity()? {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| wrong("use sslcert with sslkey", error))?,
            None => builder.with_no_client_auth(),
        };
        // What `sslnegotiation=direct` demands; a server that is older does not look at it.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(config)
    }

    fn verifier(&self, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>> {
        let roots = if self.mode.must_encrypt() { self.roots()? } else { None };
        let provider = Arc::clone(provider);
        match (self.mode, roots) {
            (Mode::VerifyCa | Mode::VerifyFull, None) => Err(Error::invalid(
                "sslmode=verify-ca and verify-full need a root certificate: give sslrootcert, a PEM \
                 file, or `system` for those that this machine trusts",
            )),
            (Mode::VerifyFull, Some(roots)) => {
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider);
                let verifier = verifier.build().map_err(|error| wrong("use sslrootcert", error))?;
                Ok(verifier)
            }
            (_, roots) => Ok(Arc::new(AnyName { roots, provider })),
        }
    }

    /// None where no file is named, and libpq's own does not exist.
    fn roots(&self) -> Result<Option<Arc<RootCertStore>>> {
        match &self.root {
            Root::System => system_roots().map(Some),
            Root::File(path) => roots_of(path).map(Some),
            Root::Default => default_file("root.crt").map(|path| roots_of(&path)).transpose(),
        }
    }

    /// The client's certificate and its key, where there are some.
    fn identity(&self) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>> {
        let Some(chain) = self.certificate.clone().or_else(|| default_file("postgresql.crt"))
        else {
            return Ok(None);
        };
        let key = self.key.clone().or_else(|| default_file("postgresql.key"));
        let key = key.ok_or_else(|| Error::invalid("there is an sslcert, but no sslkey"))?;
        let chain = with_file("sslcert", &chain, certificates)?;
        let key = with_file("sslkey", &key, private_key)?;
        Ok(Some((chain, key)))
    }
}

/// A file that libpq looks for by itself.
fn default_file(name: &str) -> Option<PathBuf> {
    let path = std::env::home_dir()?.join(".postgresql").join(name);
    path.exists().then_some(path)
}

fn wrong(doing: impl Into<String>, error: impl Into<Failure>) -> Error {
    Error::with_source(ErrorKind::Invalid, doing, error)
}

fn with_file<T>(
    parameter: &str,
    path: &Path,
    read: impl FnOnce(&Path) -> Result<T, Failure>,
) -> Result<T> {
    read(path).map_err(|error| wrong(format!("read {parameter} {}", path.display()), error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let pem = fs::read(path)?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() {
        return Err("it has no certificate in PEM".into());
    }
    Ok(found)
}

fn roots_of(path: &Path) -> Result<Arc<RootCertStore>> {
    with_file("sslrootcert", path, |path| {
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates(path)?);
        if added == 0 {
            Err("no certificate in it can sign another".into())
        } else {
            Ok(Arc::new(roots))
        }
    })
}

/// Those are many, and change with the machine: read once.
fn system_roots() -> Result<Arc<RootCertStore>> {
    static FOUND: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(Arc::clone(found));
    }
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(loaded.certs);
    if added == 0 {
        let what = "find the root certificates of this machine";
        return Err(match loaded.errors.into_iter().next() {
            Some(error) => wrong(what, error),
            None => wrong(what, "there are none"),
        });
    }
    Ok(Arc::clone(FOUND.get_or_init(|| Arc::new(roots))))
}

/// A key that others may read is refused, as libpq does: root's own may be lent to a group.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Failure> {
    let meta = fs::metadata(path)?;
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        let text = "group or others have access to it: its permissions must be u=rw (0600) or less, \
            or u=rw,g=r (0640) or less if it belongs to root";
        return Err(text.into());
    }
    let pem = fs::read(path)?;
    let is_encrypted = pem.windows(9).any(|window| window == b"ENCRYPTED");
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        if is_encrypted { "it is encrypted, which can't be read here".into() } else { error.into() }
    })
}

/// Takes certificates for every name: signed by one of the roots, or any at all where there are none.
#[derive(Debug)]
struct AnyName {
    roots: Option<Arc<RootCertStore>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let certificate = ParsedCertificate::try_from(certificate)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                roots,
                intermediates,
                now,
                algorithms,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
