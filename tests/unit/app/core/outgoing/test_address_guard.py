"""Where requests may go, and that they go where was looked."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from app.core.outgoing.address_guard import DestinationRefused, OutgoingGuard, guarded_client, is_public
from tests.servers import running

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "168.63.129.16", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.192",
        "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(DestinationRefused) as refusal:
        OutgoingGuard(resolve=lambda host, port: [address]).address(httpx.URL("https://hook.example/"))
    assert address not in refusal.value.message


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    guard = OutgoingGuard(resolve=lambda host, port: [address])
    assert guard.address(httpx.URL("https://hook.example/")) == str(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f.1/", "https://[::1]/",
        "https://localhost/", "http://8.8.8.8/", "https://user:password@8.8.8.8/", "ftp://8.8.8.8/",
        "https:///path", "https://8.8.8.8\\@127.0.0.1/",
    ],
)  # fmt: skip
def test_urls_that_lead_inside_are_refused(url: str) -> None:
    with pytest.raises((DestinationRefused, httpx.ConnectError, httpx.InvalidURL)):
        OutgoingGuard().address(httpx.URL(url))


def test_one_inner_address_among_several_is_enough_to_refuse() -> None:
    guard = OutgoingGuard(resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(DestinationRefused):
        guard.address(httpx.URL("https://hook.example/"))


def test_a_name_that_cannot_be_resolved_is_refused() -> None:
    def fail(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror("no such name")

    for resolve in (fail, lambda host, port: []):
        with pytest.raises(httpx.ConnectError):
            OutgoingGuard(LOOPBACK, resolve=resolve).address(httpx.URL("https://hook.example/"))


def test_networks_of_the_operator_are_allowed_also_without_tls() -> None:
    guard = OutgoingGuard(LOOPBACK, resolve=lambda host, port: ["::ffff:127.0.0.1"])
    assert guard.address(httpx.URL("http://hook.example/"))


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(self.headers["Host"])  # type: ignore[attr-defined]
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "http://169.254.169.254/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def echo() -> Iterator[ThreadingHTTPServer]:
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as server:
        server.seen = []  # type: ignore[attr-defined]
        yield server


def test_the_checked_address_is_the_one_that_is_called(echo: ThreadingHTTPServer) -> None:
    """A name that changes its address between check and connection (DNS rebinding)."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    guard = OutgoingGuard(LOOPBACK, resolve=lambda host, port: next(answers))
    with guarded_client(guard) as client:
        answer = client.get(f"http://hook.example:{echo.server_port}/")
        assert answer.status_code == 200
        assert echo.seen == [f"hook.example:{echo.server_port}"]  # type: ignore[attr-defined]
        with pytest.raises(DestinationRefused):
            client.get(f"http://hook.example:{echo.server_port}/")


def test_redirects_are_not_followed_or_pass_the_guard_too(echo: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{echo.server_port}/moved"
    with guarded_client(OutgoingGuard(LOOPBACK)) as client:
        assert client.get(url).status_code == 302
        with pytest.raises(DestinationRefused):
            client.get(url, follow_redirects=True)


def test_proxies_of_the_environment_are_not_used(
    echo: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with guarded_client(OutgoingGuard(LOOPBACK)) as client:
        assert client.get(f"http://127.0.0.1:{echo.server_port}/").status_code == 200


def test_tls_asks_for_the_name_and_not_for_the_address() -> None:
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda session, name, _: names.append(name)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, pytest.raises(OSError, match=r"."):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        guard = OutgoingGuard(LOOPBACK, resolve=lambda host, port: ["127.0.0.1"])
        with guarded_client(guard) as client, pytest.raises(httpx.ConnectError):
            client.get(f"https://hook.example:{listener.getsockname()[1]}/")
        thread.join()
    assert names == ["hook.example"]
