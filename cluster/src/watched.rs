//! A value whose changes wake everybody who waits for one, in the order in which they began to wait.
//!
//! What tokio's watch channel does, but that wakes its receivers in an order that is random in every process: a run of the
//! simulator would not be repeatable.

use parking_lot::{RwLock, RwLockReadGuard};
use tokio::sync::Notify;

pub(crate) struct Watched<T> {
    value: RwLock<T>,
    changed: Notify,
}

impl<T> Watched<T> {
    pub fn new(value: T) -> Self {
        Self { value: RwLock::new(value), changed: Notify::new() }
    }

    /// The value now. The guard must not live across an await.
    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.value.read()
    }

    pub fn modify(&self, f: impl FnOnce(&mut T)) {
        f(&mut self.value.write());
        self.changed.notify_waiters();
    }

    /// Wakes the waiters if `f` returns true, which is returned.
    pub fn modify_if(&self, f: impl FnOnce(&mut T) -> bool) -> bool {
        let modified = f(&mut self.value.write());
        if modified {
            self.changed.notify_waiters();
        }
        modified
    }

    pub fn replace(&self, value: T) {
        self.modify(|v| *v = value);
    }
}

impl<T: Clone> Watched<T> {
    /// The first value found that `wanted` accepts; the current one counts.
    pub async fn wait_for(&self, wanted: impl Fn(&T) -> bool) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let now = self.value.read();
                if wanted(&now) {
                    return now.clone();
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waiters_are_woken_in_order_and_see_every_value_they_wait_for() {
        let (value, order) = (Arc::new(Watched::new(0)), Arc::new(parking_lot::Mutex::new(Vec::new())));
        let mut tasks = tokio::task::JoinSet::new();
        for i in 0..20 {
            let (value, order) = (value.clone(), order.clone());
            tasks.spawn(async move {
                let seen = value.wait_for(|v| *v >= 2).await;
                order.lock().push((i, seen));
            });
        }
        tokio::task::yield_now().await;
        value.replace(1);
        tokio::task::yield_now().await;
        assert!(order.lock().is_empty());
        assert!(!value.modify_if(|_| false));
        value.modify(|v| *v += 1);
        while tasks.join_next().await.is_some() {}
        assert_eq!(*order.lock(), (0..20).map(|i| (i, 2)).collect::<Vec<_>>());
        assert_eq!(value.wait_for(|v| *v == 2).await, 2);
    }
}
