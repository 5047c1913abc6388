"""The MAC address of a network's bridge is held where it is.

A bridge that was given no address has the lowest of its ports' (kernel: br_stp_recalculate_bridge_id), so with netavark
1.4 it changes as containers come and go (netavark's pull request 833 gives it one). An engine that knows the old one
from ARP sends its answers into nowhere until TCP asks again, 2 to 14 s later. Setting the address that it has already
changes nothing on the network, and makes the kernel leave it alone from then on.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path
from typing import Final

_DEVICES: Final = Path("/sys/class/net")
_NET_ADDR_SET: Final = "3"  # linux/netdevice.h
_SIOCSIFHWADDR: Final = 0x8924  # linux/sockios.h
_ARPHRD_ETHER: Final = 1


def follows_its_ports(interface: str, devices: Path = _DEVICES) -> bool:
    """Whether a device is a bridge whose address changes with its ports; False where there is no such device."""
    device = devices / interface
    try:
        return (device / "bridge").is_dir() and (device / "addr_assign_type").read_text().strip() != _NET_ADDR_SET
    except OSError:
        return False


def hold_address(interface: str) -> bool:
    """Have a bridge keep the address that it has; whether there was something to do. Raises OSError."""
    if not interface or not follows_its_ports(interface):
        return False
    address = bytes.fromhex((_DEVICES / interface / "address").read_text().strip().replace(":", ""))
    request = struct.pack("16sH14s8x", interface.encode(), _ARPHRD_ETHER, address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFHWADDR, request)
    return True
