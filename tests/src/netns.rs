//! Several hosts on one machine: network namespaces, each with an address towards the storage and one towards the other nodes.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cluster::Result;

/// Which of a host's two networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Towards the target.
    San,
    /// Towards the other nodes.
    Hints,
}

impl Network {
    const ALL: [Self; 2] = [Self::San, Self::Hints];

    fn name(self) -> &'static str {
        match self {
            Self::San => "san",
            Self::Hints => "hint",
        }
    }

    fn address(self, last: u8) -> Ipv4Addr {
        match self {
            Self::San => [198, 18, 0, last].into(),
            Self::Hints => [198, 19, 0, last].into(),
        }
    }
}

/// A namespace for the target, with a bridge per network, and one per host. Gone when dropped.
pub struct Hosts {
    prefix: String,
    hosts: usize,
}

fn ip(args: &str) -> Result<()> {
    let out = Command::new("ip").args(args.split(' ')).output();
    let out = out.map_err(|e| format!("ip: {e}: `cargo xtask setup` installs it (package iproute2)"))?;
    if out.status.success() {
        Ok(())
    } else {
        Err(format!("ip {args}: {}", String::from_utf8_lossy(&out.stderr)).into())
    }
}

impl Hosts {
    pub fn new(hosts: usize) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("cfs{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let this = Self { prefix, hosts: 0 };
        let hub = this.hub_name();
        ip(&format!("netns add {hub}"))?;
        ip(&format!("-n {hub} link set lo up"))?;
        for network in Network::ALL {
            let (name, at) = (network.name(), network.address(1));
            ip(&format!("-n {hub} link add {name} type bridge"))?;
            ip(&format!("-n {hub} addr add {at}/24 dev {name}"))?;
            ip(&format!("-n {hub} link set {name} up"))?;
        }
        let mut this = this;
        for host in 0..hosts {
            this.hosts = host + 1;
            this.add(host)?;
        }
        Ok(this)
    }

    fn add(&self, host: usize) -> Result<()> {
        let (hub, own) = (self.hub_name(), self.name(host));
        ip(&format!("netns add {own}"))?;
        ip(&format!("-n {own} link set lo up"))?;
        for network in Network::ALL {
            let (name, at) = (network.name(), self.address(host, network));
            ip(&format!("-n {hub} link add {name}{host} type veth peer name {name} netns {own}"))?;
            ip(&format!("-n {hub} link set {name}{host} master {name} up"))?;
            ip(&format!("-n {own} addr add {at}/24 dev {name}"))?;
            ip(&format!("-n {own} link set {name} up"))?;
        }
        Ok(())
    }

    fn hub_name(&self) -> String {
        format!("{}-hub", self.prefix)
    }

    fn name(&self, host: usize) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// The namespace of the target.
    pub fn hub(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.hub_name())
    }

    pub fn namespace(&self, host: usize) -> PathBuf {
        PathBuf::from("/run/netns").join(self.name(host))
    }

    /// Where the target listens.
    pub fn portal(&self) -> Ipv4Addr {
        Network::San.address(1)
    }

    pub fn address(&self, host: usize, network: Network) -> Ipv4Addr {
        network.address(10 + host as u8)
    }

    /// As if the cable were pulled.
    pub fn cut(&self, host: usize, network: Network) -> Result<()> {
        ip(&format!("-n {} link set {}{host} down", self.hub_name(), network.name()))
    }

    pub fn heal(&self, host: usize, network: Network) -> Result<()> {
        ip(&format!("-n {} link set {}{host} up", self.hub_name(), network.name()))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = ip(&format!("netns del {}", self.name(host)));
        }
        let _ = ip(&format!("netns del {}", self.hub_name()));
    }
}
