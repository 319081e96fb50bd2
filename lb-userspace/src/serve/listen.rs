//! Listening as Go does, and trying again where it fails.
//!
//! In: an address, a router. Out: a server that is there as soon as its address is free. Never here: what is answered.

use std::{io, net::SocketAddr, time::Duration};

use axum::Router;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::sleep,
};

use super::troubles::{Trouble, Troubles};

/// How long an address that can't be bound is left alone (`proxy_health.go`, `server.go`: 5 s).
pub const RETRY: Duration = Duration::from_secs(5);

/// Which families an unspecified address stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Both, where the kernel has both: Go's network `tcp`.
    Both,
    /// Its own: `tcp4`, `tcp6`.
    Family,
}

/// Listens. An address that was in use a moment ago may be used again.
///
/// # Errors
///
/// The kernel's.
pub fn open(address: SocketAddr, reach: Reach) -> io::Result<TcpListener> {
    let both = SocketAddr::from(([0_u16; 8], address.port()));
    let wide = reach == Reach::Both && address.ip().is_unspecified();
    let listener = match open_at(if wide { both } else { address }, !wide) {
        // A kernel without IPv6.
        Err(rustix::io::Errno::AFNOSUPPORT) if wide => open_at(SocketAddr::from(([0, 0, 0, 0], address.port())), true)?,
        other => other?,
    };
    TcpListener::from_std(listener)
}

fn open_at(address: SocketAddr, only_v6: bool) -> rustix::io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, only_v6)?;
    }
    bind(&socket, &address)?;
    listen(&socket, 1024)?;
    Ok(socket.into())
}

/// A server for a whole life of the agent.
#[derive(Debug)]
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    /// What people call it.
    pub name: &'static str,
    /// The reason that an event gives when it can't.
    pub reason: &'static str,
    /// Whom to tell if a failure must end the agent.
    pub fatal: Option<mpsc::Sender<Trouble>>,
}

/// Serves, sooner or later.
pub async fn serve(service: Service, router: Router, troubles: Troubles) {
    let Service { address, name, reason, fatal } = service;
    loop {
        match open(address, Reach::Both) {
            Ok(listener) => {
                troubles.resolve(name);
                // Returns only if it is told to, which nobody does.
                let _ = axum::serve(listener, router.clone()).await;
            }
            Err(error) => {
                let trouble = Trouble::of_node(
                    reason,
                    format!("cannot serve {name} at {address}: {error}; is another kube-proxy running? trying again"),
                );
                troubles.report(name, trouble.clone());
                if let Some(fatal) = &fatal {
                    let _ = fatal.send(trouble).await;
                    return;
                }
            }
        }
        sleep(RETRY).await;
    }
}

/// A server that can be closed.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<()>,
    end: oneshot::Sender<()>,
}

impl Server {
    /// Listens at an address of one family, and serves.
    ///
    /// # Errors
    ///
    /// When the address can't be bound.
    pub fn open(address: SocketAddr, router: Router) -> io::Result<Self> {
        let listener = open(address, Reach::Family)?;
        let (end, ended) = oneshot::channel();
        let server = axum::serve(listener, router).with_graceful_shutdown(async {
            let _ = ended.await;
        });
        Ok(Self { task: tokio::spawn(async { _ = server.await }), end })
    }

    /// The address is free when this returns; connections end after their current answer.
    pub async fn close(self) {
        let _ = self.end.send(());
        self.task.abort();
        let _ = self.task.await;
    }
}
