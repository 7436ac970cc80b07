//! A simulated network for hints: loss, delay, duplication and cuts, repeatable from a seed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;
use tokio::time::Duration;

use crate::HintNet;

/// How datagrams fare.
#[derive(Clone, Copy, Debug)]
pub struct NetRates {
    /// Probability that a datagram is lost.
    pub loss: f64,
    /// Probability that it arrives twice.
    pub duplicate: f64,
    /// Each copy takes between the shortest and the longest time, so datagrams overtake each other.
    pub delay: (Duration, Duration),
    /// Probability that somebody off the LUN sends another datagram too: an old one to a wrong port, or one with a changed bit.
    pub forged: f64,
}

impl Default for NetRates {
    fn default() -> Self {
        Self { loss: 0.0, duplicate: 0.0, delay: (Duration::from_micros(100), Duration::from_micros(500)), forged: 0.0 }
    }
}

struct State {
    rng: StdRng,
    rates: NetRates,
    cut: BTreeSet<u32>,
    inboxes: BTreeMap<u32, mpsc::UnboundedSender<Vec<u8>>>,
    /// What a listener has heard, for forgeries.
    heard: Option<Vec<u8>>,
}

/// The network; every node opens its own [`SimPort`].
pub struct SimNet {
    state: Mutex<State>,
}

/// One node's connection.
pub struct SimPort {
    net: Arc<SimNet>,
    number: u32,
    inbox: tokio::sync::Mutex<mpsc::UnboundedReceiver<Vec<u8>>>,
}

impl SimNet {
    pub fn new(seed: u64) -> Arc<Self> {
        let rng = StdRng::seed_from_u64(seed);
        let state =
            State { rng, rates: NetRates::default(), cut: BTreeSet::new(), inboxes: BTreeMap::new(), heard: None };
        Arc::new(Self { state: Mutex::new(state) })
    }

    pub fn set_rates(&self, rates: NetRates) {
        self.state.lock().rates = rates;
    }

    /// Opens another connection.
    pub fn open(self: &Arc<Self>) -> Arc<SimPort> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let mut state = self.state.lock();
        let number = state.inboxes.keys().next_back().map_or(0, |last| last + 1);
        state.inboxes.insert(number, sender);
        Arc::new(SimPort { net: self.clone(), number, inbox: tokio::sync::Mutex::new(inbox) })
    }

    /// Puts a datagram into a port's inbox, as anybody on the network could.
    pub fn inject(self: &Arc<Self>, to: &[u8], datagram: Vec<u8>) {
        self.deliver(None, to, datagram);
    }

    /// What somebody who hears this datagram makes of it and of an earlier one.
    fn forgery(&self, datagram: &[u8]) -> Option<(u32, Vec<u8>)> {
        let mut state = self.state.lock();
        let State { rng, rates, inboxes, heard, .. } = &mut *state;
        if rates.forged <= 0.0 || !rng.random_bool(rates.forged) {
            return None;
        }
        let mut forged = heard.replace(datagram.to_vec())?;
        if rng.random_bool(0.5) && !forged.is_empty() {
            let at = rng.random_range(0..forged.len());
            forged[at] ^= 1 << rng.random_range(0..8);
        }
        let to = rng.random_range(0..inboxes.len());
        Some((*inboxes.keys().nth(to)?, forged))
    }

    fn deliver(self: &Arc<Self>, from: Option<u32>, to: &[u8], datagram: Vec<u8>) {
        let Ok(to) = to.try_into().map(u32::from_le_bytes) else { return };
        let delays = {
            let mut state = self.state.lock();
            let rates = state.rates;
            if state.cut.contains(&to) || from.is_some_and(|from| state.cut.contains(&from)) {
                return;
            }
            let mut copies = u32::from(!state.rng.random_bool(rates.loss));
            copies += u32::from(copies == 1 && state.rng.random_bool(rates.duplicate));
            let (shortest, longest) = rates.delay;
            let spread = u64::try_from((longest - shortest).as_micros()).unwrap_or(u64::MAX);
            (0..copies)
                .map(|_| shortest + Duration::from_micros(state.rng.random_range(0..=spread)))
                .collect::<Vec<_>>()
        };
        for delay in delays {
            let (net, datagram) = (self.clone(), datagram.clone());
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let state = net.state.lock();
                if let Some(inbox) = state.inboxes.get(&to).filter(|_| !state.cut.contains(&to)) {
                    // A closed port loses it.
                    let _ = inbox.send(datagram);
                }
            });
        }
    }
}

impl SimPort {
    /// Cuts the port off, both ways.
    pub fn cut(&self, cut: bool) {
        let mut state = self.net.state.lock();
        if cut {
            state.cut.insert(self.number);
        } else {
            state.cut.remove(&self.number);
        }
    }
}

#[async_trait]
impl HintNet for SimPort {
    fn address(&self) -> Vec<u8> {
        self.number.to_le_bytes().to_vec()
    }

    fn send(&self, to: &[u8], datagram: Vec<u8>) {
        if let Some((to, forged)) = self.net.forgery(&datagram) {
            self.net.deliver(None, &to.to_le_bytes(), forged);
        }
        self.net.deliver(Some(self.number), to, datagram);
    }

    async fn recv(&self) -> Vec<u8> {
        match self.inbox.lock().await.recv().await {
            Some(datagram) => datagram,
            // The network is gone.
            None => std::future::pending().await,
        }
    }
}
