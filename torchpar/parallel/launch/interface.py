# SPDX-License-Identifier: MIT
"""The address at which gloo listens, and the machine whose processes share a loopback interface.

gloo takes the first address of this host's name that the machine has, and 127.0.0.1 where there is
none. Each rank tells the others this address, and they try no other.
"""

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
# Family, kind, protocol, canonical name, and host and port: of `socket.getaddrinfo`.
Address = tuple[Any, Any, int, str, Any]


def gloo_address() -> str:
    """Return the address at which gloo listens; "" if GLOO_SOCKET_IFNAME names an interface.

    A name server that does not answer can take longer than a person waits.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    with suppress(OSError, UnicodeError):  # the name has no address
        return address_of_host() or LOOPBACK
    return LOOPBACK


def address_of_host() -> str:
    """Return the first address of this host's name that the machine has, or "".

    Raises:
        OSError: the name has no address.
        UnicodeError: it is no name, such as one of 64 letters.
    """
    addresses = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    return next((str(one[4][0]) for one in addresses if is_of_this_machine(one)), "")


def is_of_this_machine(address: Address) -> bool:
    family, kind, protocol, _, (host, _, *scope) = address
    with suppress(OSError), socket.socket(family, kind, protocol) as s:
        s.bind((host, 0, *scope))
        return True
    return False


def is_loopback(address: str) -> bool:
    """Whether only processes of one machine reach each other by an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def machine() -> str:
    """Return what processes have in common that share a loopback interface; "" if nothing tells.

    A container can have such an interface of its own, and share all else with others.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return ""
