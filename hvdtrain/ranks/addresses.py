"""Under which names and addresses ranks on other hosts may reach this one, and whether something listens there."""

from __future__ import annotations

import fcntl
import socket
import struct


def listens(host: str, port: int) -> bool:
    """Whether something accepts connections there; waits two seconds at most."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def own_addresses() -> list[str]:
    """The names and IPv4 addresses under which other nodes may reach this one, the host name first."""
    addresses = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(
                    probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15])
                )  # SIOCGIFADDR
            except OSError:
                continue  # an interface without an IPv4 address
            address = socket.inet_ntoa(packed[20:24])
            if not address.startswith("127."):
                addresses.append(address)
    return addresses
