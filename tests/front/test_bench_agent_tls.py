"""`tsruntime bench agent` against a server behind TLS: certificates are checked against the system's."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from front_server import Server

SMALL = ["--first", "100", "--next", "10", "--output", "4", "--system", "20", "--turns", "2", "--think", "0"]


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side has gone


def terminate(connection: socket.socket, context: ssl.SSLContext, address: tuple[str, int]) -> None:
    """What a proxy in front of a server does: TLS towards the client, plain TCP towards the server."""
    try:
        inside = context.wrap_socket(connection, server_side=True)
    except OSError:
        return  # a client that does not trust us
    with closing(inside), closing(socket.create_connection(address)) as outside:
        answers = threading.Thread(target=pump, args=(outside, inside), daemon=True)
        answers.start()
        pump(inside, outside)
        answers.join()


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(base URL of a TLS proxy before the server, file of the authority that signed its certificate)."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    parts = urlsplit(server.base)
    assert parts.hostname is not None
    assert parts.port is not None
    address = (parts.hostname, parts.port)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # closed
                threading.Thread(target=terminate, args=(connection, context, address), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/v1", trusted
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("known", [True, False], ids=["trusted", "unknown"])
def test_over_tls(executable: Path, proxy: tuple[str, Path], known: bool) -> None:
    url, trusted = proxy
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
    if known:
        environment["SSL_CERT_FILE"] = str(trusted)
    command = [str(executable), "bench", "agent", "--url", url, *SMALL, "--concurrency", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    if known:
        assert done.returncode == 0, done.stderr
        assert "in total" in done.stdout
    else:
        assert done.returncode == 1
        assert "certificate" in done.stderr.lower(), done.stderr
