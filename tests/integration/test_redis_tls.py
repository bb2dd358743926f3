"""`rediss://`: a real Valkey behind a relay that ends TLS, with an authority of its own."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import trustme

from app.commands.checks.redis_checks import check_redis
from app.core.errors import Unavailable
from app.core.redis.redis_server import connect, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, running_service
from tests.servers import running


class Relay(ThreadingTCPServer):
    """Takes TLS connections and passes their bytes to the server on the unix socket."""

    daemon_threads = True

    def __init__(self, target: str, authority: trustme.CA) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        self.target = target
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self.context)

    def handle_error(self, request: object, address: object) -> None:
        """A client that refuses the certificate is no news here."""


class Passage(BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with (
            self.server.context.wrap_socket(self.request, server_side=True) as near,
            socket.socket(socket.AF_UNIX) as far,
        ):
            far.connect(self.server.target)
            back = threading.Thread(target=copy, args=(far, near), daemon=True)
            back.start()
            copy(near, far)
            back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_url(redis_url: str, authority: trustme.CA) -> Iterator[str]:
    """Without a word on whom to trust."""
    with running(Relay(redis_url.removeprefix("unix://"), authority)) as relay:
        yield f"rediss://127.0.0.1:{relay.server_address[1]}/0"


def trusting(url: str, authority: trustme.CA, folder: Path) -> str:
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return f"{url}?ssl_ca_certs={path}"


def test_the_service_works_over_tls(tls_url: str, authority: trustme.CA, tmp_path: Path) -> None:
    url = trusting(tls_url, authority, tmp_path)
    settings = Settings(
        state_dir=tmp_path / "state", redis_url=url, model_roots=(EXAMPLES,), bootstrap_api_key=ADMIN_KEY
    )
    with running_service(settings) as service:
        job = service.submit()
        assert service.end(job["id"]).state == "succeeded"
        waited = service.client.get(f"/v1/jobs/{job['id']}/events")
        assert [event["payload"].get("state") for event in waited.json()["data"]][-1] == "succeeded"
    findings = {check.name: check for check in check_redis(Settings(redis_url=url))}
    assert findings["redis"].status == "ok"


def test_a_certificate_of_another_authority_is_refused_in_words(tls_url: str, tmp_path: Path) -> None:
    for url in (tls_url, trusting(tls_url, trustme.CA(), tmp_path)):
        client = connect(url)
        begun = time.monotonic()
        with pytest.raises(Unavailable) as refusal:
            wait_for_redis(client)
        client.close()
        assert time.monotonic() - begun < 10  # it does not wait for what won't come
        assert refusal.value.code == "redis_untrusted"
        assert "certificate of Redis is not trusted" in refusal.value.message
        assert "ssl_ca_certs" in refusal.value.remedy
        (check,) = check_redis(Settings(redis_url=url))
        assert (check.status, "not trusted" in check.finding) == ("problem", True)
        assert "ssl_ca_certs" in check.remedy
