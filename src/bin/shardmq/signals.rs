//! Ctrl-C and SIGTERM, for commands that have something to finish.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// From when this is made on, these signals don't end the process by themselves.
pub(crate) struct Interrupt {
    terminal: Signal,
    system: Signal,
    came: bool,
}

impl Interrupt {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminal: signal(SignalKind::interrupt())?,
            system: signal(SignalKind::terminate())?,
            came: false,
        })
    }

    /// Returns when one of the signals came, and from then on at once. Cancel safe.
    pub(crate) async fn caught(&mut self) {
        if !self.came {
            tokio::select! {
                _ = self.terminal.recv() => {}
                _ = self.system.recv() => {}
            }
            self.came = true;
        }
    }

    /// Waits for another signal from now on.
    pub(crate) fn forget(&mut self) {
        self.came = false;
    }
}
