"""`python -m clae_dist.launchers.route HOST`: the way from this machine to another, for the scripts in launch/."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class HostRoute:
    """How this machine reaches a host."""

    address: str  # this machine's, as the host sees it
    interface: str  # that has the address
    is_here: bool  # the host is this machine


def route_to(host: str) -> HostRoute:
    """The route that the kernel would take to `host`, a name or an address. Nothing is sent. Raises OSError without one."""
    family, _, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        address = str(probe.getsockname()[0])
    return HostRoute(address, _interface_of(address), address == where[0])


def _interface_of(address: str) -> str:
    if ":" in address:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if bytes.fromhex(digits) == socket.inet_pton(socket.AF_INET6, address.partition("%")[0]):
                return name
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:  # an interface without an IPv4 address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
        if address.startswith("127."):
            return "lo"
    raise OSError(f"no interface has the address {address}")


def main(arguments: list[str]) -> int:
    """Prints `ADDRESS INTERFACE yes|no` (this machine's; whether HOST is this machine); 2 without a route."""
    (host,) = arguments
    try:
        route = route_to(host)
    except OSError as error:
        print(f"{host} cannot be reached from here ({error.strerror or error}); check the name, and this machine's network.")
        return 2
    print(route.address, route.interface, "yes" if route.is_here else "no")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
