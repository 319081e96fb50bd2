//! Sockets that std can't make: TCP with a chosen source and a bounded connect, UDP that hears of refusals while unconnected.
//! In: addresses. Out: std's types. Never here: a wait without an end.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, ipproto, socket_with, sockopt,
};

/// Connects within `timeout`, from `source` where one is given; the socket is in the calling thread's namespace.
pub fn connect_tcp(source: Option<SocketAddr>, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    if let Some(source) = source {
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &source)?;
    }
    match connect(&socket, &to) {
        Ok(()) => {}
        Err(rustix::io::Errno::INPROGRESS) => {
            let mut events = [PollFd::new(&socket, PollFlags::OUT)];
            let limit = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
            if poll(&mut events, Some(&limit))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sockopt::socket_error(&socket)??;
        }
        Err(error) => return Err(error.into()),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

/// A UDP socket for talking to `to`, bound to `source` where one is given, not connected.
pub fn udp_for(source: Option<SocketAddr>, to: SocketAddr, timeout: Duration) -> io::Result<UdpSocket> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = match source {
        Some(source) => UdpSocket::bind(source)?,
        None => UdpSocket::bind(any)?,
    };
    socket.set_read_timeout(Some(timeout))?;
    Ok(socket)
}

/// Lets an unconnected UDP socket hear of ICMP errors (IP_RECVERR), as resolvers do.
pub fn hear_errors(socket: &UdpSocket) -> io::Result<()> {
    let (level, option) = if socket.local_addr()?.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    };
    set_option(socket, level, option, 1)
}

/// A read that ran into its time limit is a timeout, whatever the kernel calls it.
pub fn as_timeout(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// Sets an option whose value is a number.
pub fn set_option(socket: &impl AsRawFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call, and the option's value is an int that lives through it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads an option whose value is a number.
pub fn option(socket: &impl AsRawFd, level: i32, option: i32) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call; the value is as long as `length` says.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Sends an IP packet as it is, header included, the way that the calling thread's namespace routes it.
pub fn send_raw(to: SocketAddr, packet: &[u8]) -> io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
    rustix::net::sendto(&socket, packet, SendFlags::empty(), &SocketAddr::new(to.ip(), 0))?;
    Ok(())
}

/// An ICMP echo from the calling thread's namespace; `Ok` when it is answered.
pub fn ping(to: IpAddr, timeout: Duration) -> io::Result<()> {
    let (family, proto, request, reply) = if to.is_ipv4() {
        (AddressFamily::INET, ipproto::ICMP, 8, 0)
    } else {
        (AddressFamily::INET6, ipproto::ICMPV6, 128, 129)
    };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(proto))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(timeout))?;
    connect(&socket, &SocketAddr::new(to, 0))?;
    // Over IPv6 the kernel writes the checksum; over IPv4 it is a constant for a constant packet.
    let sum = !((u16::from(request) << 8) + 0x0102 + 0x0304);
    let [high, low] = if to.is_ipv4() { sum.to_be_bytes() } else { [0, 0] };
    rustix::net::send(&socket, &[request, 0, high, low, 1, 2, 3, 4], SendFlags::empty())?;
    let start = Instant::now();
    let mut buffer = [0_u8; 1500];
    while start.elapsed() < timeout {
        let (length, _) = rustix::net::recv(&socket, &mut buffer, RecvFlags::empty())?;
        let header = if to.is_ipv4() { 20 } else { 0 };
        if buffer[..length].get(header) == Some(&reply) {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Sends a frame as it is out of a device of the calling thread's namespace.
pub fn send_frame(device: &str, frame: &[u8]) -> io::Result<()> {
    let name = std::ffi::CString::new(device)?;
    // SAFETY: the name ends with a zero and lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: frame and address live through the call and are as long as said.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
