//! Telling the kernel that a file has grown.
//!
//! The kernel learns a file's size from attributes, and does two things wrong where there are memory maps (Linux 6.18):
//!
//! - Attributes that it asked for before an invalidation, it hands to whoever asked and does not believe itself. A process that
//!   maps what `fstat` told gets SIGBUS.
//! - It takes the new size first and cuts the cached pages to it afterwards (`fuse_change_attributes_i`), which may wait for
//!   a page that is being read. What others append until then is zeros in that page, for whoever maps or reads it.
//!
//! A store of the file's last byte into its cache makes the file longer without either: so it is done before a
//! larger size is told. The byte may be out of date when it gets there, because the store waits for pages that are being read and
//! nothing can be held over that: if the file has changed meanwhile, the page is dropped.

use fs_core::{Attr, FsError, Leased};

use crate::handler::Job;

impl Job {
    /// Attributes that the kernel can be told.
    pub(crate) async fn attr_in_step(&self, ino: u64) -> Result<Leased<Attr>, FsError> {
        let first = self.volume.getattr(ino).await?;
        if !self.must_learn(&first.value) {
            return Ok(first);
        }
        let attr = first.value;
        drop(first);
        let (size, ctime) = (attr.inode.size, attr.inode.ctime);
        let Some(last) = self.volume.read(ino, size - 1, 1).await?.value.first().copied() else {
            // It has been cut, and what it is now is no news.
            return self.volume.getattr(ino).await;
        };
        let known = self.known.clone();
        self.notify(move || known.grow(ino, size, last)).await;
        let now = self.volume.getattr(ino).await?;
        if (now.value.inode.size, now.value.inode.ctime) == (size, ctime) {
            return Ok(now);
        }
        drop(now);
        self.drop_pages(ino, (size - 1) as i64, 1).await;
        // As it is now, it may have grown again.
        Ok(Leased::past(attr))
    }

    pub(crate) fn must_learn(&self, attr: &Attr) -> bool {
        attr.inode.is_file() && self.known.has_grown(attr.ino, attr.inode.size)
    }

    pub(crate) async fn drop_pages(&self, ino: u64, first: i64, len: i64) {
        let known = self.known.clone();
        self.notify(move || known.drop_range(ino, first, len)).await;
    }

    /// Notifications may wait for requests: on a thread of their own, and with nothing held that a request may wait for.
    async fn notify(&self, what: impl FnOnce() + Send + 'static) {
        if let Err(e) = tokio::task::spawn_blocking(what).await {
            tracing::error!("a thread that notifies the kernel ended: {e}");
        }
    }
}
