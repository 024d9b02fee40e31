//! How connections are encrypted, as libpq's `sslmode` and its companions say it.
//!
//! | `sslmode` | first | then, if it was turned away | the server's certificate |
//! |---|---|---|---|
//! | `disable` | plain | | |
//! | `allow` | plain | TLS | is not looked at |
//! | `prefer`, the default | TLS where the server offers it | plain | is not looked at |
//! | `require` | TLS | | is looked at only where there is a root certificate, as by `verify-ca` |
//! | `verify-ca` | TLS | | must be signed by a root certificate |
//! | `verify-full` | TLS | | must be that, and be made out for the host's name |
//!
//! Two things are stricter than in libpq: a file that is named must be there, and a name must be among
//! the certificate's alternative names, where libpq also takes the common name of one that has none.

#[cfg(feature = "tls")]
mod client;

use std::path::PathBuf;

use tokio_postgres::Config;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;

use crate::error::{Error, Result};
use crate::store::dsn::Parameters;

/// What encrypts; `NoTls`, never made, where there is nothing to do it.
#[cfg(feature = "tls")]
pub(super) type Connector = tokio_postgres_rustls::MakeRustlsConnect;
#[cfg(not(feature = "tls"))]
pub(super) type Connector = tokio_postgres::NoTls;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Mode {
    const ALL: [(&str, Self); 6] = [
        ("disable", Self::Disable),
        ("allow", Self::Allow),
        ("prefer", Self::Prefer),
        ("require", Self::Require),
        ("verify-ca", Self::VerifyCa),
        ("verify-full", Self::VerifyFull),
    ];

    fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, mode)| *mode).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|(known, _)| *known).collect();
            Error::invalid(format!("sslmode must be one of {}", known.join(", ")))
        })
    }

    fn must_encrypt(self) -> bool {
        matches!(self, Self::Require | Self::VerifyCa | Self::VerifyFull)
    }
}

/// Where the certificates are that sign those of servers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Root {
    /// Those that this machine trusts.
    System,
    /// A PEM file, or libpq's own where that exists.
    File(PathBuf),
    Default,
}

/// What a connection string says about encryption.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "read by what encrypts"))]
pub(super) struct Tls {
    mode: Mode,
    root: Root,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Tls {
    /// Refuses what contradicts itself, or needs TLS that this build lacks. No file is read yet.
    pub(super) fn new(parameters: &Parameters) -> Result<Self> {
        Self::with(parameters, cfg!(feature = "tls"))
    }

    fn with(parameters: &Parameters, has_tls: bool) -> Result<Self> {
        let file = |name: &Option<String>| {
            name.as_deref().filter(|name| !name.is_empty()).map(PathBuf::from)
        };
        let root = match file(&parameters.sslrootcert) {
            Some(name) if name.as_os_str() == "system" => Root::System,
            Some(name) => Root::File(name),
            None => Root::Default,
        };
        let mode = match &parameters.sslmode {
            Some(name) => Mode::parse(name)?,
            None if root == Root::System => Mode::VerifyFull,
            None => Mode::Prefer,
        };
        if root == Root::System && mode != Mode::VerifyFull {
            // Anybody can get a certificate for some name from those whom all trust.
            return Err(Error::invalid(
                "sslrootcert=system needs sslmode=verify-full, which it also is the default of",
            ));
        }
        if mode.must_encrypt() && !has_tls {
            let name =
                Mode::ALL.iter().find(|(_, known)| *known == mode).map_or("", |found| found.0);
            return Err(Error::invalid(format!(
                "the database URL asks for sslmode={name}, and this build has no TLS: it needs the \
                 feature `tls` of shardmq"
            )));
        }
        Ok(Self {
            mode,
            root,
            certificate: file(&parameters.sslcert),
            key: file(&parameters.sslkey),
        })
    }

    /// How to enter, one after the other.
    pub(super) fn encryptions(&self, is_socket: bool) -> &'static [Encryption] {
        encryptions(self.mode, is_socket, cfg!(feature = "tls"))
    }

    /// What encrypts, where that may be needed. Reads the files anew: certificates of clients are
    /// replaced every few hours in some places. Blocks.
    #[cfg(feature = "tls")]
    pub(super) fn connector(&self) -> Result<Option<Connector>> {
        if self.mode == Mode::Disable {
            return Ok(None);
        }
        self.client_config().map(|config| Some(Connector::new(config)))
    }

    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as with TLS")]
    pub(super) fn connector(&self) -> Result<Option<Connector>> {
        Ok(None)
    }
}

