//! Chooses a port.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

/// Below the ports that Linux and macOS give to outgoing connections. While the server is down, no
/// such connection can take its port; and a client that keeps trying to connect can't be given that
/// very port, by which TCP would connect it to itself.
const QUIET: Range<u16> = 20_000..32_768;
const TRIES: u32 = 100;

/// A port of `127.0.0.1` that nobody listens on now. That may change at any time.
pub(super) fn free() -> io::Result<u16> {
    for _ in 0..TRIES {
        let port = random_of(QUIET);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr().map(|address| address.port())
}

fn random_of(range: Range<u16>) -> u16 {
    let random = RandomState::new().hash_one(()) % u64::from(range.end - range.start);
    range.start + u16::try_from(random).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_quiet_ones_and_differ() {
        let ports: std::collections::HashSet<_> = (0..20).map(|_| free().unwrap()).collect();
        assert!(ports.len() > 10);
        assert!(ports.iter().all(|port| QUIET.contains(port)));
    }
}
