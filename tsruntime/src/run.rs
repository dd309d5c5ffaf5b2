//! The requests of one caller.

use tokio::sync::mpsc;

use crate::engine::{Engine, EngineError, Event, Request, Sender};

/// Requests of one caller, and their events in one stream. Dropping it cancels what still runs.
pub struct Run {
    engine: &'static Engine,
    sender: Sender,
    receiver: mpsc::UnboundedReceiver<(usize, Event)>,
    /// Ids of the requests by index; None once its last event was taken, or it was cancelled.
    live: Vec<Option<u64>>,
}

impl Run {
    pub fn new(engine: &'static Engine) -> Run {
        let (sender, receiver) = mpsc::unbounded_channel();
        Run { engine, sender, receiver, live: Vec::new() }
    }

    /// Adds a request; its events carry its index: 0, 1, 2, ...
    pub fn submit(&mut self, request: &Request) -> Result<(), EngineError> {
        let id = self.engine.submit(request, &self.sender, self.live.len())?;
        self.live.push(Some(id));
        Ok(())
    }

    /// Ends one request; no more of its events come.
    pub fn cancel(&mut self, index: usize) {
        if let Some(id) = self.live[index].take() {
            self.engine.cancel(id);
        }
    }

    /// The next event of any live request; None when all have finished.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        while self.live.iter().any(Option::is_some) {
            // `sender` keeps the channel open.
            let (index, event) = self.receiver.recv().await?;
            if let Some(event) = self.take(index, event) {
                return Some((index, event));
            }
        }
        None
    }

    /// An event that is there already.
    pub fn try_next(&mut self) -> Option<(usize, Event)> {
        loop {
            let (index, event) = self.receiver.try_recv().ok()?;
            if let Some(event) = self.take(index, event) {
                return Some((index, event));
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) -> Option<Event> {
        self.live[index]?;
        if matches!(event, Event::Finished(_)) {
            self.live[index] = None;
        }
        Some(event)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        (0..self.live.len()).for_each(|index| self.cancel(index));
    }
}
