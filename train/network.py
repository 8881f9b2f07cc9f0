"""Which network interface the ranks of several machines reach one another by.

Gloo takes the address that the machine's own name resolves to, which on many is a loopback address that no other
machine can reach. The route to the master's address knows better.
"""

from __future__ import annotations

import socket

import psutil

ANY_PORT = 9  # of a datagram socket that never sends
ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): only a default route leads to it


def interface_to(master: str) -> str | None:
    """The interface by which this machine reaches the master, None where no route leads there.

    On the master itself it is the one that carries the master's address. Where the master's name means a loopback
    address, as Debian has it in /etc/hosts, only the master sees it so, and the interface of the default route is it.

    Args:
        master: name or address of the first rank's machine.
    """
    own = _own_address(master)
    if own is not None and _is_loopback(own) and master not in {"localhost", own}:
        own = _own_address(ELSEWHERE) or own
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address.partition("%")[0] for address in addresses}:
            return name
    return None


def _own_address(target: str) -> str | None:
    """The address that packets from here to `target` would carry; None where none could go."""
    try:
        found = socket.getaddrinfo(target, ANY_PORT, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # a route is looked up; nothing is sent
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
