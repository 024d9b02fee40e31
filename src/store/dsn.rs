//! Connection strings of libpq, as a URL or as `key=value`: what tokio-postgres does not know is taken
//! out of them, the rest is left as it was.

use std::fmt::Write;

/// Parameters that we follow ourselves. None is a secret.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) sslmode: Option<String>,
    pub(super) sslrootcert: Option<String>,
    pub(super) sslcert: Option<String>,
    pub(super) sslkey: Option<String>,
    pub(super) passfile: Option<String>,
    /// Whether it is said what session is wanted: that one stays in the string.
    pub(super) names_session: bool,
}

impl Parameters {
    /// Fills in what the string left out, from libpq's variables for files of this machine. Whether a
    /// session is encrypted belongs to the address, which all processes share: `PGSSLMODE` is not
    /// looked at.
    pub(super) fn or_from(mut self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let fields = [
            ("PGSSLROOTCERT", &mut self.sslrootcert),
            ("PGSSLCERT", &mut self.sslcert),
            ("PGSSLKEY", &mut self.sslkey),
            ("PGPASSFILE", &mut self.passfile),
        ];
        for (name, field) in fields {
            if field.is_none() {
                *field = variable(name);
            }
        }
        self
    }

    /// Whether it is one of ours. The last one of a name counts.
    fn take(&mut self, key: &str, value: &str) -> bool {
        let field = match (key, value) {
            ("sslmode", _) => &mut self.sslmode,
            ("sslrootcert", _) => &mut self.sslrootcert,
            ("sslcert", _) => &mut self.sslcert,
            ("sslkey", _) => &mut self.sslkey,
            ("passfile", _) => &mut self.passfile,
            // As JDBC writes it; libpq takes that too.
            ("ssl", "true") => {
                self.sslmode = Some("require".to_owned());
                return true;
            }
            ("target_session_attrs", _) => {
                self.names_session = true;
                return false;
            }
            _ => return false,
        };
        *field = Some(value.to_owned());
        true
    }
}

/// What tokio-postgres is to parse, and what it is not to see. None where it is no connection string.
/// The first may have a password.
pub(super) fn split(dsn: &str) -> Option<(String, Parameters)> {
    let is_url = ["postgres://", "postgresql://"].iter().any(|scheme| dsn.starts_with(scheme));
    if is_url { split_url(dsn) } else { split_pairs(dsn) }
}

fn split_url(url: &str) -> Option<(String, Parameters)> {
    let mut own = Parameters::default();
    let Some(mark) = query_mark(url) else {
        return Some((url.to_owned(), own));
    };
    let mut rest = url[..mark].to_owned();
    let mut separator = '?';
    for pair in url[mark + 1..].split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=')?;
        if !own.take(&decoded(key)?, &decoded(value)?) {
            rest.push(separator);
            rest.push_str(pair);
            separator = '&';
        }
    }
    Some((rest, own))
}

/// Where the parameters begin. All up to the first `@` is user and password for tokio-postgres, also
/// a question mark.
fn query_mark(url: &str) -> Option<usize> {
    let from = url.find('@').unwrap_or(0);
    url[from..].find('?').map(|mark| from + mark)
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            rest = after;
            let digits = std::str::from_utf8(digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

fn split_pairs(text: &str) -> Option<(String, Parameters)> {
    let mut own = Parameters::default();
    let mut rest = String::new();
    let mut text = text.trim_start();
    while !text.is_empty() {
        let (key, after) = text.split_at(text.find(|c: char| c == '=' || c.is_whitespace())?);
        let after = after.trim_start().strip_prefix('=')?.trim_start();
        let (value, after) = value(after)?;
        if !own.take(key, &value) {
            let value = value.replace('\\', r"\\").replace('\'', r"\'");
            let _ = write!(rest, "{key}='{value}' ");
        }
        text = after.trim_start();
    }
    Some((rest, own))
}

/// A value, in quotes or up to the next space, and what follows.
fn value(text: &str) -> Option<(String, &str)> {
    let (quoted, text) = text.strip_prefix('\'').map_or((false, text), |inner| (true, inner));
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            c if !quoted && c.is_whitespace() => return Some((value, &text[at..])),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Parameters {
        split(text).unwrap().1
    }

    #[test]
    fn our_parameters_are_taken_out_of_both_forms() {
        let expected = Parameters {
            sslmode: Some("verify-full".into()),
            sslrootcert: Some("/a b/ca.pem".into()),
            sslcert: Some("c".into()),
            sslkey: Some("k'".into()),
            passfile: Some("/p".into()),
            names_session: true,
        };
        let url = "postgresql://u:p%40@h1:1,h2/d?sslmode=verify-full&connect_timeout=3\
            &sslrootcert=%2Fa%20b/ca.pem&sslcert=c&sslkey=k'&target_session_attrs=read-write\
            &passfile=/p";
        let rest =
            "postgresql://u:p%40@h1:1,h2/d?connect_timeout=3&target_session_attrs=read-write";
        assert_eq!(split(url), Some((rest.to_owned(), expected.clone())));

        let pairs = r"sslmode = verify-full  sslrootcert='/a b/ca.pem' password='it\'s \\' sslcert=c
            sslkey=k\' passfile='/p' target_session_attrs=read-write host=h";
        let rest = r"password='it\'s \\' target_session_attrs='read-write' host='h' ";
        assert_eq!(split(pairs), Some((rest.to_owned(), expected)));
    }

    #[test]
    fn what_has_none_of_them_stays_as_it_is() {
        for url in
            ["postgresql://u:a?b@h/d", "postgres://h/d?application_name=x%20y", "postgresql://"]
        {
            assert_eq!(split(url), Some((url.to_owned(), Parameters::default())), "{url}");
        }
        assert_eq!(split("postgresql://h?sslmode=allow").unwrap().0, "postgresql://h");
    }

    #[test]
    fn the_last_of_a_name_counts_and_jdbc_is_understood() {
        let mode = |text: &str| given(text).sslmode.unwrap();
        assert_eq!(mode("postgresql://h/d?sslmode=allow&sslmode=require"), "require");
        assert_eq!(mode("postgresql://h/d?ssl=true"), "require");
        assert_eq!(mode("postgresql://h/d?%73slmode=disable"), "disable");
    }

    #[test]
    fn what_is_no_connection_string_is_none() {
        let wrong =
            ["postgresql://h?x", "postgresql://h?a=%4", "postgresql://h?a=%zz", "host", "a='b"];
        for text in wrong {
            assert_eq!(split(text), None, "{text}");
        }
    }

    #[test]
    fn variables_fill_in_what_was_left_out() {
        let filled =
            given("postgresql://h?sslcert=mine&sslkey=").or_from(|name| Some(name.to_lowercase()));
        assert_eq!(filled.sslcert, Some("mine".into()));
        assert_eq!(filled.sslkey, Some(String::new()));
        assert_eq!(filled.sslrootcert, Some("pgsslrootcert".into()));
        assert_eq!(filled.passfile, Some("pgpassfile".into()));
        assert_eq!(filled.sslmode, None);
    }
}
