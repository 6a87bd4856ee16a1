"""What Linux says of this machine's network: interfaces, their addresses, RDMA devices and GIDs.

Read from ``/sys`` and by ``ioctl`` with the standard library alone, for ``launch`` and ``doctor``.
A GID (global identifier) is how RDMA addresses a port: over Ethernet (RoCE) a port has several, one
per address and protocol version, and NCCL has to be told the index of one that routers carry: RoCE
version 2 with an IPv4 address in it.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sglang_w4afp8.errors import HostError

NET = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")

# linux/sockios.h and net/if.h: one ioctl lists (name, sockaddr) records of 40 bytes on 64-bit.
_SIOCGIFCONF = 0x8912
_RECORD_BYTES = 40
_NAME_BYTES = 16
_MOST_RECORDS = 1024


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        name: as in ``ip addr``.
        addresses: IPv4 addresses first, then IPv6 addresses other than link-local.
        is_up: whether its carrier is there (``operstate`` up, or unknown as for loopback).
    """

    name: str
    addresses: tuple[str, ...]
    is_up: bool

    @property
    def is_loopback(self) -> bool:
        """Whether this is ``lo``, which no other machine reaches."""
        return self.name == "lo"

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.addresses) or 'no address'})"


@dataclass(frozen=True)
class RdmaPort:
    """One port of an RDMA device.

    Attributes:
        device: e.g. ``mlx5_0``.
        port: number, from 1.
        state: ``ACTIVE``, ``DOWN``, …
        link_layer: ``InfiniBand`` or ``Ethernet`` (RoCE).
        rate: as the kernel words it, e.g. ``400 Gb/sec (4X NDR)``.
        gids: GID index -> interface, of the RoCE v2 GIDs that hold an IPv4 address.
    """

    device: str
    port: int
    state: str
    link_layer: str
    rate: str
    gids: dict[int, str]

    @property
    def is_active(self) -> bool:
        """Whether traffic can flow."""
        return self.state == "ACTIVE"

    @property
    def is_roce(self) -> bool:
        """Whether it runs over Ethernet, where the GID index matters."""
        return self.link_layer == "Ethernet"


def interfaces() -> list[Interface]:
    """Every interface of this machine (of this network namespace), by name."""
    ipv4, ipv6 = _ipv4_addresses(), _ipv6_addresses()
    found = []
    for _, name in sorted(socket.if_nameindex(), key=lambda pair: pair[1]):
        state = _read(NET / name / "operstate")
        addresses = (*ipv4.get(name, ()), *ipv6.get(name, ()))
        found.append(Interface(name, addresses, state in ("up", "unknown", "")))
    return found


def interface_named(name: str) -> Interface:
    """The interface called ``name``, with an address.

    Raises:
        HostError: there is none of that name, or it has no address; lists what there is.
    """
    known = interfaces()
    match = next((interface for interface in known if interface.name == name), None)
    usable = [interface for interface in known if interface.addresses]
    if match is None or not match.addresses:
        problem = "is no interface of this node" if match is None else "has no address"
        raise HostError(
            f"--iface {name}: {name!r} {problem}; {socket.gethostname()} has "
            + ", ".join(str(interface) for interface in usable),
            "NCCL and gloo would wait for each other on an interface that is not there",
            [
                *(f"--iface {i.name}" for i in usable if not i.is_loopback),
                "leave --iface out: the interface that leads to --master is taken",
            ],
        )
    return match


def interface_of(address: str) -> Interface | None:
    """The interface that holds a local address, or None."""
    known = interfaces()
    for interface in known:
        if address in interface.addresses:
            return interface
    if ipaddress.ip_address(address).is_loopback:  # all of 127.0.0.0/8 is local, one is listed
        return next((interface for interface in known if interface.is_loopback), None)
    return None


def resolve(host: str) -> str:
    """The first IP address that a name stands for; an address stands for itself.

    Raises:
        OSError: the name does not resolve.
    """
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def is_local(address: str) -> bool:
    """Whether this machine may bind the IP address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str:
    """The local address from which packets to ``address`` leave. Sends nothing.

    Raises:
        OSError: there is no route.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def rdma_ports() -> list[RdmaPort]:
    """Every port of every RDMA device, by device name; empty without RDMA."""
    found = []
    for folder in sorted(INFINIBAND.glob("*/ports/*")):
        found.append(
            RdmaPort(
                device=folder.parts[-3],
                port=int(folder.name),
                # "4: ACTIVE"
                state=_read(folder / "state").rpartition(": ")[2],
                link_layer=_read(folder / "link_layer"),
                rate=_read(folder / "rate"),
                gids=dict(_roce_gids(folder)),
            )
        )
    return found


def gid_index(ports: Sequence[RdmaPort]) -> tuple[int | None, str]:
    """The value for ``NCCL_IB_GID_INDEX`` and the reason, or None and the reason against one.

    NCCL takes one index for all devices, so it must fit every active RoCE port.
    """
    active = [port for port in ports if port.is_active and port.is_roce]
    if not active:
        return None, "no active RoCE port; InfiniBand proper needs no GID index"
    common = set.intersection(*(set(port.gids) for port in active))
    names = ", ".join(port.device for port in active)
    if common:
        return min(common), f"RoCE v2 over IPv4 is GID {min(common)} on {names}"
    each = "; ".join(f"{port.device}: {sorted(port.gids) or 'none'}" for port in active)
    return None, f"no RoCE v2 IPv4 GID index is common to all ports ({each}); NCCL has to choose"


def _roce_gids(port: Path) -> Iterator[tuple[int, str]]:
    for entry in sorted((port / "gid_attrs" / "types").glob("*"), key=lambda path: int(path.name)):
        # Reading the type of an empty slot is an error (EINVAL), which _read makes "".
        gid = _read(port / "gids" / entry.name).replace(":", "")
        if _read(entry) == "RoCE v2" and gid.startswith("0" * 20 + "ffff"):
            yield int(entry.name), _read(port / "gid_attrs" / "ndevs" / entry.name)


def _ipv4_addresses() -> dict[str, list[str]]:
    buffer = array.array("B", bytes(_RECORD_BYTES * _MOST_RECORDS))
    address, length = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", length, address)
        filled = struct.unpack("iL", fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, request))[0]
    data = buffer.tobytes()
    found: dict[str, list[str]] = {}
    for start in range(0, filled, _RECORD_BYTES):
        name = data[start : start + _NAME_BYTES].split(b"\0", 1)[0].decode()
        # struct sockaddr_in: family (2), port (2), address (4). An alias "eth0:1" is eth0's.
        packed = data[start + _NAME_BYTES + 4 : start + _NAME_BYTES + 8]
        found.setdefault(name.partition(":")[0], []).append(socket.inet_ntoa(packed))
    return found


def _ipv6_addresses() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            found.setdefault(name, []).append(str(address))
    return found


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
