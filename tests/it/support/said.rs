//! What the library logs, kept so that tests can look at it. All tests of a process share it: whoever
//! looks asks for what only its own test can have caused.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

static SAID: Mutex<Vec<Said>> = Mutex::new(Vec::new());

/// An event, with its fields as text; `message` is among them.
#[derive(Debug, Clone)]
pub struct Said {
    pub level: Level,
    fields: BTreeMap<&'static str, String>,
}

impl Said {
    /// Whether a field has this value.
    pub fn has(&self, field: &str, value: &str) -> bool {
        self.fields.get(field).is_some_and(|found| found == value)
    }
}

impl Said {
    /// A field's text, empty where there is none.
    pub fn field(&self, field: &str) -> &str {
        self.fields.get(field).map_or("", String::as_str)
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// All of the level or worse that was said so far with this value in a field.
pub fn said(level: Level, field: &str, value: &str) -> Vec<Said> {
    let all = SAID.lock().unwrap();
    all.iter().filter(|said| said.level <= level && said.has(field, value)).cloned().collect()
}

/// The last that the library said of trouble, the latest first.
pub fn last(count: usize) -> Vec<Said> {
    let all = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter().rev().filter(|said| said.level <= Level::WARN).take(count).cloned().collect()
}

/// Keeps what is said.
pub struct Keep;

impl<S: Subscriber> Layer<S> for Keep {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut said = Said { level: *event.metadata().level(), fields: BTreeMap::new() };
        event.record(&mut said);
        SAID.lock().unwrap().push(said);
    }
}
