"""Which IP addresses are public: by default the only ones from which images are fetched.

Sources: the IANA registries of special-purpose addresses for IPv4 and IPv6. They are listed here
because Python's `is_global` changes between releases and counts 6to4 and NAT64 as global, in which
any IPv4 address can be hidden.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NOT_PUBLIC = [
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by the customers of a provider; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
_IPV6_UNICAST = ip_network("2000::/3")  # what lies outside is local, mapped, NAT64, multicast, ...


def is_public(address: Address) -> bool:
    """Whether an IP address is on the public internet."""
    if address.version == 6 and address not in _IPV6_UNICAST:
        return False
    return not is_within(address, _NOT_PUBLIC)


def is_within(address: Address, networks: Iterable[Network]) -> bool:
    """Whether an IP address is in any of the networks."""
    return any(address in network for network in networks)


def read_address(host: str) -> Address | None:
    """Return the IP address that the host of a URL spells out; None for a name.

    Raises:
        ValueError: it is neither: a short, decimal, octal or hexadecimal spelling of an IPv4
            address, which only some resolvers accept, or an IPv6 address with a zone.
    """
    if ":" in host:
        if "%" in host:
            raise ValueError("an address with a zone")
        return IPv6Address(host)
    last = host.rpartition(".")[2]
    if last.isdecimal() or last.lower().startswith("0x"):
        return IPv4Address(host)
    return None


def parse_address(text: str) -> Address:
    """Return a resolver's result as an IP address, without its zone."""
    return ip_address(text.partition("%")[0])
