//! Hints over UDP.

use std::net::{IpAddr, SocketAddr};

use async_trait::async_trait;
use tokio::net::UdpSocket;

use crate::HintNet;

/// Larger datagrams are none of ours.
const LONGEST: usize = 1200;

/// A bound socket; its address as text (`10.0.0.1:7000`) is what other nodes find in the slot block.
pub struct UdpHints {
    socket: UdpSocket,
    address: String,
}

impl UdpHints {
    /// Binds `bind` (port 0: any free one) and tells the others to reach it at `reachable`, with the bound port.
    pub async fn bind(bind: SocketAddr, reachable: IpAddr) -> std::io::Result<Self> {
        let socket = UdpSocket::bind(bind).await?;
        // Before the first readiness event every send would fail.
        socket.writable().await?;
        let address = SocketAddr::new(reachable, socket.local_addr()?.port()).to_string();
        Ok(Self { socket, address })
    }
}

#[async_trait]
impl HintNet for UdpHints {
    fn address(&self) -> Vec<u8> {
        self.address.clone().into_bytes()
    }

    fn send(&self, to: &[u8], datagram: Vec<u8>) {
        // A full socket buffer or an unreachable host loses the hint; the doorbell remains.
        if let Some(to) = std::str::from_utf8(to).ok().and_then(|s| s.parse::<SocketAddr>().ok())
            && let Err(e) = self.socket.try_send_to(&datagram, to)
        {
            tracing::debug!("hint to {to}: {e}");
        }
    }

    async fn recv(&self) -> Vec<u8> {
        let mut buf = [0; LONGEST];
        loop {
            match self.socket.recv_from(&mut buf).await {
                Ok((n, _)) => return buf[..n].to_vec(),
                Err(e) => {
                    // An ICMP error of an earlier send shows up here; a broken socket must not spin.
                    tracing::debug!("hints: {e}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_arrive() {
        let local: IpAddr = "127.0.0.1".parse().unwrap();
        let a = UdpHints::bind(SocketAddr::new(local, 0), local).await.unwrap();
        let b = UdpHints::bind(SocketAddr::new(local, 0), local).await.unwrap();
        a.send(b"nonsense", vec![9]);
        a.send(&b.address(), vec![1, 2, 3]);
        assert_eq!(b.recv().await, [1, 2, 3]);
    }
}
