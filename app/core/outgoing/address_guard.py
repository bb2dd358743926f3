"""The one guard of requests that leave this service at a caller's wish: webhooks, models, texts.

A name is resolved once; every address behind it must be public, or in a network that the operator allows;
and the connection goes to the address that was checked, under the name for TLS. Proxies of the environment
are not used: they would resolve the name again. Each hop of a redirect is a request of its own.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx

from app.core.errors import InvalidRequest

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Global by some registries, but answering for the host it runs on: platform services of Azure and Oracle.
PLATFORM = (ipaddress.IPv4Network("168.63.129.16/32"), ipaddress.IPv4Network("192.0.0.0/24"))


class DestinationRefused(InvalidRequest):
    """Requests of the service may not go to this address."""

    code = "destination_refused"


def system_resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a name, as the system's resolver gives them."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]).partition("%")[0] for entry in entries]


def embedded(address: IpAddress) -> IpAddress | None:
    """The IPv4 address that an IPv6 address stands for (mapped, NAT64); None if it stands for itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def is_public(address: IpAddress) -> bool:
    """Whether the address is on the internet: not private, loopback, link-local, multicast or reserved."""
    inner = embedded(address)
    if inner is not None:
        return is_public(inner)
    is_tunnel = isinstance(address, ipaddress.IPv6Address) and (address.sixtofour or address.teredo)
    is_special = address.is_multicast or address.is_reserved or address.is_unspecified
    is_platform = any(address in network for network in PLATFORM)
    return address.is_global and not (is_special or is_tunnel or is_platform)


class OutgoingGuard:
    """Decides which address a request may go to. `trusted` origins, `host:port`, are the operator's own."""

    def __init__(
        self,
        networks: Iterable[IpNetwork] = (),
        *,
        trusted: Iterable[str] = (),
        resolve: Resolve = system_resolve,
    ) -> None:
        self._networks = tuple(networks)
        self._trusted = frozenset(trusted)
        self._resolve = resolve

    def address(self, url: httpx.URL) -> str:
        """The address to connect to.

        Raises DestinationRefused for what isn't allowed, httpx.ConnectError if the name can't be resolved.
        """
        if url.scheme not in ("http", "https") or not url.host:
            raise self.refuse(url, "only http and https URLs with a host are allowed")
        if url.userinfo:
            raise self.refuse(url, "it holds credentials")
        addresses = self._addresses(url)
        if origin_of(url) not in self._trusted:
            for address in addresses:
                self._check(url, address)
        return str(addresses[0])

    def _addresses(self, url: httpx.URL) -> list[IpAddress]:
        try:
            addresses = [ipaddress.ip_address(text) for text in self._resolve(url.host, port_of(url))]
        except (OSError, UnicodeError, ValueError) as fault:
            raise httpx.ConnectError(f"{url.host} cannot be resolved: {fault}") from fault
        if not addresses:
            raise httpx.ConnectError(f"{url.host} has no address")
        return addresses

    def _check(self, url: httpx.URL, address: IpAddress) -> None:
        candidates = [address, embedded(address)]
        if any(one in network for one in candidates if one is not None for network in self._networks):
            return
        if not is_public(address):
            raise self.refuse(url, "it does not lead to a public address")
        if url.scheme != "https":
            raise self.refuse(url, "plain http is allowed inside the operator's networks only")

    @staticmethod
    def refuse(url: httpx.URL, why: str) -> DestinationRefused:
        # Neither the address nor credentials are named: callers must not learn the inner network's layout.
        return DestinationRefused(
            f"no request goes to {url.scheme}://{url.host[:200]}: {why}",
            remedy="use a public https URL, or let the operator add the network to NIBBLE_OUTGOING_NETWORKS",
        )


class GuardedTransport(httpx.BaseTransport):
    """Sends each request to the address that the guard has checked.

    Each host has connections of its own: two names at one address must not share a TLS session.
    """

    def __init__(self, guard: OutgoingGuard) -> None:
        self._guard = guard
        self._transports: dict[str, httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        address = self._guard.address(url)
        transport = self._transports.get(url.host)
        if transport is None:
            transport = self._transports[url.host] = httpx.HTTPTransport(trust_env=False)
        pinned = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,  # Host still names the host
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": url.host},
        )
        return transport.handle_request(pinned)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def guarded_client(guard: OutgoingGuard, **options: Any) -> httpx.Client:
    """An HTTP client that checks every request with the guard. Redirects are off by default."""
    return httpx.Client(transport=GuardedTransport(guard), trust_env=False, **options)


def port_of(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def origin_of(url: httpx.URL) -> str:
    return f"{url.host}:{port_of(url)}"