/// How to enter a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Plain,
    /// Encrypted if the server can.
    Offered,
    /// Encrypted or not at all.
    Required,
}

impl Encryption {
    pub(super) fn set(self, config: &mut Config) {
        config.ssl_mode(match self {
            Self::Plain => SslMode::Disable,
            Self::Offered => SslMode::Prefer,
            Self::Required => SslMode::Require,
        });
    }

    /// Whether an error is a reason to try the next: the server wants, or can do, only the other
    /// one. A wrong password is none.
    pub(super) fn is_refused_by(self, error: &tokio_postgres::Error) -> bool {
        match error.code() {
            Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => true,
            // How PgBouncer says that it wants TLS.
            Some(&SqlState::PROTOCOL_VIOLATION) => self == Self::Plain,
            Some(_) => false,
            None => is_handshake(error),
        }
    }
}

fn encryptions(mode: Mode, is_socket: bool, has_tls: bool) -> &'static [Encryption] {
    match mode {
        // A socket of this machine needs no TLS, and no Postgres offers it there.
        _ if is_socket => &[Encryption::Plain],
        Mode::Disable => &[Encryption::Plain],
        Mode::Allow | Mode::Prefer if !has_tls => &[Encryption::Plain],
        Mode::Allow => &[Encryption::Plain, Encryption::Offered],
        Mode::Prefer => &[Encryption::Offered, Encryption::Plain],
        Mode::Require | Mode::VerifyCa | Mode::VerifyFull => &[Encryption::Required],
    }
}

/// Whether the two could not agree on how to encrypt.
#[cfg(feature = "tls")]
fn is_handshake(error: &tokio_postgres::Error) -> bool {
    let source = std::error::Error::source(error);
    source
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(std::io::Error::get_ref)
        .is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>)
}

#[cfg(not(feature = "tls"))]
fn is_handshake(_: &tokio_postgres::Error) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(mode: Option<&str>, root: Option<&str>) -> Parameters {
        Parameters {
            sslmode: mode.map(str::to_owned),
            sslrootcert: root.map(str::to_owned),
            ..Parameters::default()
        }
    }

    fn mode(mode: Option<&str>, root: Option<&str>) -> Result<Mode> {
        Tls::with(&parameters(mode, root), true).map(|tls| tls.mode)
    }

    #[test]
    fn the_default_is_prefer_and_with_the_roots_of_the_system_verify_full() {
        assert_eq!(mode(None, None).unwrap(), Mode::Prefer);
        assert_eq!(mode(None, Some("ca.pem")).unwrap(), Mode::Prefer);
        assert_eq!(mode(None, Some("system")).unwrap(), Mode::VerifyFull);
        assert_eq!(mode(Some("verify-full"), Some("system")).unwrap(), Mode::VerifyFull);
        for weak in ["disable", "allow", "prefer", "require", "verify-ca"] {
            let error = mode(Some(weak), Some("system")).unwrap_err();
            assert!(error.to_string().contains("verify-full"), "{error}");
        }
    }

    #[test]
    fn unknown_modes_are_refused_with_those_that_are_known() {
        for wrong in ["", "Require", "verify_full"] {
            let error = mode(Some(wrong), None).unwrap_err();
            assert!(error.to_string().contains("verify-ca, verify-full"), "{error}");
        }
    }

    #[test]
    fn tls_that_this_build_lacks_is_an_error_that_names_the_feature() {
        for (name, mode) in Mode::ALL {
            let made = Tls::with(&parameters(Some(name), None), false);
            assert_eq!(made.is_err(), mode.must_encrypt(), "{name}");
            if let Err(error) = made {
                let text = error.to_string();
                assert!(text.contains(&format!("sslmode={name}")), "{text}");
                assert!(text.contains("feature `tls`"), "{text}");
            }
        }
        assert!(Tls::with(&parameters(None, Some("system")), false).is_err());
    }

    #[test]
    fn each_mode_has_its_encryptions() {
        use Encryption::{Offered, Plain, Required};
        let expected: [&[Encryption]; 6] =
            [&[Plain], &[Plain, Offered], &[Offered, Plain], &[Required], &[Required], &[Required]];
        for ((name, mode), expected) in Mode::ALL.into_iter().zip(expected) {
            assert_eq!(encryptions(mode, false, true), expected, "{name}");
            assert_eq!(encryptions(mode, true, true), [Plain], "{name}");
        }
        assert_eq!(encryptions(Mode::Prefer, false, false), [Plain]);
        assert_eq!(encryptions(Mode::Allow, false, false), [Plain]);
    }
}
